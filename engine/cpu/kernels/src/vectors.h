// Eight or sixteen floats as one value: the compiler makes of them what the instruction set has.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace pagewire {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* at) {
    Vector value;
    memcpy(&value, at, sizeof value);
    return value;
}

inline void store(float* at, Vector value) { memcpy(at, &value, sizeof value); }

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

// The sums of eight vectors.
inline void sums_of_eight(const Vector* values, float* out) {
#if defined(__AVX__)
    __m256 halves[8];
    for (int i = 0; i < 8; ++i) {
#if defined(__AVX512F__)
        const __m512 whole = reinterpret_cast<__m512>(values[i]);
        halves[i] = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
        halves[i] = reinterpret_cast<__m256>(values[i]);
#endif
    }
    for (int i = 0; i < 8; i += 2) halves[i] = _mm256_hadd_ps(halves[i], halves[i + 1]);
    const __m256 first = _mm256_hadd_ps(halves[0], halves[2]), second = _mm256_hadd_ps(halves[4], halves[6]);
    const __m256 low = _mm256_permute2f128_ps(first, second, 0x20), high = _mm256_permute2f128_ps(first, second, 0x31);
    _mm256_storeu_ps(out, _mm256_add_ps(low, high));
#else
    for (int i = 0; i < 8; ++i) out[i] = sum(values[i]);
#endif
}

inline Vector select(Whole condition, Vector yes, Vector no) {
    return reinterpret_cast<Vector>((reinterpret_cast<Whole>(yes) & condition) |
                                    (reinterpret_cast<Whole>(no) & ~condition));
}

inline Vector larger(Vector a, Vector b) { return select(a > b, a, b); }

// e to the power of x, to 2 units in the last place (the polynomial is Cephes'); 0 far below, and NaN for NaN.
inline Vector exponential(Vector x) {
    const Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    Vector clamped = select(x < all(-87.0f), all(-87.0f), select(x > all(88.0f), all(88.0f), x));
    Vector shifted = clamped * all(1.44269504088896341f) + magic;
    Vector power = shifted - magic;
    Vector rest = clamped - power * all(0.693359375f) + power * all(2.12194440e-4f);
    Vector series = all(1.9875691500e-4f);
    for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        series = series * rest + all(factor);
    }
    Vector value = series * rest * rest + rest + all(1.0f);
    Whole exponent = __builtin_convertvector(power, Whole) << 23;
    value = reinterpret_cast<Vector>(reinterpret_cast<Whole>(value) + exponent);
    return select(x < all(-87.0f), all(0.0f), value);
}

}  // namespace
}  // namespace pagewire
