"""The formats of matrices in files that products are computed on as they are."""

from __future__ import annotations

from dataclasses import dataclass


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


BLOCK_KINDS = {
    kind.name: kind
    for kind in (
        BlockKind("Q4_0", 0, 32, 18),
        BlockKind("Q4_1", 1, 32, 20),
        BlockKind("Q5_0", 2, 32, 22),
        BlockKind("Q5_1", 3, 32, 24),
        BlockKind("Q8_0", 4, 32, 34),
        BlockKind("Q4_K", 5, 256, 144),
        BlockKind("Q5_K", 6, 256, 176),
        BlockKind("Q6_K", 7, 256, 210),
        BlockKind("BF16", 8, 1, 2),
        BlockKind("F16", 9, 1, 2),
    )
}
