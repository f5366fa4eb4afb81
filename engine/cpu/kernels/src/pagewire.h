// What the parts of the library share.
#pragma once

#include <cstdint>

#include "blocks.h"
#include "layers.h"

namespace pagewire {

// What a token has at a block of columns, in 8 bits: q * d.
struct Rounded {
    int8_t q[BLOCK];
    float d;
    float sum;        // d * the sum of q: for a minimum that is added to weights
    int32_t less[2];  // minus the sum of q over 16 columns: for weights stored with an offset
};

// Tokens whose blocks lie side by side: a kernel that multiplies a few of them walks one line of memory.
constexpr int64_t TOGETHER = 16;

// Activations in 8 bits. By each TOGETHER tokens, or those that are left of them at the end: for each block of columns
// what the tokens have there.
struct Tokens {
    Rounded* blocks;
    int64_t columns, num_tokens;

    // How many lie together with a token.
    int64_t width(int64_t token) const {
        int64_t left = num_tokens - token / TOGETHER * TOGETHER;
        return left < TOGETHER ? left : TOGETHER;
    }

    // A token's first block. Its next one is `width` further on, and the next token with it 1.
    Rounded* at(int64_t token) const {
        return blocks + token / TOGETHER * TOGETHER * (columns / BLOCK) + token % TOGETHER;
    }
};

// A part of a product: out[t, row] = sum over columns of weight[row, column] * x[t, column] + bias[row].
struct Product {
    const uint8_t* panels;
    int64_t rows;
    int64_t group;  // blocks of a group, of kinds that have them
    Tokens x;
    const float* numbers;  // [tokens, columns], what x was rounded from; kinds of 16 bits have only this
    int64_t numbers_stride;  // elements from a token to the next
    const float* bias;  // or null
    float* out;
    int64_t out_stride;  // likewise
};

// Bytes of tokens' columns that are read again for each panel: they stay in the second cache.
constexpr int64_t PART_BYTES = 256 << 10;

// How many tokens they are of.
inline int64_t tokens_of_part(const Product& product) {
    const int64_t tokens = PART_BYTES / product.x.columns / TOGETHER * TOGETHER;
    return tokens < TOGETHER ? TOGETHER : tokens;
}

// Panels first to last of a product with a matrix in 16 bits.
struct Matrices {
    void (*bf16)(const Product& product, int64_t first, int64_t last);
    void (*f16)(const Product& product, int64_t first, int64_t last);
};

// What is compiled once for each instruction set.
struct Instructions {
    const char* name;
    // product.numbers -> product.x, for tokens first to last.
    void (*quantize)(const Product& product, int64_t first, int64_t last);
    // Panels first to last of a product, by kind.
    void (*multiply[NUM_KINDS])(const Product& product, int64_t first, int64_t last);
    const Layers& layers;
};

const Instructions& plain_instructions();
const Matrices& plain_matrices();
#if defined(__x86_64__)
const Instructions& avx2_instructions();
const Matrices& avx2_matrices();
// There are those that the compiler knows: build.py defines PAGEWIRE_AVXVNNI and so on.
const Instructions& avxvnni_instructions();
const Instructions& avx512_instructions();
const Matrices& avx512_matrices();
const Instructions& amx_instructions();
#endif

// Row `row` of a panel, as numbers.
void unpack_row(int kind, const uint8_t* panel, int row, int64_t columns, int64_t group, float* out);

void pack_panel(int kind, const uint8_t* rows, int64_t row_bytes, int num_rows, int64_t columns, uint8_t* panel);

// Integers in groups: codes [num_rows, columns], scales and minima [num_rows, groups].
void pack_groups(int kind, const uint8_t* codes, const float* scales, const float* minima, int num_rows, int64_t columns,
                 int64_t group, uint8_t* panel);

// IEEE half precision, any value.
inline float half_to_float(const uint8_t* bytes) {
    uint16_t half;
    memcpy(&half, bytes, 2);
    uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    uint32_t bits;
    if (exponent == 0) {
        float value = static_cast<float>(mantissa) * 0x1p-24f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
    }
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

}  // namespace pagewire
