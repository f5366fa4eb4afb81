// Products with AVX-512 and VNNI. The sixteen rows of a panel are one vector: a lane is a row, its four bytes are
// columns.
#pragma once

#include <algorithm>

#include <immintrin.h>

#include "pagewire.h"

namespace pagewire {
namespace {

inline __m512i bytes_at(const void* at) { return _mm512_loadu_si512(at); }

inline __m512 halves_at(const uint8_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

inline __m512 unsigned_at(const uint8_t* at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
}

inline __m512 signed_at(const uint8_t* at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
}

inline __m512i four_columns(const int8_t* q) {
    int32_t four;
    memcpy(&four, q, 4);
    return _mm512_set1_epi32(four);
}

constexpr bool has_fifth(int kind) { return kind == Q5 || kind == Q5M || kind == Q5K || kind == Q6K; }

// A panel's values of a block, unpacked a group of four columns at a time, without a sign: those of 8 bits have 128
// added.
template <int KIND>
struct Values {
    const uint8_t* at;
    __m512i fifth, sixth;

    explicit Values(const uint8_t* values) : at(values) {
        if (has_fifth(KIND)) fifth = bytes_at(at + ROWS * 16);
        if (KIND == Q6K) sixth = bytes_at(at + ROWS * 20);
    }

    template <int GROUP>
    __m512i group() const {
        if (is_signed(KIND)) return _mm512_xor_si512(bytes_at(at + GROUP * ROWS * 4), _mm512_set1_epi8(-128));
        __m512i value = bytes_at(at + GROUP % 4 * ROWS * 4);
        value = _mm512_and_si512(GROUP < 4 ? value : _mm512_srli_epi16(value, 4), _mm512_set1_epi8(15));
        if (has_fifth(KIND)) value = with_bit<GROUP, 4>(value, fifth);
        if (KIND == Q6K) value = with_bit<GROUP, 5>(value, sixth);
        return value;
    }

    // Bit GROUP of each byte of a plane moved to bit TO, and added to the value.
    template <int GROUP, int TO>
    static __m512i with_bit(__m512i value, __m512i plane) {
        constexpr int left = TO > GROUP ? TO - GROUP : 0, right = GROUP > TO ? GROUP - TO : 0;
        if (left) plane = _mm512_slli_epi16(plane, left);
        if (right) plane = _mm512_srli_epi16(plane, right);
        constexpr int OR_OF_AND = 0xf8;  // a | b & c
        return _mm512_ternarylogic_epi32(value, plane, _mm512_set1_epi8(1 << TO), OR_OF_AND);
    }
};

template <int KIND, int GROUP, int T>
inline void add_group(const Values<KIND>& values, const Rounded* x, __m512i (&dot)[T]) {
    const __m512i weight = values.template group<GROUP>();
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) dot[t] = _mm512_dpbusd_epi32(dot[t], weight, four_columns(x[t].q + 4 * GROUP));
}

// Dot products of the panel's rows with the columns of four groups, in int32, added to `dot`.
template <int KIND, int FIRST, int T>
inline void add_groups(const Values<KIND>& values, const Rounded* x, __m512i (&dot)[T]) {
    add_group<KIND, FIRST, T>(values, x, dot);
    add_group<KIND, FIRST + 1, T>(values, x, dot);
    add_group<KIND, FIRST + 2, T>(values, x, dot);
    add_group<KIND, FIRST + 3, T>(values, x, dot);
}

// Sixteen columns of a Q6K block, which have a scale of their own.
template <int HALF, int T>
inline void add_half(const Values<Q6K>& values, __m512 scale, const Rounded* x, __m512 (&out)[T]) {
    __m512i dot[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) dot[t] = _mm512_slli_epi32(_mm512_set1_epi32(x[t].less[HALF]), 5);  // 32 of each
    add_groups<Q6K, HALF * 4, T>(values, x, dot);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        out[t] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(x[t].d)), _mm512_cvtepi32_ps(dot[t]), out[t]);
    }
}

// Adds a block's share to the sums of the panel's rows.
template <int KIND, int T>
inline void add_block(const uint8_t* super, const uint8_t* block, const Rounded* x, __m512 (&out)[T]) {
    const Values<KIND> values(block + scale_bytes(KIND));
    if constexpr (KIND == Q6K) {
        const __m512 scale = halves_at(super);
        add_half<0, T>(values, _mm512_mul_ps(scale, signed_at(block)), x, out);
        add_half<1, T>(values, _mm512_mul_ps(scale, signed_at(block + ROWS)), x, out);
        return;
    }
    __m512i dot[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        dot[t] = _mm512_setzero_si512();
        if (is_signed(KIND)) {  // 128 of each
            dot[t] = _mm512_add_epi32(_mm512_set1_epi32(x[t].less[0]), _mm512_set1_epi32(x[t].less[1]));
            dot[t] = _mm512_slli_epi32(dot[t], 7);
        }
    }
    add_groups<KIND, 0, T>(values, x, dot);
    add_groups<KIND, 4, T>(values, x, dot);
    __m512 scale, min = _mm512_setzero_ps();
    if (is_grouped(KIND)) {
        scale = _mm512_loadu_ps(super);
        min = _mm512_loadu_ps(super + ROWS * 4);
    } else if (super_bytes(KIND)) {
        scale = _mm512_mul_ps(halves_at(super), unsigned_at(block));
        min = _mm512_sub_ps(min, _mm512_mul_ps(halves_at(super + ROWS * 2), unsigned_at(block + ROWS)));
    } else {
        scale = halves_at(block);
        if (KIND == Q4) min = _mm512_mul_ps(scale, _mm512_set1_ps(-8));
        if (KIND == Q5) min = _mm512_mul_ps(scale, _mm512_set1_ps(-16));
        if (KIND == Q4M || KIND == Q5M) min = halves_at(block + ROWS * 2);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        out[t] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(x[t].d)), _mm512_cvtepi32_ps(dot[t]), out[t]);
        if (KIND != Q8) out[t] = _mm512_fmadd_ps(min, _mm512_set1_ps(x[t].sum), out[t]);
    }
}

// Rows of one panel and T tokens.
template <int KIND, int T>
void multiply_panel(const Product& product, int64_t panel, int64_t token) {
    const int64_t columns = product.x.columns, blocks = columns / BLOCK;
    const int64_t each = super_blocks(KIND, product.group);
    const Rounded* x = product.x.at(token);
    const int64_t width = product.x.width(token);
    __m512 out[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) out[t] = _mm512_setzero_ps();
    const uint8_t* at = product.panels + panel * panel_bytes(KIND, columns, product.group);
    const uint8_t* super = at;
    int64_t remaining = 0;  // blocks behind `super`
    for (int64_t block = 0; block < blocks; ++block, at += block_bytes(KIND), x += width) {
        if (super_bytes(KIND) && remaining-- == 0) {
            super = at;
            at += super_bytes(KIND);
            remaining = each - 1;
        }
        add_block<KIND, T>(super, at, x, out);
    }
    const int64_t row = panel * ROWS, left = product.rows - row;
    const __mmask16 rows = static_cast<__mmask16>(left >= ROWS ? 0xffff : (1 << left) - 1);
    const __m512 bias = product.bias ? _mm512_maskz_loadu_ps(rows, product.bias + row) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        _mm512_mask_storeu_ps(product.out + (token + t) * product.out_stride + row, rows, _mm512_add_ps(out[t], bias));
    }
}

template <int KIND>
void multiply(const Product& product, int64_t first, int64_t last) {
    const int64_t part = tokens_of_part(product);
    for (int64_t begin = 0; begin < product.x.num_tokens; begin += part) {
        const int64_t end = std::min(begin + part, product.x.num_tokens);
        for (int64_t panel = first; panel < last; ++panel) {
            int64_t token = begin;
            for (; token + 8 <= end; token += 8) multiply_panel<KIND, 8>(product, panel, token);
            if (token + 4 <= end) multiply_panel<KIND, 4>(product, panel, token), token += 4;
            if (end - token == 3) multiply_panel<KIND, 3>(product, panel, token);
            if (end - token == 2) multiply_panel<KIND, 2>(product, panel, token);
            if (end - token == 1) multiply_panel<KIND, 1>(product, panel, token);
        }
    }
}

}  // namespace
}  // namespace pagewire
