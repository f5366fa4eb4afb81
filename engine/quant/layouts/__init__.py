"""The few forms that quantized weights have in memory, whatever their files were like.

| layout | values | scales |
| --- | --- | --- |
| PackedGroups | 2 or 4 bits in words of 32 | groups of inputs, with or without zero points |
| Int8Groups | int8 | groups of inputs, with or without zero points |
| Int8Channels | int8; inputs are int8 too | each output |
| Fp8Channels | e4m3; inputs are e4m3 too, or not | each output |
| Fp8Blocks | e4m3; inputs are e4m3 too, or not | blocks of outputs and inputs |
| TableWeights | 4 bits in words of 32 that number entries of a table | groups of inputs, or none |

Each has a reference product in torch, which defines what kernels compute. A device's kernels for a layout
are registered with LayoutProducts (engine/quant/products.py)."""
