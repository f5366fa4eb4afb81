// Products in plain C++: for processors without kernels of their own, and what the others are compared with.
#include <cmath>

#include "pagewire.h"

namespace pagewire {
namespace {

void quantize(const Product& product, int64_t first, int64_t last) {
    const Tokens& x = product.x;
    for (int64_t token = first; token < last; ++token) {
        const float* from = product.numbers + token * product.numbers_stride;
        Rounded* to = x.at(token);
        for (int64_t block = 0; block < x.columns / BLOCK; ++block, from += BLOCK, to += x.width(token)) {
            float most = 0;
            for (int i = 0; i < BLOCK; ++i) most = std::fmax(most, std::fabs(from[i]));
            const float inverse = most > 0 ? 127 / most : 0;
            int totals[2] = {0, 0};
            for (int i = 0; i < BLOCK; ++i) {
                to->q[i] = static_cast<int8_t>(std::nearbyint(from[i] * inverse));
                totals[i / 16] += to->q[i];
            }
            to->d = most / 127;
            to->sum = to->d * static_cast<float>(totals[0] + totals[1]);
            to->less[0] = -totals[0];
            to->less[1] = -totals[1];
        }
    }
}

template <int KIND>
int weight(const uint8_t* values, int row, int column) {
    int group = column / 4, byte = row * 4 + column % 4;
    if (is_signed(KIND)) return static_cast<int8_t>(values[group * ROWS * 4 + byte]);
    uint8_t pair = values[group % 4 * ROWS * 4 + byte];
    int value = group < 4 ? pair & 15 : pair >> 4;
    if (KIND == Q5 || KIND == Q5M || KIND == Q5K || KIND == Q6K) {
        value |= (values[ROWS * 16 + byte] >> group & 1) << 4;
    }
    if (KIND == Q6K) value |= (values[ROWS * 20 + byte] >> group & 1) << 5;
    return value;
}

// One of a group's scales, behind which its minima lie.
float group_scale(const uint8_t* super, int index) {
    float scale;
    memcpy(&scale, super + index * 4, 4);
    return scale;
}

template <int KIND>
void multiply(const Product& product, int64_t first, int64_t last) {
    int64_t columns = product.x.columns, blocks = columns / BLOCK;
    const int64_t each = super_blocks(KIND, product.group), stride = panel_bytes(KIND, columns, product.group);
    for (int64_t panel = first; panel < last; ++panel) {
        for (int64_t token = 0; token < product.x.num_tokens; ++token) {
            float out[ROWS] = {};
            const uint8_t* at = product.panels + panel * stride;
            const uint8_t* super = at;
            const Rounded* x = product.x.at(token);
            for (int64_t block = 0; block < blocks; ++block, at += block_bytes(KIND), x += product.x.width(token)) {
                if (super_bytes(KIND) && block % each == 0) {
                    super = at;
                    at += super_bytes(KIND);
                }
                const uint8_t* values = at + scale_bytes(KIND);
                for (int row = 0; row < ROWS; ++row) {
                    int dots[2] = {0, 0};
                    for (int column = 0; column < BLOCK; ++column) {
                        dots[column / 16] += weight<KIND>(values, row, column) * x->q[column];
                    }
                    float whole = x->d * static_cast<float>(dots[0] + dots[1]), sum = x->sum;
                    if (is_grouped(KIND)) {
                        out[row] += group_scale(super, row) * whole + group_scale(super, ROWS + row) * sum;
                        continue;
                    }
                    float scale = half_to_float((super_bytes(KIND) ? super : at) + row * 2);
                    if (KIND == Q4) {
                        out[row] += scale * (whole - 8 * sum);
                    } else if (KIND == Q5) {
                        out[row] += scale * (whole - 16 * sum);
                    } else if (KIND == Q8) {
                        out[row] += scale * whole;
                    } else if (KIND == Q4M || KIND == Q5M) {
                        out[row] += scale * whole + half_to_float(at + (ROWS + row) * 2) * sum;
                    } else if (KIND == Q4K || KIND == Q5K) {
                        float min = half_to_float(super + (ROWS + row) * 2) * static_cast<float>(at[ROWS + row]);
                        out[row] += scale * static_cast<float>(at[row]) * whole - min * sum;
                    } else {
                        for (int half = 0; half < 2; ++half) {
                            float own = scale * static_cast<float>(static_cast<int8_t>(at[half * ROWS + row]));
                            out[row] += own * x->d * static_cast<float>(dots[half] + 32 * x->less[half]);
                        }
                    }
                }
            }
            for (int row = 0; row < ROWS && panel * ROWS + row < product.rows; ++row) {
                int64_t index = panel * ROWS + row;
                float bias = product.bias ? product.bias[index] : 0;
                product.out[token * product.out_stride + index] = out[row] + bias;
            }
        }
    }
}

template <int KIND>
void unpack(const uint8_t* at, int row, int64_t columns, int64_t group, float* out) {
    const uint8_t* super = at;
    const int64_t each = super_blocks(KIND, group);
    for (int64_t block = 0; block < columns / BLOCK; ++block, at += block_bytes(KIND)) {
        if (super_bytes(KIND) && block % each == 0) {
            super = at;
            at += super_bytes(KIND);
        }
        const uint8_t* values = at + scale_bytes(KIND);
        const float d = is_grouped(KIND)    ? group_scale(super, row)
                        : super_bytes(KIND) ? half_to_float(super + row * 2)
                                            : half_to_float(at + row * 2);
        for (int column = 0; column < BLOCK; ++column) {
            float scale = d, min = 0;
            if (is_grouped(KIND)) min = group_scale(super, ROWS + row);
            if (KIND == Q4) min = -8 * d;
            if (KIND == Q5) min = -16 * d;
            if (KIND == Q4M || KIND == Q5M) min = half_to_float(at + (ROWS + row) * 2);
            if (KIND == Q4K || KIND == Q5K) {
                scale = d * static_cast<float>(at[row]);
                min = -half_to_float(super + (ROWS + row) * 2) * static_cast<float>(at[ROWS + row]);
            }
            if (KIND == Q6K) {
                scale = d * static_cast<float>(static_cast<int8_t>(at[column / 16 * ROWS + row]));
                min = -32 * scale;
            }
            *out++ = scale * static_cast<float>(weight<KIND>(values, row, column)) + min;
        }
    }
}

void unpack_bf16(const uint8_t* at, int row, int64_t columns, int64_t, float* out) {
    for (int64_t column = 0; column < columns; ++column) {
        uint16_t upper;
        memcpy(&upper, at + (column / 2 * ROWS + row) * 4 + column % 2 * 2, 2);
        uint32_t bits = static_cast<uint32_t>(upper) << 16;
        memcpy(out + column, &bits, 4);
    }
}

void unpack_f16(const uint8_t* at, int row, int64_t columns, int64_t, float* out) {
    for (int64_t column = 0; column < columns; ++column) out[column] = half_to_float(at + (column * ROWS + row) * 2);
}

}  // namespace

void unpack_row(int kind, const uint8_t* panel, int row, int64_t columns, int64_t group, float* out) {
    static constexpr decltype(&unpack<Q4>) unpackers[NUM_KINDS] = {
        unpack<Q4>,  unpack<Q4M>, unpack<Q5>,  unpack<Q5M>, unpack<Q8>,
        unpack<Q4K>, unpack<Q5K>, unpack<Q6K>, unpack_bf16, unpack_f16,
        unpack<I4>,  unpack<I8>,
    };
    unpackers[kind](panel, row, columns, group, out);
}

const Instructions& plain_instructions() {
    static const Instructions instructions = {
        "plain",
        quantize,
        {multiply<Q4>, multiply<Q4M>, multiply<Q5>, multiply<Q5M>, multiply<Q8>, multiply<Q4K>, multiply<Q5K>,
         multiply<Q6K>, plain_matrices().bf16, plain_matrices().f16,
         multiply<I4>, multiply<I8>},
        plain_layers(),
    };
    return instructions;
}

}  // namespace pagewire
