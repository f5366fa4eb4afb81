// Attention over the pool of blocks, as layers.h has it. Included by layers.inc.h.
#include <algorithm>
#include <cmath>
#include <vector>

#include "layers.h"
#include "vectors.h"

namespace pagewire {
namespace {

constexpr int64_t TILE = 16;          // keys at a time
constexpr int64_t FEWEST_KEYS = 128;  // of a share of a context
constexpr int64_t MOST_ROWS = 2 * LANES;
constexpr int64_t FEW_ROWS = 4;

// How a step's attention is cut. A row is a query head of a token; those that share a key-value head are rows of one
// list, token by token. A piece of work is MOST_ROWS rows of a list and a share of the context.
struct Cut {
    int64_t group, shares = 1;
    std::vector<int64_t> tiles_before;  // by request
    std::vector<int64_t> tokens_before;

    Cut(const Attending& job, int threads) : group(job.heads / job.kv_heads) {
        int64_t tiles = 0, tokens = 0, longest = 0;
        for (int64_t request = 0; request < job.requests; ++request) {
            tiles_before.push_back(tiles);
            tokens_before.push_back(tokens);
            tiles += (job.counts[request] * group + MOST_ROWS - 1) / MOST_ROWS;
            tokens += job.counts[request];
            longest = std::max(longest, job.seq_lens[request]);
        }
        tiles_before.push_back(tiles);
        const int64_t all = pieces(job);
        if (threads > 1 && all < 4 * threads) {
            shares = std::min((4 * threads + all - 1) / all, (longest + FEWEST_KEYS - 1) / FEWEST_KEYS);
        }
    }

    int64_t pieces(const Attending& job) const { return tiles_before.back() * job.kv_heads; }
};

struct Piece {
    int64_t request, kv_head;
    int64_t row, rows;            // of the request's list: the first, and how many
    int64_t position;             // of the first row's token
    int64_t first_key, last_key;  // the share

    Piece(const Attending& job, const Cut& cut, int64_t index, int64_t share) {
        const int64_t tile = index / job.kv_heads;
        kv_head = index % job.kv_heads;
        const auto after = std::upper_bound(cut.tiles_before.begin(), cut.tiles_before.end(), tile);
        request = after - cut.tiles_before.begin() - 1;
        row = (tile - cut.tiles_before[static_cast<size_t>(request)]) * MOST_ROWS;
        const int64_t count = job.counts[request], start = job.seq_lens[request] - count;
        rows = std::min(MOST_ROWS, count * cut.group - row);
        position = start + row / cut.group;
        const int64_t end = start + (row + rows - 1) / cut.group + 1;
        const int64_t oldest = job.window ? std::max<int64_t>(0, position + 1 - job.window) : 0;
        int64_t each = (end - oldest + cut.shares - 1) / cut.shares;
        each = (each + TILE - 1) / TILE * TILE;
        first_key = std::min(oldest + share * each, end);
        last_key = std::min(first_key + each, end);
    }

    // With few rows a vector is numbers of one row; else it is a number of many rows.
    bool is_few(const Attending& job) const { return rows <= FEW_ROWS && job.dim % LANES == 0; }

    int64_t head(const Cut& cut, int64_t index) const { return kv_head * cut.group + (row + index) % cut.group; }

    int64_t position_of(const Cut& cut, int64_t index) const {
        return position + (row + index) / cut.group - row / cut.group;
    }

    // Where a row's numbers lie in a query or an output.
    int64_t place(const Attending& job, const Cut& cut, int64_t index) const {
        const int64_t token = cut.tokens_before[static_cast<size_t>(request)] + (row + index) / cut.group;
        return (token * job.heads + head(cut, index)) * job.dim;
    }

    // Elements from the pool's beginning to a key.
    int64_t key_at(const Attending& job, int64_t key) const {
        const int64_t block = job.block_table[request * job.table_stride + key / job.block_size];
        return block * job.block_stride + key % job.block_size * job.slot_stride + kv_head * job.head_stride;
    }
};

// What a piece's rows have seen of a context: the sum of values, weighted, and what the weights are relative to.
struct Seen {
    float highest[MOST_ROWS], total[MOST_ROWS];
};

// What scores and keys do not tell: the cap, the slope, what may be seen.
inline Vector finish_scores(const Attending& job, Vector score, Whole distance, Vector slope, Whole seen) {
    if (job.soft_cap != 0) {
        const Vector twice = score * all(2 / job.soft_cap);
        score = all(job.soft_cap) * (all(1.0f) - all(2.0f) / (exponential(twice) + all(1.0f)));
    }
    if (job.slopes) score -= slope * __builtin_convertvector(distance, Vector);
    seen &= distance >= 0;
    if (job.window) seen &= distance < static_cast<int32_t>(job.window);
    return select(seen, score, all(-INFINITY));
}

// Scores of KEYS keys with V vectors of rows.
template <int V, int KEYS>
inline void score_keys(const Attending& job, const float* queries, const float* key, Vector (*scores)[V]) {
    Vector sums[KEYS][V] = {};
    for (int64_t dim = 0; dim < job.dim; ++dim) {
        Vector query[V];
        for (int v = 0; v < V; ++v) query[v] = load(queries + (dim * V + v) * LANES);
#pragma GCC unroll 8
        for (int k = 0; k < KEYS; ++k) {
            const Vector number = all(key[k * job.slot_stride + dim]);
            for (int v = 0; v < V; ++v) sums[k][v] += query[v] * number;
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < KEYS; ++k) {
        for (int v = 0; v < V; ++v) scores[k][v] = sums[k][v];
    }
}

// `count` values, weighted, added to DIMS numbers of V vectors of rows.
template <int V, int DIMS>
inline void add_values(const Attending& job, const Vector (*weights)[V], int64_t count, const float* value,
                       const Vector (&fade)[V], float* out) {
    Vector sums[DIMS][V];
#pragma GCC unroll 8
    for (int d = 0; d < DIMS; ++d) {
        for (int v = 0; v < V; ++v) sums[d][v] = load(out + (d * V + v) * LANES) * fade[v];
    }
    for (int64_t i = 0; i < count; ++i, value += job.slot_stride) {
#pragma GCC unroll 8
        for (int d = 0; d < DIMS; ++d) {
            const Vector number = all(value[d]);
            for (int v = 0; v < V; ++v) sums[d][v] += weights[i][v] * number;
        }
    }
#pragma GCC unroll 8
    for (int d = 0; d < DIMS; ++d) {
        for (int v = 0; v < V; ++v) store(out + (d * V + v) * LANES, sums[d][v]);
    }
}

// Many rows: queries and out are [dim, V * LANES].
template <int V>
void attend_rows(const Attending& job, const Cut& cut, const Piece& piece, const float* queries, float* out, Seen& seen) {
    Vector highest[V], total[V], slope[V];
    Whole position[V];
    for (int v = 0; v < V; ++v) {
        highest[v] = all(-INFINITY);
        total[v] = slope[v] = all(0.0f);
        for (int lane = 0; lane < LANES; ++lane) {
            const int64_t index = v * LANES + lane;
            const bool is_row = index < piece.rows;
            position[v][lane] = is_row ? static_cast<int32_t>(piece.position_of(cut, index)) : -1;
            if (is_row && job.slopes) slope[v][lane] = job.slopes[piece.head(cut, index)];
        }
    }
    const bool plain = job.soft_cap == 0 && !job.slopes && !job.window;
    int64_t count;
    for (int64_t first = piece.first_key; first < piece.last_key; first += count) {
        count = std::min({TILE, piece.last_key - first, job.block_size - first % job.block_size});
        const int64_t place = piece.key_at(job, first);
        const float *key = job.key + place, *value = job.value + place;
        constexpr int AT_ONCE = 8 / V;
        Vector scores[TILE][V];
        int64_t i = 0;
        for (; i + AT_ONCE <= count; i += AT_ONCE) {
            score_keys<V, AT_ONCE>(job, queries, key + i * job.slot_stride, scores + i);
        }
        for (; i < count; ++i) score_keys<V, 1>(job, queries, key + i * job.slot_stride, scores + i);
        const bool all_seen = plain && first + count - 1 <= piece.position;
        Vector fade[V];
        for (int v = 0; v < V; ++v) {
            Vector most = highest[v];
            for (i = 0; i < count; ++i) {
                Vector score = scores[i][v] * all(job.scale);
                if (!all_seen) {
                    const Whole distance = position[v] - static_cast<int32_t>(first + i);
                    score = finish_scores(job, score, distance, slope[v], distance >= 0);
                }
                scores[i][v] = score;
                most = larger(score, most);
            }
            // A row that has seen nothing yet keeps its zeros.
            const Vector base = select(most > all(-INFINITY), most, all(0.0f));
            fade[v] = exponential(highest[v] - base);
            highest[v] = most;
            total[v] *= fade[v];
            for (i = 0; i < count; ++i) {
                scores[i][v] = exponential(scores[i][v] - base);
                total[v] += scores[i][v];
            }
        }
        int64_t dim = 0;
        for (; dim + AT_ONCE <= job.dim; dim += AT_ONCE) {
            add_values<V, AT_ONCE>(job, scores, count, value + dim, fade, out + dim * V * LANES);
        }
        for (; dim < job.dim; ++dim) add_values<V, 1>(job, scores, count, value + dim, fade, out + dim * V * LANES);
    }
    for (int v = 0; v < V; ++v) {
        store(seen.highest + v * LANES, highest[v]);
        store(seen.total + v * LANES, total[v]);
    }
}

// Products of KEYS keys with R rows, not yet summed over the vectors' lanes, TILE from a row to the next.
template <int R, int KEYS>
inline void multiply_keys(const Attending& job, const float* queries, const float* key, Vector* products) {
    Vector sums[R][KEYS] = {};
    for (int64_t dim = 0; dim < job.dim; dim += LANES) {
        Vector numbers[KEYS];
        for (int k = 0; k < KEYS; ++k) numbers[k] = load(key + k * job.slot_stride + dim);
        for (int r = 0; r < R; ++r) {
            const Vector query = load(queries + r * job.dim + dim);
            for (int k = 0; k < KEYS; ++k) sums[r][k] += query * numbers[k];
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int k = 0; k < KEYS; ++k) products[r * TILE + k] = sums[r][k];
    }
}

// `count` values, weighted, added to VECTORS vectors of R rows.
template <int R, int VECTORS>
inline void add_to_rows(const Attending& job, const float (*weights)[TILE], int64_t count, const float* value,
                        const float (&fade)[R], float* out) {
    Vector sums[R][VECTORS];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = load(out + r * job.dim + v * LANES) * all(fade[r]);
    }
    for (int64_t i = 0; i < count; ++i, value += job.slot_stride) {
        Vector numbers[VECTORS];
        for (int v = 0; v < VECTORS; ++v) numbers[v] = load(value + v * LANES);
        for (int r = 0; r < R; ++r) {
            const Vector weight = all(weights[r][i]);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += weight * numbers[v];
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < VECTORS; ++v) store(out + r * job.dim + v * LANES, sums[r][v]);
    }
}

// A row's scores of a tile, by key; those behind `count` become 0. Returns by how much what it had seen fades.
inline float weigh(const Attending& job, float* scores, int64_t count, int64_t distance, float slope, float& highest,
                   float& total) {
    constexpr int PARTS = TILE / LANES;
    Vector part[PARTS], most = all(-INFINITY);
    Whole lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    for (int p = 0; p < PARTS; ++p) {
        const Whole key = lane + p * LANES;
        part[p] = finish_scores(job, load(scores + p * LANES) * all(job.scale), static_cast<int32_t>(distance) - key,
                                all(slope), key < static_cast<int32_t>(count));
        most = larger(part[p], most);
    }
    float base = highest;
    for (int i = 0; i < LANES; ++i) base = most[i] > base ? most[i] : base;
    const float before = highest;
    highest = base;
    if (base == -INFINITY) base = 0;
    const float fade = exponential(all(before - base))[0];
    Vector sums = {};
    for (int p = 0; p < PARTS; ++p) {
        part[p] = exponential(part[p] - all(base));
        store(scores + p * LANES, part[p]);
        sums += part[p];
    }
    total = total * fade + sum(sums);
    return fade;
}

// A few rows: queries and out are [R, dim].
template <int R>
void attend_few(const Attending& job, const Cut& cut, const Piece& piece, const float* queries, float* out, Seen& seen) {
    std::fill(seen.highest, seen.highest + R, -INFINITY);
    std::fill(seen.total, seen.total + R, 0.0f);
    int64_t count;
    for (int64_t first = piece.first_key; first < piece.last_key; first += count) {
        count = std::min({TILE, piece.last_key - first, job.block_size - first % job.block_size});
        const int64_t place = piece.key_at(job, first);
        const float *key = job.key + place, *value = job.value + place;
        constexpr int KEYS = R > 2 ? 2 : 4;
        Vector products[R * TILE];
        int64_t i = 0;
        for (; i + KEYS <= count; i += KEYS) {
            multiply_keys<R, KEYS>(job, queries, key + i * job.slot_stride, products + i);
        }
        for (; i < count; ++i) multiply_keys<R, 1>(job, queries, key + i * job.slot_stride, products + i);
        float scores[R][TILE], fade[R];
        for (int r = 0; r < R; ++r) {
            for (i = count; i < TILE; ++i) products[r * TILE + i] = Vector{};
            for (i = 0; i < TILE; i += 8) sums_of_eight(products + r * TILE + i, scores[r] + i);
            const float slope = job.slopes ? job.slopes[piece.head(cut, r)] : 0;
            fade[r] = weigh(job, scores[r], count, piece.position_of(cut, r) - first, slope, seen.highest[r],
                            seen.total[r]);
        }
        int64_t dim = 0;
        constexpr int VECTORS = R > 3 ? 2 : 4;
        for (; dim + VECTORS * LANES <= job.dim; dim += VECTORS * LANES) {
            add_to_rows<R, VECTORS>(job, scores, count, value + dim, fade, out + dim);
        }
        for (; dim < job.dim; dim += LANES) add_to_rows<R, 1>(job, scores, count, value + dim, fade, out + dim);
    }
}

// The numbers of a piece's rows in a thread's memory: of a query or an output.
struct Numbers {
    float* at;
    int64_t by_row, by_dim;

    Numbers(const Attending& job, const Piece& piece, float* at) : at(at) {
        const bool few = piece.is_few(job);
        by_row = few ? job.dim : 1;
        by_dim = few ? 1 : piece.rows > LANES ? 2 * LANES : LANES;
    }

    float& operator()(int64_t row, int64_t dim) const { return at[row * by_row + dim * by_dim]; }
};

// What a piece's rows see of its share of the context.
void attend_piece(const Attending& job, const Cut& cut, const Piece& piece, float* queries, float* out, Seen& seen) {
    const size_t size = static_cast<size_t>(job.dim * MOST_ROWS) * sizeof(float);
    memset(queries, 0, size);
    memset(out, 0, size);
    const Numbers numbers(job, piece, queries);
    for (int64_t row = 0; row < piece.rows; ++row) {
        const float* query = job.query + piece.place(job, cut, row);
        for (int64_t dim = 0; dim < job.dim; ++dim) numbers(row, dim) = query[dim];
    }
    if (!piece.is_few(job)) {
        (piece.rows > LANES ? attend_rows<2> : attend_rows<1>)(job, cut, piece, queries, out, seen);
        return;
    }
    static constexpr decltype(&attend_few<1>) few[FEW_ROWS] = {attend_few<1>, attend_few<2>, attend_few<3>,
                                                               attend_few<4>};
    few[piece.rows - 1](job, cut, piece, queries, out, seen);
}

void leave(const Attending& job, const Cut& cut, const Piece& piece, const Numbers& out, const Seen& seen) {
    for (int64_t row = 0; row < piece.rows; ++row) {
        float total = seen.total[row], scale = 1;
        if (job.sinks) {  // one more score, of a key whose value is zero
            const float sink = job.sinks[piece.head(cut, row)], highest = std::fmax(seen.highest[row], sink);
            scale = std::exp(seen.highest[row] - highest);
            total = total * scale + std::exp(sink - highest);
        }
        scale /= total;
        float* to = job.out + piece.place(job, cut, row);
        for (int64_t dim = 0; dim < job.dim; ++dim) to[dim] = out(row, dim) * scale;
    }
}

inline float* aligned(std::vector<uint8_t>& memory) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

// What the shares of a context have seen, as if it were one that saw all of it.
void join(const Attending& job, const Piece& piece, int64_t shares, int64_t stored, const float* from, float* out,
          Seen& seen) {
    const Numbers sums(job, piece, out);
    memset(out, 0, static_cast<size_t>(job.dim * MOST_ROWS) * sizeof(float));
    for (int64_t row = 0; row < piece.rows; ++row) {
        const float *highest = from + job.dim * MOST_ROWS + row, *total = highest + MOST_ROWS;
        float most = -INFINITY;
        for (int64_t share = 0; share < shares; ++share) most = std::fmax(most, highest[share * stored]);
        seen.highest[row] = most;
        seen.total[row] = 0;
        for (int64_t share = 0; share < shares; ++share) {
            if (highest[share * stored] == -INFINITY) continue;
            const float weight = std::exp(highest[share * stored] - most);
            seen.total[row] += total[share * stored] * weight;
            const Numbers part(job, piece, const_cast<float*>(from + share * stored));
            for (int64_t dim = 0; dim < job.dim; ++dim) sums(row, dim) += part(row, dim) * weight;
        }
    }
}

void attend(Attending& job, int thread, Pool& pool) {
    const Cut cut(job, pool.size());
    const int64_t pieces = cut.pieces(job), all_pieces = pieces * cut.shares;
    const int64_t numbers = job.dim * MOST_ROWS, stored = numbers + 2 * MOST_ROWS;  // floats of a share
    auto& memory = pool.scratch(thread);
    const size_t bytes = static_cast<size_t>(numbers) * sizeof(float) * 2 + 64;
    if (memory.size() < bytes) memory.resize(bytes);
    float *queries = aligned(memory), *out = queries + numbers;
    if (cut.shares > 1) {
        if (thread == 0) {
            const size_t needed = static_cast<size_t>(all_pieces * stored) * sizeof(float) + 64;
            if (pool.shared().size() < needed) pool.shared().resize(needed);
        }
        pool.barrier();
    }
    float* partial = aligned(pool.shared());
    Seen seen;
    int64_t first, last;
    while (pool.take(job.next, all_pieces, 1, &first, &last)) {
        const Piece piece(job, cut, first / cut.shares, first % cut.shares);
        if (cut.shares == 1) {
            attend_piece(job, cut, piece, queries, out, seen);
            leave(job, cut, piece, Numbers(job, piece, out), seen);
            continue;
        }
        float* to = partial + first * stored;
        attend_piece(job, cut, piece, queries, to, seen);
        memcpy(to + numbers, seen.highest, sizeof seen.highest);
        memcpy(to + numbers + MOST_ROWS, seen.total, sizeof seen.total);
    }
    if (cut.shares == 1) return;
    pool.barrier();
    for (int64_t index = thread; index < pieces; index += pool.size()) {
        const Piece piece(job, cut, index, 0);
        join(job, piece, cut.shares, stored, partial + index * cut.shares * stored, out, seen);
        leave(job, cut, piece, Numbers(job, piece, out), seen);
    }
}

}  // namespace
}  // namespace pagewire
