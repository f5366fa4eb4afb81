// Eight or sixteen floats as one value: the compiler makes of them what the instruction set has.
#pragma once

#include <cstdint>
#include <cstring>

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
