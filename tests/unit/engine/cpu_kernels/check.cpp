// The kernels against their definitions, without Python: for processors that are only emulated. Prints what fails, and
// ends with 1 then.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "blocks.h"
#include "library.h"

extern "C" {
PagewireLibrary* pagewire_open(int threads, const char* instructions);
void pagewire_close(PagewireLibrary* library);
const char* pagewire_instructions(PagewireLibrary* library);
int64_t pagewire_packed_bytes(int kind, int64_t rows, int64_t columns, int64_t group);
void pagewire_pack(PagewireLibrary* library, int kind, const uint8_t* source, int64_t rows, int64_t columns,
                   uint8_t* panels);
void pagewire_pack_groups(PagewireLibrary* library, int kind, const uint8_t* codes, const float* scales,
                          const float* minima, int64_t rows, int64_t columns, int64_t group, uint8_t* panels);
}

using namespace pagewire;
using Floats = std::vector<float>;

namespace {

std::mt19937 generator(0);
int failures = 0;

Floats normal(int64_t count) {
    std::normal_distribution<float> distribution;
    Floats out(static_cast<size_t>(count));
    for (float& each : out) each = distribution(generator);
    return out;
}

void expect(bool right, const char* what, int detail) {
    if (right) return;
    printf("failed: %s (%d)\n", what, detail);
    ++failures;
}

// Each 32 numbers as multiples of the largest over 127.
Floats rounded(const Floats& x) {
    Floats out(x);
    for (size_t at = 0; at < x.size(); at += BLOCK) {
        float most = 0;
        for (int i = 0; i < BLOCK; ++i) most = std::fmax(most, std::fabs(x[at + i]));
        for (int i = 0; i < BLOCK; ++i) out[at + i] = std::nearbyint(x[at + i] * (127 / most)) * (most / 127);
    }
    return out;
}

struct Matrix {
    int kind;
    int64_t rows, columns, group;
    std::vector<uint8_t> panels;
};

Matrix random_matrix(PagewireLibrary* library, int kind, int64_t rows, int64_t columns) {
    const int64_t group = is_grouped(kind) ? 3 : 0, groups = group ? (columns / BLOCK + group - 1) / group : 0;
    Matrix matrix = {kind, rows, columns, group, {}};
    matrix.panels.resize(static_cast<size_t>(pagewire_packed_bytes(kind, rows, columns, group)));
    const int64_t size = group ? columns : columns / unit_columns(kind) * file_bytes(kind);
    std::vector<uint8_t> source(static_cast<size_t>(rows * size));
    for (uint8_t& each : source) each = static_cast<uint8_t>(generator());
    if (group) {
        if (kind == I4) for (uint8_t& each : source) each &= 15;
        const Floats scales = normal(rows * groups), minima = normal(rows * groups);
        pagewire_pack_groups(library, kind, source.data(), scales.data(), minima.data(), rows, columns, group,
                             matrix.panels.data());
        return matrix;
    }
    // Scales in half precision, near 0.01; the same of numbers in 16 bits.
    const int unit = is_16_bit(kind) ? 2 : file_bytes(kind);
    for (size_t at = 0; at < source.size(); at += static_cast<size_t>(unit)) {
        const uint16_t scale = static_cast<uint16_t>(0x2100 + generator() % 256);
        memcpy(&source[at + (kind == Q6K ? 208 : 0)], &scale, 2);
        if (kind == Q4M || kind == Q5M || kind == Q4K || kind == Q5K) memcpy(&source[at + 2], &scale, 2);
    }
    pagewire_pack(library, kind, source.data(), rows, columns, matrix.panels.data());
    return matrix;
}

void check_products(PagewireLibrary* library, int kind) {
    const int64_t rows = 37, columns = 512, tokens = 9;
    const Matrix matrix = random_matrix(library, kind, rows, columns);
    const Floats x = normal(tokens * columns), seen = is_16_bit(kind) ? x : rounded(x), bias = normal(rows);
    std::vector<int64_t> ids(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; ++row) ids[static_cast<size_t>(row)] = row;
    Floats weights(static_cast<size_t>(rows * columns)), out(static_cast<size_t>(tokens * rows)), alone(out);
    pagewire_embed(library, kind, matrix.panels.data(), columns, matrix.group, ids.data(), rows, weights.data());
    pagewire_multiply(library, kind, matrix.panels.data(), rows, columns, matrix.group, x.data(), columns, tokens,
                      bias.data(), out.data(), rows);
    for (int64_t token = 0; token < tokens; ++token) {
        pagewire_multiply(library, kind, matrix.panels.data(), rows, columns, matrix.group, x.data() + token * columns,
                          columns, 1, bias.data(), alone.data() + token * rows, rows);
    }
    expect(out == alone, "a token alone", kind);
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t row = 0; row < rows; ++row) {
            double sum = bias[static_cast<size_t>(row)], size = 1;
            for (int64_t column = 0; column < columns; ++column) {
                const double part = double(weights[static_cast<size_t>(row * columns + column)]) *
                                    seen[static_cast<size_t>(token * columns + column)];
                sum += part;
                size += std::fabs(part);
            }
            expect(std::fabs(sum - out[static_cast<size_t>(token * rows + row)]) < 1e-5 * size, "a product", kind);
        }
    }
}

// Chunks of several requests beside each token alone, and beside the definition.
void check_attention(PagewireLibrary* library, int64_t dim) {
    const int64_t heads = 6, kv_heads = 2, block_size = 16, length = 300, count = 11;
    const int64_t slot = kv_heads * dim, blocks = (length + block_size - 1) / block_size;
    const Floats query = normal(count * heads * dim), key = normal(blocks * block_size * slot);
    const Floats value = normal(blocks * block_size * slot);
    std::vector<int64_t> table(static_cast<size_t>(blocks));
    for (int64_t block = 0; block < blocks; ++block) table[static_cast<size_t>(block)] = (block * 7) % blocks;
    auto attend = [&](int64_t first, int64_t tokens) {
        Floats out(static_cast<size_t>(tokens * heads * dim));
        const int64_t seen = length - count + first + tokens;
        Attending job = {query.data() + first * heads * dim, key.data(), value.data(), out.data(), &tokens, &seen,
                         table.data(), nullptr, nullptr, 1, heads, kv_heads, dim, blocks, block_size,
                         block_size * slot, slot, dim, 0, 0.3f, 0};
        pagewire_attend(library, &job);
        return out;
    };
    const Floats together = attend(0, count);
    for (int64_t token = 0; token < count; ++token) {
        const Floats alone = attend(token, 1);
        expect(!memcmp(alone.data(), together.data() + token * heads * dim, alone.size() * sizeof(float)),
               "a token that attends alone", static_cast<int>(dim));
        for (int64_t head = 0; head < heads; ++head) {
            std::vector<double> sums(static_cast<size_t>(dim));
            double total = 0;
            for (int64_t at = 0; at <= length - count + token; ++at) {
                const int64_t place = (table[static_cast<size_t>(at / block_size)] * block_size + at % block_size) * slot +
                                      head / (heads / kv_heads) * dim;
                double score = 0;
                for (int64_t i = 0; i < dim; ++i) {
                    score += double(query[static_cast<size_t>((token * heads + head) * dim + i)]) *
                             key[static_cast<size_t>(place + i)];
                }
                const double weight = std::exp(score * 0.3);
                total += weight;
                for (int64_t i = 0; i < dim; ++i) sums[static_cast<size_t>(i)] += weight * value[static_cast<size_t>(place + i)];
            }
            for (int64_t i = 0; i < dim; ++i) {
                const double expected = sums[static_cast<size_t>(i)] / total;
                expect(std::fabs(expected - alone[static_cast<size_t>(head * dim + i)]) < 1e-4, "attention",
                       static_cast<int>(dim));
            }
        }
    }
}

void check_layers(PagewireLibrary* library) {
    const int64_t tokens = 5, size = 61;
    Floats residual = normal(tokens * size), weight = normal(size), out(residual);
    const Norm norm = {nullptr, residual.data(), weight.data(), out.data(), tokens, size, 0, 1e-5f};
    pagewire_norm(library, &norm);
    const Floats gate_up = normal(tokens * 2 * size);
    Floats gated(static_cast<size_t>(tokens * size));
    const Gating gate = {gate_up.data(), gated.data(), tokens, size, SILU};
    pagewire_gate(library, &gate);
    for (int64_t token = 0; token < tokens; ++token) {
        double squares = 0;
        for (int64_t i = 0; i < size; ++i) squares += std::pow(double(residual[static_cast<size_t>(token * size + i)]), 2);
        for (int64_t i = 0; i < size; ++i) {
            const auto at = static_cast<size_t>(token * size + i), of = static_cast<size_t>(token * 2 * size + i);
            const double expected = residual[at] / std::sqrt(squares / size + 1e-5) * weight[static_cast<size_t>(i)];
            expect(std::fabs(out[at] - expected) < 1e-5, "a norm", static_cast<int>(i));
            const double x = gate_up[of], gated_by = x / (1 + std::exp(-x)) * gate_up[of + size];
            expect(std::fabs(gated[at] - gated_by) < 1e-5, "a gate", static_cast<int>(i));
        }
    }
}

}  // namespace

int main() {
    for (int threads : {1, 3}) {
        PagewireLibrary* library = pagewire_open(threads, "");
        for (int kind = 0; kind < NUM_KINDS; ++kind) check_products(library, kind);
        for (int64_t dim : {64, 24, 18}) check_attention(library, dim);
        check_layers(library);
        printf("%s, %d threads: %d failures\n", pagewire_instructions(library), threads, failures);
        pagewire_close(library);
    }
    return failures != 0;
}
