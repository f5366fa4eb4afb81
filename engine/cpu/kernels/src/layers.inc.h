// The kernels of layers.h. Included once for each instruction set, by a file that is compiled for it.
#include <algorithm>
#include <cmath>

#include "layers.h"
#include "vectors.h"

namespace pagewire {
namespace {

// Scales a row to a mean square of 1 and multiplies it with the weight.
void normalise(const float* x, const float* weight, int64_t size, float eps, float* out) {
    Vector squares = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
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

constexpr int64_t TILE = 16;        // keys at a time
constexpr int64_t FEWEST_KEYS = 128;  // of a share of a context

// How a step's attention is cut: each piece of work is LANES rows of one key-value head, a row being a query head of
// a token, and a share of the context. Query heads that share the key-value head are rows side by side.
struct Cut {
    int64_t heads_per_row, chunks, tokens_per_tile, shares;
    std::vector<int64_t> tiles_before;  // by request
    std::vector<int64_t> tokens_before;

    Cut(const Attending& job, int threads) {
        int64_t group = job.heads / job.kv_heads;
        heads_per_row = std::min<int64_t>(group, LANES);
        chunks = (group + heads_per_row - 1) / heads_per_row;
        tokens_per_tile = LANES / heads_per_row;
        int64_t tiles = 0, tokens = 0, longest = 0;
        for (int64_t request = 0; request < job.requests; ++request) {
            tiles_before.push_back(tiles);
            tokens_before.push_back(tokens);
            tiles += (job.counts[request] + tokens_per_tile - 1) / tokens_per_tile;
            tokens += job.counts[request];
            longest = std::max(longest, job.seq_lens[request]);
        }
        tiles_before.push_back(tiles);
        int64_t pieces = tiles * job.kv_heads * chunks;
        shares = 1;
        if (threads > 1 && pieces < 4 * threads) {
            shares = std::min((4 * threads + pieces - 1) / pieces, (longest + FEWEST_KEYS - 1) / FEWEST_KEYS);
        }
    }

    int64_t pieces(const Attending& job) const { return tiles_before.back() * job.kv_heads * chunks; }
};

// One piece: what its rows have seen so far. Rows are lanes.
struct Rows {
    int64_t request, kv_head, chunk, token, first_key, last_key;  // token: of the request's, the first
    int64_t end;  // of the last row's context
    Whole position, is_row;
    Vector highest, total;
};

void attend_keys(const Attending& job, const float* queries, Vector* out, Rows& rows, int64_t first, int64_t count,
                 const Vector& slope) {
    const int64_t slot = first % job.block_size;
    const int64_t block = job.block_table[rows.request * job.table_stride + first / job.block_size];
    const int64_t place = block * job.block_stride + slot * job.slot_stride + rows.kv_head * job.head_stride;
    const float *key = job.key + place, *value = job.value + place;
    Vector scores[TILE];
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const float* at = key + i * job.slot_stride;
        Vector a = {}, b = {}, c = {}, d = {};
        for (int64_t dim = 0; dim < job.dim; ++dim) {
            Vector query = load(queries + dim * LANES);
            a += query * all(at[dim]);
            b += query * all(at[dim + job.slot_stride]);
            c += query * all(at[dim + 2 * job.slot_stride]);
            d += query * all(at[dim + 3 * job.slot_stride]);
        }
        scores[i] = a, scores[i + 1] = b, scores[i + 2] = c, scores[i + 3] = d;
    }
    for (; i < count; ++i) {
        Vector a = {};
        for (int64_t dim = 0; dim < job.dim; ++dim) a += load(queries + dim * LANES) * all(key[i * job.slot_stride + dim]);
        scores[i] = a;
    }
    Vector highest = rows.highest;
    for (i = 0; i < count; ++i) {
        Vector score = scores[i] * all(job.scale);
        if (job.soft_cap != 0) {
            Vector twice = score * all(2 / job.soft_cap);
            score = all(job.soft_cap) * (all(1.0f) - all(2.0f) / (exponential(twice) + all(1.0f)));
        }
        Whole distance = rows.position - static_cast<int32_t>(first + i);
        if (job.slopes) score -= slope * __builtin_convertvector(distance, Vector);
        Whole seen = (distance >= 0) & rows.is_row;
        if (job.window) seen &= distance < static_cast<int32_t>(job.window);
        scores[i] = select(seen, score, all(-INFINITY));
        highest = larger(scores[i], highest);
    }
    // A row that has seen nothing yet keeps its zeros.
    Vector base = select(highest > all(-INFINITY), highest, all(0.0f));
    Vector fade = exponential(rows.highest - base);
    rows.highest = highest;
    rows.total *= fade;
    for (i = 0; i < count; ++i) {
        scores[i] = exponential(scores[i] - base);
        rows.total += scores[i];
    }
    int64_t dim = 0;
    for (; dim + 4 <= job.dim; dim += 4) {
        Vector a = out[dim] * fade, b = out[dim + 1] * fade, c = out[dim + 2] * fade, d = out[dim + 3] * fade;
        const float* at = value + dim;
        for (i = 0; i < count; ++i, at += job.slot_stride) {
            a += scores[i] * all(at[0]);
            b += scores[i] * all(at[1]);
            c += scores[i] * all(at[2]);
            d += scores[i] * all(at[3]);
        }
        out[dim] = a, out[dim + 1] = b, out[dim + 2] = c, out[dim + 3] = d;
    }
    for (; dim < job.dim; ++dim) {
        out[dim] *= fade;
        for (i = 0; i < count; ++i) out[dim] += scores[i] * all(value[i * job.slot_stride + dim]);
    }
}

// The rows of a piece: which they are, and their queries, [dim, LANES].
Rows enter(const Attending& job, const Cut& cut, int64_t piece, int64_t share, float* queries, Vector* slope) {
    Rows rows = {};
    const int64_t tile = piece / (job.kv_heads * cut.chunks), part = piece % (job.kv_heads * cut.chunks);
    rows.kv_head = part / cut.chunks;
    rows.chunk = part % cut.chunks;
    auto after = std::upper_bound(cut.tiles_before.begin(), cut.tiles_before.end(), tile);
    rows.request = after - cut.tiles_before.begin() - 1;
    rows.token = (tile - cut.tiles_before[static_cast<size_t>(rows.request)]) * cut.tokens_per_tile;
    const int64_t count = job.counts[rows.request], seq_len = job.seq_lens[rows.request];
    const int64_t group = job.heads / job.kv_heads, tokens_before = cut.tokens_before[static_cast<size_t>(rows.request)];
    memset(queries, 0, static_cast<size_t>(job.dim) * LANES * sizeof(float));
    rows.position = Whole{} - 1;
    for (int lane = 0; lane < LANES; ++lane) {
        int64_t token = rows.token + lane / cut.heads_per_row;
        int64_t in_group = rows.chunk * cut.heads_per_row + lane % cut.heads_per_row;
        if (lane >= cut.tokens_per_tile * cut.heads_per_row || token >= count || in_group >= group) continue;
        int64_t head = rows.kv_head * group + in_group;
        const float* query = job.query + ((tokens_before + token) * job.heads + head) * job.dim;
        for (int64_t dim = 0; dim < job.dim; ++dim) queries[dim * LANES + lane] = query[dim];
        rows.position[lane] = static_cast<int32_t>(seq_len - count + token);
        rows.is_row[lane] = -1;
        if (job.slopes) (*slope)[lane] = job.slopes[head];
        rows.end = seq_len - count + token + 1;
    }
    const int64_t oldest = job.window ? std::max<int64_t>(0, seq_len - count + rows.token + 1 - job.window) : 0;
    int64_t each = (rows.end - oldest + cut.shares - 1) / cut.shares;
    each = (each + TILE - 1) / TILE * TILE;
    rows.first_key = std::min(oldest + share * each, rows.end);
    rows.last_key = std::min(rows.first_key + each, rows.end);
    rows.highest = all(-INFINITY);
    return rows;
}

void leave(const Attending& job, const Cut& cut, const Rows& rows, const Vector* out) {
    const int64_t count = job.counts[rows.request], group = job.heads / job.kv_heads;
    const int64_t tokens_before = cut.tokens_before[static_cast<size_t>(rows.request)];
    for (int lane = 0; lane < LANES; ++lane) {
        if (!rows.is_row[lane]) continue;
        int64_t token = rows.token + lane / cut.heads_per_row;
        int64_t head = rows.kv_head * group + rows.chunk * cut.heads_per_row + lane % cut.heads_per_row;
        if (token >= count) continue;
        float total = rows.total[lane], scale = 1;
        if (job.sinks) {  // one more score, of a key whose value is zero
            float highest = std::fmax(rows.highest[lane], job.sinks[head]);
            scale = std::exp(rows.highest[lane] - highest);
            total = total * scale + std::exp(job.sinks[head] - highest);
        }
        float* to = job.out + ((tokens_before + token) * job.heads + head) * job.dim;
        for (int64_t dim = 0; dim < job.dim; ++dim) to[dim] = out[dim][lane] * scale / total;
    }
}

void attend(Attending& job, int thread, Pool& pool) {
    const Cut cut(job, pool.size());
    const int64_t pieces = cut.pieces(job), all_pieces = pieces * cut.shares;
    const int64_t stored = (job.dim + 2) * LANES;  // floats of a share: what it has seen
    auto& memory = pool.scratch(thread);
    const size_t bytes = static_cast<size_t>(job.dim) * LANES * sizeof(float) * 2 + 64;
    if (memory.size() < bytes) memory.resize(bytes);
    auto aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    float* queries = aligned;
    auto* out = reinterpret_cast<Vector*>(aligned + job.dim * LANES);
    if (cut.shares > 1) {
        if (thread == 0) {
            size_t needed = static_cast<size_t>(all_pieces * stored) * sizeof(float) + 64;
            if (pool.shared().size() < needed) pool.shared().resize(needed);
        }
        pool.barrier();
    }
    auto partial = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(pool.shared().data()) + 63) / 64 * 64);
    int64_t first, last;
    while (pool.take(job.next, all_pieces, 1, &first, &last)) {
        Vector slope = {};
        Rows rows = enter(job, cut, first / cut.shares, first % cut.shares, queries, &slope);
        std::fill(out, out + job.dim, Vector{});
        for (int64_t key = rows.first_key; key < rows.last_key;) {
            int64_t count = std::min({TILE, rows.last_key - key, job.block_size - key % job.block_size});
            attend_keys(job, queries, out, rows, key, count, slope);
            key += count;
        }
        if (cut.shares == 1) {
            leave(job, cut, rows, out);
            continue;
        }
        float* to = partial + first * stored;
        memcpy(to, out, static_cast<size_t>(job.dim) * sizeof(Vector));
        store(to + job.dim * LANES, rows.highest);
        store(to + (job.dim + 1) * LANES, rows.total);
    }
    if (cut.shares == 1) return;
    pool.barrier();
    for (int64_t piece = thread; piece < pieces; piece += pool.size()) {
        Vector slope = {};
        Rows rows = enter(job, cut, piece, 0, queries, &slope);
        const float* from = partial + piece * cut.shares * stored;
        for (int64_t share = 0; share < cut.shares; ++share) {
            rows.highest = larger(load(from + share * stored + job.dim * LANES), rows.highest);
        }
        std::fill(out, out + job.dim, Vector{});
        for (int64_t share = 0; share < cut.shares; ++share, from += stored) {
            Vector seen = load(from + job.dim * LANES);
            Vector fade = select(seen > all(-INFINITY), exponential(seen - rows.highest), all(0.0f));
            rows.total += load(from + (job.dim + 1) * LANES) * fade;
            for (int64_t dim = 0; dim < job.dim; ++dim) out[dim] += load(from + dim * LANES) * fade;
        }
        leave(job, cut, rows, out);
    }
}

const Layers LAYERS = {norm, gate, rotate, attend};

}  // namespace
}  // namespace pagewire
