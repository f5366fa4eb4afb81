// Eight or sixteen floats as one value: the compiler makes of them what the instruction set has.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pagewire {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));
#if defined(__AVX512F__)
constexpr int LANES = 16;
typedef float Vector __attribute__((vector_size(64)));
#else
constexpr int LANES = 8;
typedef Eight Vector;
#endif
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));

template <class V = Vector>
inline V load(const float* at) {
    V value;
    memcpy(&value, at, sizeof value);
    return value;
}

inline void store(float* at, Vector value) { memcpy(at, &value, sizeof value); }

// a * b + c, rounded once where the processor can. Compilers are told not to make it of a product and a sum by
// themselves: two kernels that are to give the same bits might come out differently.
inline Eight fused(Eight a, Eight b, Eight c) {
#if defined(__FMA__)
    return reinterpret_cast<Eight>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                                   reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
    float32x4_t halves[3][2];
    memcpy(halves[0], &a, sizeof a);
    memcpy(halves[1], &b, sizeof b);
    memcpy(halves[2], &c, sizeof c);
    for (int i = 0; i < 2; ++i) halves[2][i] = vfmaq_f32(halves[2][i], halves[0][i], halves[1][i]);
    memcpy(&c, halves[2], sizeof c);
    return c;
#else
    return a * b + c;
#endif
}

#if defined(__AVX512F__)
inline Vector fused(Vector a, Vector b, Vector c) {
    return reinterpret_cast<Vector>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                    reinterpret_cast<__m512>(c)));
}
#endif

inline Vector all(float value) {
#if defined(__AVX512F__)
    return Vector{value, value, value, value, value, value, value, value,
                  value, value, value, value, value, value, value, value};
#else
    return Vector{value, value, value, value, value, value, value, value};
#endif
}

inline float sum(Vector value) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += value[lane];
    return total;
}

// The sums of eight vectors, each from its first number to its last.
inline void sums_of_eight(const Eight* values, float* out) {
#if defined(__AVX__)
    __m256 pairs[8], fours[8];  // what neighbours have in the same two lanes, and what four have in one
    for (int i = 0; i < 8; i += 2) {
        const __m256 one = reinterpret_cast<__m256>(values[i]), two = reinterpret_cast<__m256>(values[i + 1]);
        pairs[i] = _mm256_unpacklo_ps(one, two);
        pairs[i + 1] = _mm256_unpackhi_ps(one, two);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int part = 0; part < 2; ++part) {
            const __m256 one = pairs[i + part], two = pairs[i + part + 2];
            fours[i + 2 * part] = _mm256_shuffle_ps(one, two, 0x44);
            fours[i + 2 * part + 1] = _mm256_shuffle_ps(one, two, 0xee);
        }
    }
    __m256 total = _mm256_permute2f128_ps(fours[0], fours[4], 0x20);
    for (int i = 1; i < 4; ++i) total = _mm256_add_ps(total, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    for (int i = 0; i < 4; ++i) total = _mm256_add_ps(total, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
    _mm256_storeu_ps(out, total);
#else
    for (int i = 0; i < 8; ++i) {
        out[i] = values[i][0];
        for (int lane = 1; lane < 8; ++lane) out[i] += values[i][lane];
    }
#endif
}

inline Vector select(Whole condition, Vector yes, Vector no) {
    return reinterpret_cast<Vector>((reinterpret_cast<Whole>(yes) & condition) |
                                    (reinterpret_cast<Whole>(no) & ~condition));
}

// `b` where one of them is no number.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
    return reinterpret_cast<Vector>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return select(a > b, a, b);
#endif
}

// e to the power of x from -87 to 88, to 2 units in the last place (the polynomial is Cephes').
inline Vector exponential_within(Vector x) {
    const Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    Vector power = fused(x, all(1.44269504088896341f), magic) - magic;
    Vector rest = fused(power, all(2.12194440e-4f), fused(power, all(-0.693359375f), x));
    Vector series = all(1.9875691500e-4f);
    for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        series = fused(series, rest, all(factor));
    }
    Vector value = fused(series * rest, rest, rest) + all(1.0f);
    Whole exponent = __builtin_convertvector(power, Whole) << 23;
    return reinterpret_cast<Vector>(reinterpret_cast<Whole>(value) + exponent);
}

// e to the power of x; 0 far below, and NaN for NaN.
inline Vector exponential(Vector x) {
    const Vector clamped = select(x < all(-87.0f), all(-87.0f), select(x > all(88.0f), all(88.0f), x));
    return select(x < all(-87.0f), all(0.0f), exponential_within(clamped));
}

// The same of a number that is not above 0.
inline Vector decay(Vector x) {
    const Vector value = exponential_within(larger(all(-87.0f), x));
    return reinterpret_cast<Vector>(reinterpret_cast<Whole>(value) & ~(x < all(-87.0f)));
}

}  // namespace
}  // namespace pagewire
