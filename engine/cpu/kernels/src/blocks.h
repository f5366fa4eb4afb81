// Blocks of GGML's formats as GGUF files store them, and the panels that products read.
//
// A panel holds ROWS rows of a matrix, cut along the columns into blocks of 32. Inside a block, what the rows have
// at the same four columns lies side by side, four bytes a row, so that one vector instruction multiplies the
// same columns of many rows. Nothing is rounded on the way: a panel has the numbers of the file.
//
// Matrices in 16 bits have no blocks. What the rows have at the same column (F16), or at the same two columns (BF16),
// lies side by side; BF16 has a column of zeros behind an odd number of columns.
#pragma once

#include <cstdint>
#include <cstring>

namespace pagewire {

constexpr int ROWS = 16;   // of a panel
constexpr int BLOCK = 32;  // columns of a block
constexpr int GROUPS = BLOCK / 4;

// The kinds of panel. Values are those of kinds.py.
enum Kind : int32_t {
    Q4 = 0,    // d * (q - 8), 4 bits: Q4_0
    Q4M = 1,   // d * q + m, 4 bits: Q4_1
    Q5 = 2,    // d * (q - 16), 5 bits: Q5_0
    Q5M = 3,   // d * q + m, 5 bits: Q5_1
    Q8 = 4,    // d * q, 8 bits, signed: Q8_0
    Q4K = 5,   // d * scale * q - dmin * min, 4 bits: Q4_K; d and dmin for 256 columns
    Q5K = 6,   // the same with 5 bits: Q5_K
    Q6K = 7,   // d * scale * (q - 32), 6 bits, a scale for 16 columns: Q6_K
    BF16 = 8,  // the upper half of an fp32
    F16 = 9,   // IEEE half precision
    I4 = 10,   // d * q + m, 4 bits; d and m in fp32 for a group of blocks, as long as the matrix says
    I8 = 11,   // the same with 8 bits, signed
    NUM_KINDS = 12,
};

// Whether a kind is multiplied with fp32 activations, not with those in 8 bits.
constexpr bool is_16_bit(int kind) { return kind == BF16 || kind == F16; }

// Whether a group of blocks has its scales before it, and matrices differ in how many blocks that is.
constexpr bool is_grouped(int kind) { return kind == I4 || kind == I8; }

// Whether values have 8 bits, with a sign.
constexpr bool is_signed(int kind) { return kind == Q8 || kind == I8; }

// Bytes of one block of a panel of blocks: scales of its rows, then their values.
constexpr int block_bytes(int kind) {
    switch (kind) {
        case Q4: return ROWS * 2 + ROWS * 16;
        case Q4M: return ROWS * 4 + ROWS * 16;
        case Q5: return ROWS * 2 + ROWS * 20;
        case Q5M: return ROWS * 4 + ROWS * 20;
        case Q8: return ROWS * 2 + ROWS * 32;
        case Q4K: return ROWS * 2 + ROWS * 16;  // 8 bits each of scale and min
        case Q5K: return ROWS * 2 + ROWS * 20;
        case Q6K: return ROWS * 2 + ROWS * 24;  // two scales of 8 bits
        case I4: return ROWS * 16;
        case I8: return ROWS * 32;
    }
    return 0;
}

// Bytes before a block's values, of its own scales.
constexpr int scale_bytes(int kind) {
    if (is_grouped(kind)) return 0;
    return ROWS * (kind == Q4M || kind == Q5M ? 4 : 2);
}

// Bytes before the blocks of each 256 columns, or of each group.
constexpr int super_bytes(int kind) {
    switch (kind) {
        case Q4K: case Q5K: return ROWS * 4;
        case Q6K: return ROWS * 2;
        case I4: case I8: return ROWS * 8;
    }
    return 0;
}

// Blocks behind those bytes.
constexpr int64_t super_blocks(int kind, int64_t group) { return is_grouped(kind) ? group : 8; }

// Columns that a file's format keeps together.
constexpr int unit_columns(int kind) {
    if (is_16_bit(kind)) return 1;
    return super_bytes(kind) && !is_grouped(kind) ? 256 : BLOCK;
}

// Bytes that a file has for them.
constexpr int file_bytes(int kind) {
    switch (kind) {
        case Q4: return 18;
        case Q4M: return 20;
        case Q5: return 22;
        case Q5M: return 24;
        case Q8: return 34;
        case Q4K: return 144;
        case Q5K: return 176;
        case Q6K: return 210;
        case BF16: case F16: return 2;
    }
    return 0;
}

// Bytes of a panel of so many columns. `group`: blocks of a group, where the kind has any.
inline int64_t panel_bytes(int kind, int64_t columns, int64_t group) {
    if (kind == BF16) return (columns + 1) / 2 * ROWS * 4;
    if (kind == F16) return columns * ROWS * 2;
    const int64_t blocks = columns / BLOCK;
    if (!super_bytes(kind)) return blocks * block_bytes(kind);
    const int64_t each = super_blocks(kind, group);
    return blocks * block_bytes(kind) + (blocks + each - 1) / each * super_bytes(kind);
}

// The sixth and fifth bits of a row's columns are kept apart from the lower four. Of byte j of a row's four, bit g
// belongs to column 4 * g + j.
inline void spread_bits(const uint8_t* bit_of_column, uint8_t* out) {
    memset(out, 0, 4);
    for (int column = 0; column < BLOCK; ++column) {
        out[column % 4] |= static_cast<uint8_t>((bit_of_column[column] & 1) << (column / 4));
    }
}

}  // namespace pagewire
