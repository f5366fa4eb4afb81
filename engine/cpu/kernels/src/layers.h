// What lies between products, in fp32.
#pragma once

#include <atomic>
#include <cstdint>

#include "pool.h"

namespace pagewire {

struct Norm {
    const float* x;      // [tokens, size] with x_stride; null where there is nothing to add
    float* residual;     // [tokens, size]: x is added to it, and the norm is of the sum
    const float* weight;
    float* out;          // [tokens, size]
    int64_t tokens, size, x_stride;
    float eps;
};

enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2 };

struct Gating {
    const float* gate_up;  // [tokens, 2 * size]
    float* out;            // [tokens, size]
    int64_t tokens, size;
    int32_t activation;
};

struct Scaling {
    const float* x;  // [tokens, size]
    float* out;      // the same: x * factor, and under a cap, cap * tanh(that / cap)
    int64_t tokens, size;
    float factor, cap;  // 0 for none
};

struct Rotating {
    float* qkv;                  // [tokens, (heads + 2 * kv_heads) * dim], overwritten
    const int64_t* positions;    // [tokens]; null without angles
    const float* angles;         // [positions, rotary_dim]: cosines, then sines; null for none
    const float* query_scale;    // [positions], or null
    const float *q_norm, *k_norm;  // [dim], or null
    const int64_t* slots;        // [tokens]
    float *key, *value;          // the layer's cache
    float* query;                // [tokens, heads, dim]
    int64_t tokens, heads, kv_heads, dim, rotary_dim, interleaved;
    int64_t block_size, block_stride, slot_stride, head_stride;  // of the cache, in elements
    float eps;
};

struct Attending {
    const float* query;           // [tokens, heads, dim]
    const float *key, *value;     // the layer's cache
    float* out;                   // [tokens, heads, dim]
    const int64_t* counts;        // [requests]: tokens computed
    const int64_t* seq_lens;      // [requests], with them
    const int64_t* block_table;   // [requests, table_stride]
    const float *slopes, *sinks;  // [heads], or null
    int64_t requests, heads, kv_heads, dim, table_stride;
    int64_t block_size, block_stride, slot_stride, head_stride;
    int64_t window;
    float scale, soft_cap;
    std::atomic<int64_t> next{0};
};

// What adapters add to a product: of a token in slot s, out * gain[s] + offset[s] + b[s] a[s] x.
struct Adapting {
    const float* x;              // [tokens, columns] with x_stride
    float *out, *shrunk;         // [tokens, rows], changed; [tokens, parts, rank], for a[s] x
    const int32_t* slots;        // [tokens]; below 0 for none
    const int32_t *ranks, *has_vectors;  // by slot
    const float *a, *b;          // [slots, parts, rank, columns], [slots, rows, rank]
    const float *gain, *offset;  // [slots, rows]
    const int64_t* sizes;        // [parts]: the rows of each part, in order
    int64_t x_stride, tokens, rows, columns, parts, rank;
};

// What is compiled once for each instruction set.
struct Layers {
    void (*norm)(const Norm& job, int64_t first, int64_t last);
    void (*gate)(const Gating& job, int64_t first, int64_t last);
    void (*scale)(const Scaling& job, int64_t first, int64_t last);
    void (*rotate)(const Rotating& job, int64_t first, int64_t last);
    void (*shrink)(const Adapting& job, int64_t first, int64_t last);
    void (*expand)(const Adapting& job, int64_t first, int64_t last);
    void (*attend)(Attending& job, int thread, Pool& pool);
};

const Layers& plain_layers();
#if defined(__x86_64__)
const Layers& avx2_layers();
const Layers& avx512_layers();
#endif

}  // namespace pagewire
