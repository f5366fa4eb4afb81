// The kernels of layers.h. Included once for each instruction set, by a file that is compiled for it.
#include <algorithm>
#include <cmath>

#include "attention.inc.h"
#include "layers.h"
#include "vectors.h"

namespace pagewire {
namespace {

// Scales a row to a mean square of 1 and multiplies it with the weight.
void normalise(const float* x, const float* weight, int64_t size, float eps, float* out) {
    Vector squares = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares = fused(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < size; ++i) total += x[i] * x[i];
    float scale = 1 / std::sqrt(total / static_cast<float>(size) + eps);
    for (i = 0; i + LANES <= size; i += LANES) store(out + i, load(x + i) * all(scale) * load(weight + i));
    for (; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

void norm(const Norm& job, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
        float* residual = job.residual + token * job.size;
        if (job.x) {
            const float* x = job.x + token * job.x_stride;
            for (int64_t i = 0; i < job.size; ++i) residual[i] += x[i];
        }
        normalise(residual, job.weight, job.size, job.eps, job.out + token * job.size);
    }
}

Vector activate(Vector x, int32_t activation) {
    if (activation == SILU) return x / (all(1.0f) + exponential(-x));
    if (activation == GELU_TANH) {
        Vector inner = all(0.7978845608028654f) * (x + all(0.044715f) * x * x * x);
        return x - x / (exponential(inner + inner) + all(1.0f));
    }
    Vector out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = 0.5f * x[lane] * (1 + std::erf(x[lane] * 0.70710678f));
    return out;
}

void gate(const Gating& job, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
        const float *from = job.gate_up + token * 2 * job.size, *up = from + job.size;
        float* out = job.out + token * job.size;
        int64_t i = 0;
        for (; i + LANES <= job.size; i += LANES) store(out + i, activate(load(from + i), job.activation) * load(up + i));
        for (; i < job.size; ++i) out[i] = activate(all(from[i]), job.activation)[0] * up[i];
    }
}

Vector scale_vector(Vector x, const Scaling& job) {
    x *= all(job.factor);
    if (job.cap == 0) return x;
    return all(job.cap) * (all(1.0f) - all(2.0f) / (exponential(x * all(2 / job.cap)) + all(1.0f)));
}

void scale(const Scaling& job, int64_t first, int64_t last) {
    const int64_t end = last * job.size;
    int64_t i = first * job.size;
    for (; i + LANES <= end; i += LANES) store(job.out + i, scale_vector(load(job.x + i), job));
    for (; i < end; ++i) job.out[i] = scale_vector(all(job.x[i]), job)[0];
}

void turn(float* head, const float* angles, int64_t rotary_dim, bool interleaved) {
    int64_t pairs = rotary_dim / 2;
    const float *cos = angles, *sin = angles + pairs;
    if (interleaved) {
        for (int64_t i = 0; i < pairs; ++i) {
            float a = head[2 * i], b = head[2 * i + 1];
            head[2 * i] = a * cos[i] - b * sin[i];
            head[2 * i + 1] = b * cos[i] + a * sin[i];
        }
        return;
    }
    for (int64_t i = 0; i < pairs; ++i) {
        float a = head[i], b = head[i + pairs];
        head[i] = a * cos[i] - b * sin[i];
        head[i + pairs] = b * cos[i] + a * sin[i];
    }
}

void rotate(const Rotating& job, int64_t first, int64_t last) {
    const size_t bytes = static_cast<size_t>(job.dim) * sizeof(float);
    for (int64_t token = first; token < last; ++token) {
        float* head = job.qkv + token * (job.heads + 2 * job.kv_heads) * job.dim;
        const int64_t position = job.positions ? job.positions[token] : 0, slot = job.slots[token];
        const int64_t place = slot / job.block_size * job.block_stride + slot % job.block_size * job.slot_stride;
        for (int64_t index = 0; index < job.heads + job.kv_heads; ++index, head += job.dim) {
            const bool is_query = index < job.heads;
            if (job.q_norm) normalise(head, is_query ? job.q_norm : job.k_norm, job.dim, job.eps, head);
            if (job.angles) turn(head, job.angles + position * job.rotary_dim, job.rotary_dim, job.interleaved);
            if (!is_query) {
                memcpy(job.key + place + (index - job.heads) * job.head_stride, head, bytes);
                continue;
            }
            float* query = job.query + (token * job.heads + index) * job.dim;
            memcpy(query, head, bytes);
            if (job.query_scale) {
                for (int64_t i = 0; i < job.dim; ++i) query[i] *= job.query_scale[position];
            }
        }
        for (int64_t index = 0; index < job.kv_heads; ++index, head += job.dim) {
            memcpy(job.value + place + index * job.head_stride, head, bytes);
        }
    }
}

// The product of two rows in an order of its own: four sums of every fourth vector, then these in turn.
float product(const float* x, const float* y, int64_t size) {
    constexpr int64_t SUMS = 4;
    Vector sums[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS * LANES <= size; i += SUMS * LANES) {
        for (int64_t k = 0; k < SUMS; ++k) sums[k] = fused(load(x + i + k * LANES), load(y + i + k * LANES), sums[k]);
    }
    for (; i + LANES <= size; i += LANES) sums[0] = fused(load(x + i), load(y + i), sums[0]);
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < size; ++i) total += x[i] * y[i];
    return total;
}

// Pieces are the numbers of `shrunk`.
void shrink(const Adapting& job, int64_t first, int64_t last) {
    const int64_t each = job.parts * job.rank;
    for (int64_t piece = first; piece < last; ++piece) {
        const int64_t token = piece / each, slot = job.slots[token];
        if (slot < 0 || piece % job.rank >= job.ranks[slot]) continue;
        const float* a = job.a + (slot * each + piece % each) * job.columns;
        job.shrunk[piece] = product(job.x + token * job.x_stride, a, job.columns);
    }
}

// Pieces are the numbers of `out`.
void expand(const Adapting& job, int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last;) {
        const int64_t token = piece / job.rows, slot = job.slots[token];
        const int64_t end = std::min(last, (token + 1) * job.rows);
        int64_t part = 0, part_end = job.sizes[0];
        for (; slot >= 0 && piece < end; ++piece) {
            const int64_t row = piece - token * job.rows;
            while (row >= part_end) part_end += job.sizes[++part];
            const float* shrunk = job.shrunk + (token * job.parts + part) * job.rank;
            float value = job.out[piece];
            if (job.has_vectors[slot]) value = value * job.gain[slot * job.rows + row] + job.offset[slot * job.rows + row];
            job.out[piece] = value + product(shrunk, job.b + (slot * job.rows + row) * job.rank, job.ranks[slot]);
        }
        piece = end;
    }
}

const Layers LAYERS = {norm, gate, scale, rotate, shrink, expand, attend};

}  // namespace
}  // namespace pagewire
