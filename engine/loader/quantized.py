"""Which of a checkpoint's matrices are quantized: what its configuration says, checked with its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

from engine.layers.linear_method import LinearMethod
from engine.loader.backbone import names_in
from engine.loader.checkpoint import Checkpoint, readable
from engine.loader.formats import names_of
from engine.loader.stream import StoredTensor, read_exactly
from engine.models.base import ModelContext
from engine.models.checkpoint_names import CheckpointNames
from engine.models.config import ModelConfig
from engine.models.families import checkpoint_names
from engine.quant.config import Quantization
from engine.quant.methods.base import NothingStored, StoredShape, StoredTensors
from engine.quant.methods.choose import METHODS, MethodsByScheme
from engine.quant.schemes import AtLoad, Scheme

# Which no format quantizes, though not all descriptions say so.
_ROUTERS = (".router", ".shared_expert_gate")
# Ends of names, as compressed-tensors and AutoFP8 have them.
_KV_SCALES = (
    *(".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".kv_scale"),
    *(".k_proj.output_scale", ".v_proj.output_scale"),
)


def with_quantized_layers(
    context: ModelContext,
    checkpoint: Checkpoint | None,
    make_method: Callable[[Scheme], LinearMethod] | None = None,
) -> ModelContext:
    """The context with the methods of a quantized model's layers, found out before anything is allocated.

    A matrix that the checkpoint has in 16 bits or more is plain, whatever its configuration says: GPTQ's says
    nothing of modules that were left out.

    Args:
        checkpoint: None for random weights, of which nothing but the configuration is known.
        make_method: a scheme's method; by default that which loads it.
    """
    config, quantization = context.config, context.config.quantization
    if quantization is None:
        return context
    if checkpoint is None:
        names, stored = checkpoint_names(config.architecture), cast(StoredTensors, NothingStored())
    else:
        names = names_in(checkpoint, config)
        stored = _Stored(checkpoint, config, names)
    products = context.layout_products

    def loading(scheme: Scheme) -> LinearMethod:
        return METHODS[type(scheme)](scheme, products, stored)

    schemes = _Schemes(config, quantization, stored, names)
    methods = MethodsByScheme(context.linear_methods, schemes.of, make_method or loading)
    experts = context.expert_methods
    if quantization.rules and any(layer.experts is not None for layer in config.layers):
        of_fp8 = experts.get("fp8") if quantization.is_fp8 else None
        made = products.experts(methods) if of_fp8 is None else of_fp8.for_matrices(methods)
        experts = {**experts, "": made}
    return replace(context, linear_methods=methods, expert_methods=experts)


def names_of_quantized(
    names: CheckpointNames, checkpoint: Checkpoint, config: ModelConfig
) -> CheckpointNames:
    """The names, with what quantized checkpoints hold beside the model's parameters ignored: scales for a KV
    cache of 8 bits, which kv_scales.py reads, and biases of zeros, which AutoGPTQ gives every matrix.

    Raises:
        ConfigError: a file cannot be read.
    """
    if config.quantization is None:
        return names
    tensors = [tensor for stored in checkpoint.files.values() for tensor in stored]
    packed = {tensor.name.removesuffix(".qweight") for tensor in tensors if tensor.name.endswith(".qweight")}
    biases = [tensor for tensor in tensors if tensor.name.removesuffix(".bias") in packed]
    zeros = tuple(bias.name for bias in biases if _is_zero(bias))
    return replace(names, ignored=(*names.ignored, *_KV_SCALES, *zeros))


def _is_zero(stored: StoredTensor) -> bool:
    """Whether a small tensor's numbers are all zero."""
    values = bytearray(stored.num_bytes)
    with readable(stored.path), stored.path.open("rb", buffering=0) as file:
        read_exactly(file.fileno(), memoryview(values), stored, 0)
    return not any(values)


class _Stored:
    """A checkpoint's tensors by the model's names."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, names: CheckpointNames) -> None:
        self._names, self._config = names, config
        self._tensors: Mapping[str, StoredTensor] = {
            tensor.name: tensor for tensors in checkpoint.files.values() for tensor in tensors
        }

    def find(self, layer: str, shard: str, tensor: str) -> StoredShape | None:
        modules = names_of(self._names, self._config, layer, shard)
        found = (self._tensors.get(f"{module}.{tensor}") for module in modules)
        stored = next((each for each in found if each is not None), None)
        return None if stored is None else StoredShape(stored.shape, stored.dtype)


class _Schemes:
    """The scheme of each matrix."""

    def __init__(
        self, config: ModelConfig, quantization: Quantization, stored: StoredTensors, names: CheckpointNames
    ) -> None:
        self._config, self._quantization = config, quantization
        self._stored, self._names = stored, names

    def of(self, layer: str, shard: str) -> Scheme | None:
        """None for a plain matrix."""
        if layer == "lm_head" and self._config.tie_word_embeddings:
            return None
        if layer.endswith(_ROUTERS) and isinstance(self._stored, NothingStored):
            return None
        scheme = self._quantization.scheme_of(names_of(self._names, self._config, layer, shard))
        if isinstance(scheme, AtLoad):
            return None if layer.endswith(_ROUTERS) else scheme
        if scheme is None:
            return None
        weight = self._stored.find(layer, shard, "weight")
        is_plain = weight is not None and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
        return None if is_plain else scheme
