"""Sizes that follow from how matrices are stored, for what knows a matrix by its scheme alone."""

from __future__ import annotations

# Bits in files -> bits in memory: those of 3 have room for one more.
BITS_KEPT = {2: 2, 3: 4, 4: 4, 8: 8}
# Of int4 made at load: the first that divides the inputs.
AT_LOAD_GROUP_SIZES = (128, 32)
# bitsandbytes' 4 bits.
TABLE_GROUP = 64
