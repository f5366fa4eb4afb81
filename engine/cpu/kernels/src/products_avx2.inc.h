// Products with AVX2, FMA and, where the file that includes this is compiled for it, AVX-VNNI. Eight rows are one vector:
// a lane is a row, its four bytes are columns.
#pragma once

#include <algorithm>

#include <immintrin.h>

#include "pagewire.h"

namespace pagewire {
namespace {

inline __m256i bytes_at(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

inline __m256 halves_at(const uint8_t* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

inline __m256 unsigned_at(const uint8_t* at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
}

inline __m256 signed_at(const uint8_t* at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
}

inline float largest(__m256 value) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline int total(__m256i eight) {
    __m128i value = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    value = _mm_add_epi32(value, _mm_shuffle_epi32(value, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(value, _mm_shuffle_epi32(value, 0xb1)));
}

void quantize(const Product& product, int64_t first, int64_t last) {
    const Tokens& x = product.x;
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t token = first; token < last; ++token) {
        const float* from = product.numbers + token * product.numbers_stride;
        Rounded* to = x.at(token);
        const int64_t width = x.width(token);
        for (int64_t block = 0; block < x.columns / BLOCK; ++block, from += BLOCK, to += width) {
            __m256 part[4];
            __m256 most = _mm256_setzero_ps();
            for (int i = 0; i < 4; ++i) {
                part[i] = _mm256_loadu_ps(from + 8 * i);
                most = _mm256_max_ps(most, _mm256_andnot_ps(sign, part[i]));
            }
            const float highest = largest(most), inverse = highest > 0 ? 127 / highest : 0;
            __m256i whole[4];
            for (int i = 0; i < 4; ++i) {
                whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(part[i], _mm256_set1_ps(inverse)));
            }
            const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]),
                                                      _mm256_packs_epi32(whole[2], whole[3]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to->q), _mm256_permutevar8x32_epi32(packed, order));
            const int one = total(_mm256_add_epi32(whole[0], whole[1])), two = total(_mm256_add_epi32(whole[2], whole[3]));
            to->d = highest / 127;
            to->sum = to->d * static_cast<float>(one + two);
            to->less[0] = -one;
            to->less[1] = -two;
        }
    }
}

constexpr bool has_fifth(int kind) { return kind == Q5 || kind == Q5M || kind == Q5K || kind == Q6K; }

// Eight rows' values of a block, unpacked a group of four columns at a time.
template <int KIND>
struct Values {
    const uint8_t* at;
    __m256i fifth, sixth;

    explicit Values(const uint8_t* values) : at(values) {
        if (has_fifth(KIND)) fifth = bytes_at(at + ROWS * 16);
        if (KIND == Q6K) sixth = bytes_at(at + ROWS * 20);
    }

    template <int GROUP>
    __m256i group() const {
        const __m256i nibble = _mm256_set1_epi8(15);
        __m256i value = bytes_at(at + GROUP % 4 * ROWS * 4);
        value = _mm256_and_si256(GROUP < 4 ? value : _mm256_srli_epi16(value, 4), nibble);
        if (has_fifth(KIND)) value = _mm256_or_si256(value, bit<GROUP, 4>(fifth));
        if (KIND == Q6K) value = _mm256_or_si256(value, bit<GROUP, 5>(sixth));
        return value;
    }

    // Bit GROUP of each byte moved to bit TO.
    template <int GROUP, int TO>
    static __m256i bit(__m256i plane) {
        constexpr int left = TO > GROUP ? TO - GROUP : 0, right = GROUP > TO ? GROUP - TO : 0;
        return _mm256_and_si256(_mm256_srli_epi16(_mm256_slli_epi16(plane, left), right),
                                _mm256_set1_epi8(1 << TO));
    }
};

inline __m256i four_columns(const int8_t* q) {
    int32_t four;
    memcpy(&four, q, 4);
    return _mm256_set1_epi32(four);
}

inline __m256i pairs_added(__m256i sixteens) { return _mm256_madd_epi16(sixteens, _mm256_set1_epi16(1)); }

#if defined(__AVXVNNI__)
// Dot products of eight rows with columns of a block, in int32: the first and the second sixteen columns of Q6K, or all.
template <int KIND, int T>
inline void dots(const uint8_t* values, const Rounded* x, __m256i (&out)[T][2]) {
    auto add = [&](__m256i weight, int group) {
        for (int t = 0; t < T; ++t) {
            __m256i& sum = out[t][KIND == Q6K ? group / 4 : 0];
            sum = _mm256_dpbusd_avx_epi32(sum, weight, four_columns(x[t].q + 4 * group));
        }
    };
    for (int t = 0; t < T; ++t) out[t][0] = out[t][1] = _mm256_setzero_si256();
    if (is_signed(KIND)) {  // the weights need no sign when 128 is added to them
        for (int t = 0; t < T; ++t) out[t][0] = _mm256_set1_epi32((x[t].less[0] + x[t].less[1]) * 128);
#pragma GCC unroll 8
        for (int group = 0; group < GROUPS; ++group) {
            add(_mm256_xor_si256(bytes_at(values + group * ROWS * 4), _mm256_set1_epi8(-128)), group);
        }
        return;
    }
    // In the order in which two groups share a vector's bytes, which then need no register for long.
    const Values<KIND> unpacked(values);
    add(unpacked.template group<0>(), 0);
    add(unpacked.template group<4>(), 4);
    add(unpacked.template group<1>(), 1);
    add(unpacked.template group<5>(), 5);
    add(unpacked.template group<2>(), 2);
    add(unpacked.template group<6>(), 6);
    add(unpacked.template group<3>(), 3);
    add(unpacked.template group<7>(), 7);
}
#else
// Dot products of eight rows with columns of a block, in int32: the first and the second sixteen columns of Q6K, or all.
template <int KIND, int T>
inline void dots(const uint8_t* values, const Rounded* x, __m256i (&out)[T][2]) {
    if (is_signed(KIND)) {
        for (int t = 0; t < T; ++t) out[t][0] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int group = 0; group < GROUPS; ++group) {
            __m256i weight = bytes_at(values + group * ROWS * 4), size = _mm256_abs_epi8(weight);
            for (int t = 0; t < T; ++t) {
                const __m256i four = _mm256_sign_epi8(four_columns(x[t].q + 4 * group), weight);
                out[t][0] = _mm256_add_epi32(out[t][0], pairs_added(_mm256_maddubs_epi16(size, four)));
                asm("" : "+x"(out[t][0]));
            }
        }
        return;
    }
    const Values<KIND> unpacked(values);
    __m256i sixteens[T];
    // A sum of four products of 4 bits and 8 is at most 7,620, of 5 bits 15,748, of 6 bits 32,004.
    auto add = [&](__m256i weight, int group, bool begins) {
        for (int t = 0; t < T; ++t) {
            __m256i product = _mm256_maddubs_epi16(weight, four_columns(x[t].q + 4 * group));
            sixteens[t] = begins ? product : _mm256_add_epi16(sixteens[t], product);
            // Or the compiler adds them in an order for which it has too few registers.
            asm("" : "+x"(sixteens[t]));
        }
    };
    auto widen = [&](int half, bool begins) {
        for (int t = 0; t < T; ++t) {
            __m256i wide = pairs_added(sixteens[t]);
            out[t][half] = begins ? wide : _mm256_add_epi32(out[t][half], wide);
        }
    };
    if constexpr (KIND == Q6K) {
        add(unpacked.template group<0>(), 0, true);
        add(unpacked.template group<1>(), 1, false);
        widen(0, true);
        add(unpacked.template group<2>(), 2, true);
        add(unpacked.template group<3>(), 3, false);
        widen(0, false);
        add(unpacked.template group<4>(), 4, true);
        add(unpacked.template group<5>(), 5, false);
        widen(1, true);
        add(unpacked.template group<6>(), 6, true);
        add(unpacked.template group<7>(), 7, false);
        widen(1, false);
        return;
    }
    // In the order in which two groups share a vector's bytes, which then need no register for long.
    constexpr bool narrow = KIND == Q4 || KIND == Q4M || KIND == Q4K || KIND == I4;
    add(unpacked.template group<0>(), 0, true);
    add(unpacked.template group<4>(), 4, false);
    add(unpacked.template group<1>(), 1, false);
    add(unpacked.template group<5>(), 5, false);
    if (!narrow) widen(0, true);
    add(unpacked.template group<2>(), 2, !narrow);
    add(unpacked.template group<6>(), 6, false);
    add(unpacked.template group<3>(), 3, false);
    add(unpacked.template group<7>(), 7, false);
    widen(0, narrow);
}
#endif

// Adds a block's share to eight rows' sums.
template <int KIND, int T>
inline void add_block(const uint8_t* super, const uint8_t* block, int half, const Rounded* x, __m256 (&out)[T]) {
    __m256i dot[T][2];
    const uint8_t* values = block + scale_bytes(KIND) + half * 32;
    dots<KIND, T>(values, x, dot);
    const int rows = half * 8;
    if (KIND == Q6K) {
        __m256 scale = halves_at(super + rows * 2);
        __m256 first = _mm256_mul_ps(scale, signed_at(block + rows));
        __m256 second = _mm256_mul_ps(scale, signed_at(block + ROWS + rows));
        for (int t = 0; t < T; ++t) {
            const __m256 d = _mm256_set1_ps(x[t].d);
            const __m256i offset[2] = {_mm256_set1_epi32(x[t].less[0] * 32), _mm256_set1_epi32(x[t].less[1] * 32)};
            __m256 one = _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_add_epi32(dot[t][0], offset[0])));
            __m256 two = _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_add_epi32(dot[t][1], offset[1])));
            out[t] = _mm256_fmadd_ps(first, one, _mm256_fmadd_ps(second, two, out[t]));
        }
        return;
    }
    __m256 scale, min;
    if (is_grouped(KIND)) {
        const float* scales = reinterpret_cast<const float*>(super) + rows;
        scale = _mm256_loadu_ps(scales);
        min = _mm256_loadu_ps(scales + ROWS);
    } else if (super_bytes(KIND)) {
        scale = _mm256_mul_ps(halves_at(super + rows * 2), unsigned_at(block + rows));
        min = _mm256_mul_ps(halves_at(super + (ROWS + rows) * 2), unsigned_at(block + ROWS + rows));
        min = _mm256_sub_ps(_mm256_setzero_ps(), min);
    } else {
        scale = halves_at(block + rows * 2);
        if (KIND == Q4) min = _mm256_mul_ps(scale, _mm256_set1_ps(-8));
        if (KIND == Q5) min = _mm256_mul_ps(scale, _mm256_set1_ps(-16));
        if (KIND == Q4M || KIND == Q5M) min = halves_at(block + (ROWS + rows) * 2);
    }
    for (int t = 0; t < T; ++t) {
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x[t].d));
        out[t] = _mm256_fmadd_ps(both, _mm256_cvtepi32_ps(dot[t][0]), out[t]);
        if (KIND != Q8) out[t] = _mm256_fmadd_ps(min, _mm256_set1_ps(x[t].sum), out[t]);
    }
}

// Rows of one panel and T tokens. One token walks both halves of the panel together, since memory is what it waits
// for; several walk one after the other, since registers are.
template <int KIND, int T>
void multiply_panel(const Product& product, int64_t panel, int64_t token) {
    constexpr int PASSES = T == 1 ? 1 : 2, HALVES = 2 / PASSES;
    const int64_t columns = product.x.columns, blocks = columns / BLOCK;
    const int64_t each = super_blocks(KIND, product.group);
    for (int pass = 0; pass < PASSES; ++pass) {
        __m256 out[HALVES][T];
        for (int half = 0; half < HALVES; ++half) {
            for (int t = 0; t < T; ++t) out[half][t] = _mm256_setzero_ps();
        }
        const Rounded* x = product.x.at(token);
        const int64_t width = product.x.width(token);
        const uint8_t* at = product.panels + panel * panel_bytes(KIND, columns, product.group);
        const uint8_t* super = at;
        int64_t remaining = 0;  // blocks behind `super`
        for (int64_t block = 0; block < blocks; ++block, at += block_bytes(KIND), x += width) {
            if (super_bytes(KIND) && remaining-- == 0) {
                super = at;
                at += super_bytes(KIND);
                remaining = each - 1;
            }
            for (int half = 0; half < HALVES; ++half) {
                add_block<KIND, T>(super, at, pass + half, x, out[half]);
            }
        }
        for (int half = 0; half < HALVES; ++half) {
            int64_t row = panel * ROWS + (pass + half) * 8, left = product.rows - row;
            for (int t = 0; t < T; ++t) {
                float* to = product.out + (token + t) * product.out_stride + row;
                if (left >= 8) {
                    __m256 value = out[half][t];
                    if (product.bias) value = _mm256_add_ps(value, _mm256_loadu_ps(product.bias + row));
                    _mm256_storeu_ps(to, value);
                } else {
                    float values[8];
                    _mm256_storeu_ps(values, out[half][t]);
                    for (int64_t i = 0; i < left; ++i) to[i] = values[i] + (product.bias ? product.bias[row + i] : 0);
                }
            }
        }
    }
}

template <int KIND>
void multiply(const Product& product, int64_t first, int64_t last) {
    const int64_t part = tokens_of_part(product);
    for (int64_t begin = 0; begin < product.x.num_tokens; begin += part) {
        const int64_t end = std::min(begin + part, product.x.num_tokens);
        for (int64_t panel = first; panel < last; ++panel) {
            int64_t token = begin;
            for (; token + 4 <= end; token += 4) multiply_panel<KIND, 4>(product, panel, token);
            if (end - token == 3) multiply_panel<KIND, 3>(product, panel, token);
            if (end - token == 2) multiply_panel<KIND, 2>(product, panel, token);
            if (end - token == 1) multiply_panel<KIND, 1>(product, panel, token);
        }
    }
}

}  // namespace
}  // namespace pagewire
