"""What Triton's interpreter cannot promise on every machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch


def require_invariant_products() -> None:
    """Skips a test of bits where numpy, with which the interpreter multiplies, gives a row of a product other
    bits at another place in the tile. That depends on the processor; on a GPU it is the kernel that counts.
    """
    if torch.cuda.is_available():
        return
    generator = np.random.default_rng(0)
    for inner, width in ((16, 64), (32, 64), (64, 16), (64, 32), (64, 64), (16, 16)):
        for dtype in (np.float32, np.float16):
            row = generator.standard_normal((1, inner)).astype(dtype)
            right = generator.standard_normal((inner, width)).astype(dtype)
            product = np.repeat(row, 32, axis=0) @ right
            if (product != product[0]).any():
                pytest.skip("numpy's product of a row depends on the row's place on this processor")
