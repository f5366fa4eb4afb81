"""Matrix products with quantized weights, which become numbers of the tokens' format in registers."""
