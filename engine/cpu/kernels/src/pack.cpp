// Rows of a GGUF file into panels.
#include "blocks.h"
#include "pagewire.h"

namespace pagewire {
namespace {

// One row's part of one block of 32 columns, as a panel stores it.
struct RowBlock {
    uint8_t scales[4];   // as many of them as the kind has
    uint8_t low[16];     // two columns a byte: column i and column i + 16; for Q8, see `bytes`
    uint8_t high[2][4];  // planes of the fifth and the sixth bit
    uint8_t bytes[32];   // Q8
};

// Values 0..63 of 32 columns into the planes.
void split(const uint8_t* values, RowBlock& out) {
    uint8_t fifth[BLOCK], sixth[BLOCK];
    for (int column = 0; column < BLOCK; ++column) {
        fifth[column] = values[column] >> 4 & 1;
        sixth[column] = values[column] >> 5 & 1;
    }
    for (int i = 0; i < 16; ++i) {
        out.low[i] = static_cast<uint8_t>((values[i] & 15) | (values[i + 16] & 15) << 4);
    }
    spread_bits(fifth, out.high[0]);
    spread_bits(sixth, out.high[1]);
}

void five_bits(const uint8_t* high, const uint8_t* nibbles, uint8_t* values) {
    uint32_t bits;
    memcpy(&bits, high, 4);
    for (int i = 0; i < 16; ++i) {
        values[i] = static_cast<uint8_t>((nibbles[i] & 15) | (bits >> i & 1) << 4);
        values[i + 16] = static_cast<uint8_t>((nibbles[i] >> 4) | (bits >> (i + 16) & 1) << 4);
    }
}

// Scale and min, 6 bits each, of block `index` of a Q4_K or Q5_K unit.
void k_scale(const uint8_t* scales, int index, uint8_t* scale, uint8_t* min) {
    if (index < 4) {
        *scale = scales[index] & 63;
        *min = scales[index + 4] & 63;
    } else {
        *scale = static_cast<uint8_t>((scales[index + 4] & 15) | (scales[index - 4] >> 6) << 4);
        *min = static_cast<uint8_t>((scales[index + 4] >> 4) | (scales[index] >> 6) << 4);
    }
}

// Block `index` of the unit of one row.
void read_block(int kind, const uint8_t* unit, int index, RowBlock& out) {
    uint8_t values[BLOCK];
    switch (kind) {
        case Q4:
            memcpy(out.scales, unit, 2);
            memcpy(out.low, unit + 2, 16);
            break;
        case Q4M:
            memcpy(out.scales, unit, 4);
            memcpy(out.low, unit + 4, 16);
            break;
        case Q5:
            memcpy(out.scales, unit, 2);
            five_bits(unit + 2, unit + 6, values);
            split(values, out);
            break;
        case Q5M:
            memcpy(out.scales, unit, 4);
            five_bits(unit + 4, unit + 8, values);
            split(values, out);
            break;
        case Q8:
            memcpy(out.scales, unit, 2);
            memcpy(out.bytes, unit + 2, 32);
            break;
        case Q4K:
        case Q5K: {
            k_scale(unit + 4, index, &out.scales[0], &out.scales[1]);
            const uint8_t* high = kind == Q5K ? unit + 16 : nullptr;
            const uint8_t* nibbles = unit + (kind == Q5K ? 48 : 16) + index / 2 * 32;
            for (int column = 0; column < BLOCK; ++column) {
                uint8_t low = index % 2 ? nibbles[column] >> 4 : nibbles[column] & 15;
                uint8_t fifth = high ? high[column] >> index & 1 : 0;
                values[column] = static_cast<uint8_t>(low | fifth << 4);
            }
            split(values, out);
            break;
        }
        case Q6K: {
            // 128 columns share 64 bytes of low and 32 of high bits; index counts blocks of 32.
            const uint8_t* low = unit + index / 4 * 64 + index % 2 * 32;
            const uint8_t* high = unit + 128 + index / 4 * 32;
            for (int column = 0; column < BLOCK; ++column) {
                uint8_t nibble = index % 4 < 2 ? low[column] & 15 : low[column] >> 4;
                values[column] = static_cast<uint8_t>(nibble | (high[column] >> index % 4 * 2 & 3) << 4);
            }
            memcpy(out.scales, unit + 192 + index * 2, 2);
            split(values, out);
            break;
        }
    }
}

// Each row's `size` bytes at `from` to its place among the others' at `panel`: four bytes a row at a time.
void interleave(uint8_t* panel, int row, const uint8_t* from, int size) {
    for (int i = 0; i < size; i += 4) memcpy(panel + i * ROWS + row * 4, from + i, 4);
}

}  // namespace

void pack_panel(int kind, const uint8_t* rows, int64_t row_bytes, int num_rows, int64_t columns, uint8_t* panel) {
    memset(panel, 0, static_cast<size_t>(panel_bytes(kind, columns, 0)));
    if (is_16_bit(kind)) {
        const int together = kind == BF16 ? 2 : 1;  // columns of a row side by side
        for (int row = 0; row < num_rows; ++row) {
            for (int64_t column = 0; column < columns; ++column) {
                int64_t place = (column / together * ROWS + row) * together + column % together;
                memcpy(panel + place * 2, rows + row * row_bytes + column * 2, 2);
            }
        }
        return;
    }
    int per_unit = unit_columns(kind) / BLOCK;
    for (int row = 0; row < num_rows; ++row) {
        const uint8_t* unit = rows + row * row_bytes;
        uint8_t* at = panel;
        for (int64_t column = 0; column < columns; column += unit_columns(kind), unit += file_bytes(kind)) {
            if (kind == Q6K) {
                memcpy(at + row * 2, unit + 208, 2);
            } else if (super_bytes(kind)) {
                memcpy(at + row * 2, unit, 2);
                memcpy(at + (ROWS + row) * 2, unit + 2, 2);
            }
            at += super_bytes(kind);
            for (int index = 0; index < per_unit; ++index, at += block_bytes(kind)) {
                RowBlock block = {};
                read_block(kind, unit, index, block);
                uint8_t* values = at + scale_bytes(kind);
                if (super_bytes(kind)) {  // one byte of each scale a row
                    at[row] = block.scales[0];
                    at[ROWS + row] = block.scales[1];
                } else {  // the rows' d, then their m
                    memcpy(at + row * 2, block.scales, 2);
                    if (scale_bytes(kind) == ROWS * 4) memcpy(at + (ROWS + row) * 2, block.scales + 2, 2);
                }
                if (kind == Q8) {
                    interleave(values, row, block.bytes, 32);
                    continue;
                }
                interleave(values, row, block.low, 16);
                if (kind == Q5 || kind == Q5M || kind == Q5K || kind == Q6K) {
                    interleave(values + ROWS * 16, row, block.high[0], 4);
                }
                if (kind == Q6K) interleave(values + ROWS * 20, row, block.high[1], 4);
            }
        }
    }
}

void pack_groups(int kind, const uint8_t* codes, const float* scales, const float* minima, int num_rows, int64_t columns,
                 int64_t group, uint8_t* panel) {
    memset(panel, 0, static_cast<size_t>(panel_bytes(kind, columns, group)));
    const int64_t blocks = columns / BLOCK, groups = (blocks + group - 1) / group;
    for (int row = 0; row < num_rows; ++row) {
        const uint8_t* from = codes + row * columns;
        uint8_t* at = panel;
        for (int64_t block = 0; block < blocks; ++block, from += BLOCK, at += block_bytes(kind)) {
            if (block % group == 0) {
                memcpy(at + row * 4, scales + row * groups + block / group, 4);
                memcpy(at + (ROWS + row) * 4, minima + row * groups + block / group, 4);
                at += super_bytes(kind);
            }
            if (kind == I8) {
                interleave(at, row, from, BLOCK);
                continue;
            }
            RowBlock out = {};
            split(from, out);
            interleave(at, row, out.low, 16);
        }
    }
}

}  // namespace pagewire
