// What the parts of the library share.
#pragma once

#include <cstdint>

#include "blocks.h"
#include "layers.h"

namespace pagewire {

// Activations in 8 bits: q * d for each 32 columns of a token.
struct Tokens {
    const int8_t* q;     // [tokens, columns]
    const float* d;      // [tokens, columns / 32]
    const float* sums;   // [tokens, columns / 16], of d * q over 16 columns: for what is subtracted from weights
    int64_t columns;
};

// A part of a product: out[t, row] = sum over columns of weight[row, column] * x[t, column] + bias[row].
struct Product {
    const uint8_t* panels;
    int64_t rows;
    Tokens x;
    int64_t num_tokens;
    const float* bias;  // or null
    float* out;
    int64_t out_stride;  // elements from a token to the next
};

// What is compiled once for each instruction set.
struct Instructions {
    const char* name;
    // x [tokens, columns] -> q, d, sums, for tokens first to last.
    void (*quantize)(const float* x, int64_t x_stride, int64_t columns, int64_t first, int64_t last, int8_t* q,
                     float* d, float* sums);
    // Panels first to last of a product.
    void (*multiply[NUM_KINDS])(const Product& product, int64_t first, int64_t last);
    const Layers& layers;
};

const Instructions& plain_instructions();
#if defined(__x86_64__)
const Instructions& avx2_instructions();
#endif

// Row `row` of a panel, as numbers.
void unpack_row(int kind, const uint8_t* panel, int row, int64_t columns, float* out);

void pack_panel(int kind, const uint8_t* rows, int64_t row_bytes, int num_rows, int64_t columns, uint8_t* panel);

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
