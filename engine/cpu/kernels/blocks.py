"""The formats of matrices in files that products are computed on as they are."""

from __future__ import annotations

from dataclasses import dataclass

from pagewire.base.gguf_blocks import KEPT, block_size

# Columns that every kind of blocks computes together.
BLOCK = 32


@dataclass(frozen=True, slots=True)
class BlockKind:
    """A format of blocks (https://github.com/ggml-org/ggml, ggml-common.h), or of single numbers in 16 bits.

    Attributes:
        name: as GGUF files call it.
        code: what the library calls it: Kind of src/blocks.h.
        columns: of a row that are kept together.
        num_bytes: that they take.
    """

    name: str
    code: int
    columns: int
    num_bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of a file."""
        return columns // self.columns * self.num_bytes

    def num_columns(self, row_bytes: int) -> int:
        """Columns of a row of so many bytes."""
        return row_bytes // self.num_bytes * self.columns


# In the order of the library's codes; INTEGERS go on.
BLOCK_KINDS = {
    kind.name: kind
    for kind in (
        *(BlockKind(name, code, *block_size(name)) for code, name in enumerate(KEPT)),
        BlockKind("BF16", len(KEPT), 1, 2),
        BlockKind("F16", len(KEPT) + 1, 1, 2),
    )
}
# Integers that groups of blocks have an fp32 scale and minimum for, by their bits. No file has them so.
INTEGERS = {
    4: BlockKind("INT4", len(BLOCK_KINDS), BLOCK, BLOCK // 2),
    8: BlockKind("INT8", len(BLOCK_KINDS) + 1, BLOCK, BLOCK),
}
