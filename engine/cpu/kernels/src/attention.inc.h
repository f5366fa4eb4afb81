// Attention over the pool of blocks, as layers.h has it. Included by layers.inc.h.
//
// What a query head of a token gets is the same bits whatever is computed beside it: how many tokens, heads, requests and
// threads there are decides only who computes what. For that every sum has an order of its own:
// - the product of a query and a key: CHAINS sums of every eighth number, then these in turn;
// - the weights of a tile of keys: the first half of the tile and the second, number by number, and so on by halves;
// - a segment of the context: tile after tile, and in a tile the values key after key;
// - the context: segment after segment.
// Tiles and segments begin at the same keys for every token.
#include <algorithm>
#include <cmath>
#include <vector>

#include "layers.h"
#include "vectors.h"

namespace pagewire {
namespace {

constexpr int64_t TILE = 16;      // keys at a time
constexpr int64_t SEGMENT = 256;  // keys that threads do not share
constexpr int64_t CHAINS = 8;
constexpr int64_t MOST_ROWS = 2 * LANES;
constexpr int64_t FEW_ROWS = 4;
// Of what segments have seen, until they are joined.
constexpr int64_t MOST_PARTIAL_BYTES = int64_t{256} << 20;

// Floats of what a piece's rows have seen of a segment: sums of values, then what Seen has.
inline int64_t partial_size(const Attending& job) { return (job.dim + 2) * MOST_ROWS; }

// How a step's attention is cut. A row is a query head of a token; those that share a key-value head are rows of one
// list, token by token. A piece is MOST_ROWS rows of a list; threads share a piece's segments where pieces are few.
struct Cut {
    int64_t group, shares = 1, segments = 1;
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
        const int64_t all = pieces(job), wanted = 4 * threads;
        segments = (longest + SEGMENT - 1) / SEGMENT;
        const int64_t bytes = all * segments * partial_size(job) * static_cast<int64_t>(sizeof(float));
        if (threads > 1 && all < wanted && bytes <= MOST_PARTIAL_BYTES) {
            shares = std::min((wanted + all - 1) / all, segments);
        }
    }

    int64_t pieces(const Attending& job) const { return tiles_before.back() * job.kv_heads; }
};

struct Piece {
    int64_t request, kv_head;
    int64_t row, rows;    // of the request's list: the first, and how many
    int64_t position;     // of the first row's token
    int64_t oldest, end;  // the keys that any of its rows sees
    int64_t first_segment, segments;

    Piece(const Attending& job, const Cut& cut, int64_t index) {
        const int64_t tile = index / job.kv_heads;
        kv_head = index % job.kv_heads;
        const auto after = std::upper_bound(cut.tiles_before.begin(), cut.tiles_before.end(), tile);
        request = after - cut.tiles_before.begin() - 1;
        row = (tile - cut.tiles_before[static_cast<size_t>(request)]) * MOST_ROWS;
        const int64_t count = job.counts[request], start = job.seq_lens[request] - count;
        rows = std::min(MOST_ROWS, count * cut.group - row);
        position = start + row / cut.group;
        end = start + (row + rows - 1) / cut.group + 1;
        oldest = job.window ? std::max<int64_t>(0, position + 1 - job.window) : 0;
        first_segment = oldest / SEGMENT;
        segments = (end - 1) / SEGMENT + 1 - first_segment;
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

// TILE keys side by side in a block, or those that are left of it: the first one that is wanted may not be the tile's.
struct Tile {
    int64_t first;       // the tile's key
    int64_t begin, end;  // what is wanted of it

    Tile(const Attending& job, int64_t from, int64_t to) {
        const int64_t in_block = from % job.block_size;
        begin = in_block % TILE;
        first = from - begin;
        end = std::min({TILE, to - first, job.block_size - in_block + begin});
    }
};

// What a piece's rows have seen of some keys: the sum of values, weighted, and what the weights are relative to.
struct Seen {
    float highest[MOST_ROWS], total[MOST_ROWS];
};

// Scores from products, with what these do not tell: the cap, the slope, what may be seen.
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

// Products of KEYS keys with V vectors of rows.
template <int V, int KEYS>
inline void score_keys(const Attending& job, const float* queries, const float* key, Vector (*scores)[V]) {
    for (int64_t chain = 0; chain < std::min(CHAINS, job.dim); ++chain) {
        Vector sums[KEYS][V] = {};
        for (int64_t dim = chain; dim < job.dim; dim += CHAINS) {
            Vector query[V];
            for (int v = 0; v < V; ++v) query[v] = load(queries + (dim * V + v) * LANES);
#pragma GCC unroll 8
            for (int k = 0; k < KEYS; ++k) {
                const Vector number = all(key[k * job.slot_stride + dim]);
                for (int v = 0; v < V; ++v) sums[k][v] = fused(query[v], number, sums[k][v]);
            }
        }
#pragma GCC unroll 8
        for (int k = 0; k < KEYS; ++k) {
            for (int v = 0; v < V; ++v) scores[k][v] = chain ? scores[k][v] + sums[k][v] : sums[k][v];
        }
    }
}

// The values of a tile, weighted, added to DIMS numbers of V vectors of rows.
template <int V, int DIMS>
inline void add_values(const Attending& job, const Vector (*weights)[V], const Tile& tile, const float* value,
                       const Vector (&fade)[V], float* out) {
    Vector sums[DIMS][V];
#pragma GCC unroll 8
    for (int d = 0; d < DIMS; ++d) {
        for (int v = 0; v < V; ++v) sums[d][v] = load(out + (d * V + v) * LANES) * fade[v];
    }
    value += tile.begin * job.slot_stride;
    for (int64_t i = tile.begin; i < tile.end; ++i, value += job.slot_stride) {
#pragma GCC unroll 8
        for (int d = 0; d < DIMS; ++d) {
            const Vector number = all(value[d]);
            for (int v = 0; v < V; ++v) sums[d][v] = fused(weights[i][v], number, sums[d][v]);
        }
    }
#pragma GCC unroll 8
    for (int d = 0; d < DIMS; ++d) {
        for (int v = 0; v < V; ++v) store(out + (d * V + v) * LANES, sums[d][v]);
    }
}

// The sum of TILE weights of some rows, by halves.
template <int V>
inline Vector sum_weights(const Vector (*weights)[V], int v) {
    Vector sums[TILE / 2];
    for (int i = 0; i < TILE / 2; ++i) sums[i] = weights[i][v] + weights[i + TILE / 2][v];
    for (int half = TILE / 4; half; half /= 2) {
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
}

// The same of one row, whose weights lie side by side.
inline float sum_weights(const float* weights) {
    static_assert(TILE == 16);
    const Eight eight = load<Eight>(weights) + load<Eight>(weights + 8);
    Four four[2];
    memcpy(four, &eight, sizeof eight);
    four[0] += four[1];
    return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

// Many rows: queries and out are [dim, V * LANES].
template <int V>
void attend_rows(const Attending& job, const Cut& cut, const Piece& piece, int64_t from, int64_t to,
                 const float* queries, float* out, Seen& seen) {
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
    while (from < to) {
        const Tile tile(job, from, to);
        from = tile.first + tile.end;
        const int64_t place = piece.key_at(job, tile.first);
        const float *key = job.key + place, *value = job.value + place;
        constexpr int AT_ONCE = 8 / V;
        Vector scores[TILE][V];
        int64_t i = tile.begin;
        for (; i + AT_ONCE <= tile.end; i += AT_ONCE) {
            score_keys<V, AT_ONCE>(job, queries, key + i * job.slot_stride, scores + i);
        }
        for (; i < tile.end; ++i) score_keys<V, 1>(job, queries, key + i * job.slot_stride, scores + i);
        const bool all_seen = plain && from - 1 <= piece.position;
        Vector fade[V];
        for (int v = 0; v < V; ++v) {
            Vector most = highest[v];
            for (i = tile.begin; i < tile.end; ++i) {
                Vector score = scores[i][v] * all(job.scale);
                if (!all_seen) {
                    const Whole distance = position[v] - static_cast<int32_t>(tile.first + i);
                    score = finish_scores(job, score, distance, slope[v], distance >= 0);
                }
                scores[i][v] = score;
                most = larger(score, most);
            }
            // A row that has seen nothing yet keeps its zeros.
            const Vector base = select(most > all(-INFINITY), most, all(0.0f));
            fade[v] = decay(highest[v] - base);
            highest[v] = most;
            for (i = 0; i < tile.begin; ++i) scores[i][v] = Vector{};
            for (; i < tile.end; ++i) scores[i][v] = decay(scores[i][v] - base);
            for (; i < TILE; ++i) scores[i][v] = Vector{};
            total[v] = total[v] * fade[v] + sum_weights<V>(scores, v);
        }
        int64_t dim = 0;
        for (; dim + AT_ONCE <= job.dim; dim += AT_ONCE) {
            add_values<V, AT_ONCE>(job, scores, tile, value + dim, fade, out + dim * V * LANES);
        }
        for (; dim < job.dim; ++dim) add_values<V, 1>(job, scores, tile, value + dim, fade, out + dim * V * LANES);
    }
    for (int v = 0; v < V; ++v) {
        store(seen.highest + v * LANES, highest[v]);
        store(seen.total + v * LANES, total[v]);
    }
}

// Products of KEYS keys with R rows, a lane for each chain, TILE from a row to the next.
template <int R, int KEYS>
inline void multiply_keys(const Attending& job, const float* queries, const float* key, Eight* products) {
    Eight sums[R][KEYS] = {};
    for (int64_t dim = 0; dim < job.dim; dim += CHAINS) {
        Eight numbers[KEYS];
        for (int k = 0; k < KEYS; ++k) numbers[k] = load<Eight>(key + k * job.slot_stride + dim);
        for (int r = 0; r < R; ++r) {
            const Eight query = load<Eight>(queries + r * job.dim + dim);
            for (int k = 0; k < KEYS; ++k) sums[r][k] = fused(query, numbers[k], sums[r][k]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int k = 0; k < KEYS; ++k) products[r * TILE + k] = sums[r][k];
    }
}

// The values of a tile, weighted, added to VECTORS vectors of R rows.
template <int R, int VECTORS>
inline void add_to_rows(const Attending& job, const float (*weights)[TILE], const Tile& tile, const float* value,
                        const float (&fade)[R], float* out) {
    Vector sums[R][VECTORS];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = load(out + r * job.dim + v * LANES) * all(fade[r]);
    }
    value += tile.begin * job.slot_stride;
    for (int64_t i = tile.begin; i < tile.end; ++i, value += job.slot_stride) {
        Vector numbers[VECTORS];
        for (int v = 0; v < VECTORS; ++v) numbers[v] = load(value + v * LANES);
        for (int r = 0; r < R; ++r) {
            const Vector weight = all(weights[r][i]);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = fused(weight, numbers[v], sums[r][v]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < VECTORS; ++v) store(out + r * job.dim + v * LANES, sums[r][v]);
    }
}

// A row's products with a tile become weights; those of keys that are not wanted become 0. Returns by how much what it
// had seen fades. `distance`: from the tile to the row's token.
inline float weigh(const Attending& job, const Tile& tile, float* scores, int64_t distance, float slope, float& highest,
                   float& total) {
    constexpr int PARTS = TILE / LANES;
    Vector part[PARTS], most = all(-INFINITY);
    Whole lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    for (int p = 0; p < PARTS; ++p) {
        const Whole key = lane + p * LANES;
        const Whole wanted = (key >= static_cast<int32_t>(tile.begin)) & (key < static_cast<int32_t>(tile.end));
        part[p] = finish_scores(job, load(scores + p * LANES) * all(job.scale), static_cast<int32_t>(distance) - key,
                                all(slope), wanted);
        most = larger(part[p], most);
    }
    float base = highest;
    for (int i = 0; i < LANES; ++i) base = most[i] > base ? most[i] : base;
    const float before = highest;
    highest = base;
    if (base == -INFINITY) base = 0;
    const float fade = decay(all(before - base))[0];
    for (int p = 0; p < PARTS; ++p) store(scores + p * LANES, decay(part[p] - all(base)));
    total = total * fade + sum_weights(scores);
    return fade;
}

// A few rows: queries and out are [R, dim].
template <int R>
void attend_few(const Attending& job, const Cut& cut, const Piece& piece, int64_t from, int64_t to,
                const float* queries, float* out, Seen& seen) {
    std::fill(seen.highest, seen.highest + R, -INFINITY);
    std::fill(seen.total, seen.total + R, 0.0f);
    while (from < to) {
        const Tile tile(job, from, to);
        from = tile.first + tile.end;
        const int64_t place = piece.key_at(job, tile.first);
        const float *key = job.key + place, *value = job.value + place;
        constexpr int KEYS = R > 2 ? 2 : 4;
        Eight products[R * TILE];
        if (tile.end - tile.begin < TILE) std::fill(products, products + R * TILE, Eight{});
        int64_t i = tile.begin;
        for (; i + KEYS <= tile.end; i += KEYS) {
            multiply_keys<R, KEYS>(job, queries, key + i * job.slot_stride, products + i);
        }
        for (; i < tile.end; ++i) multiply_keys<R, 1>(job, queries, key + i * job.slot_stride, products + i);
        float scores[R][TILE], fade[R];
        for (int r = 0; r < R; ++r) {
            for (i = 0; i < TILE; i += 8) sums_of_eight(products + r * TILE + i, scores[r] + i);
            const float slope = job.slopes ? job.slopes[piece.head(cut, r)] : 0;
            fade[r] = weigh(job, tile, scores[r], piece.position_of(cut, r) - tile.first, slope, seen.highest[r],
                            seen.total[r]);
        }
        int64_t dim = 0;
        constexpr int VECTORS = R > 3 ? 2 : 4;
        for (; dim + VECTORS * LANES <= job.dim; dim += VECTORS * LANES) {
            add_to_rows<R, VECTORS>(job, scores, tile, value + dim, fade, out + dim);
        }
        for (; dim < job.dim; dim += LANES) add_to_rows<R, 1>(job, scores, tile, value + dim, fade, out + dim);
    }
}

// The numbers of a piece's rows in a thread's memory: of a query or an output.
struct Numbers {
    float* at;
    int64_t by_row, by_dim, size;

    Numbers(const Attending& job, const Piece& piece, float* at) : at(at) {
        const bool few = piece.is_few(job);
        by_row = few ? job.dim : 1;
        by_dim = few ? 1 : piece.rows > LANES ? 2 * LANES : LANES;
        size = few ? piece.rows * job.dim : job.dim * by_dim;
    }

    float& operator()(int64_t row, int64_t dim) const { return at[row * by_row + dim * by_dim]; }

    void clear() const { memset(at, 0, static_cast<size_t>(size) * sizeof(float)); }
};

void take_queries(const Attending& job, const Cut& cut, const Piece& piece, const Numbers& queries) {
    queries.clear();
    for (int64_t row = 0; row < piece.rows; ++row) {
        const float* query = job.query + piece.place(job, cut, row);
        for (int64_t dim = 0; dim < job.dim; ++dim) queries(row, dim) = query[dim];
    }
}

// What a piece's rows see of one of its segments.
void attend_segment(const Attending& job, const Cut& cut, const Piece& piece, int64_t segment, const float* queries,
                    float* out, Seen& seen) {
    const int64_t first = (piece.first_segment + segment) * SEGMENT;
    const int64_t from = std::max(first, piece.oldest), to = std::min(first + SEGMENT, piece.end);
    Numbers(job, piece, out).clear();
    if (!piece.is_few(job)) {
        (piece.rows > LANES ? attend_rows<2> : attend_rows<1>)(job, cut, piece, from, to, queries, out, seen);
        return;
    }
    static constexpr decltype(&attend_few<1>) few[FEW_ROWS] = {attend_few<1>, attend_few<2>, attend_few<3>,
                                                               attend_few<4>};
    few[piece.rows - 1](job, cut, piece, from, to, queries, out, seen);
}

// Adds what a segment has seen to what those before it have. Rows that see nothing of it stay as they are.
void join(const Attending& job, const Piece& piece, const float* part, const Seen& later, float* sums, Seen& seen) {
    float before[MOST_ROWS] = {}, now[MOST_ROWS] = {};
    for (int64_t row = 0; row < piece.rows; ++row) {
        const float most = std::fmax(seen.highest[row], later.highest[row]);
        const float base = most == -INFINITY ? 0 : most;
        before[row] = std::exp(seen.highest[row] - base);
        now[row] = std::exp(later.highest[row] - base);
        seen.highest[row] = most;
        seen.total[row] = seen.total[row] * before[row] + later.total[row] * now[row];
    }
    const Numbers numbers(job, piece, sums);
    if (piece.is_few(job)) {
        for (int64_t row = 0; row < piece.rows; ++row, sums += job.dim, part += job.dim) {
            const float kept = before[row], added = now[row];
            for (int64_t dim = 0; dim < job.dim; ++dim) sums[dim] = sums[dim] * kept + part[dim] * added;
        }
        return;
    }
    for (int64_t dim = 0; dim < job.dim; ++dim, sums += numbers.by_dim, part += numbers.by_dim) {
        for (int64_t row = 0; row < numbers.by_dim; ++row) sums[row] = sums[row] * before[row] + part[row] * now[row];
    }
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

// The memory with room for so many floats, aligned.
inline float* room_for(std::vector<uint8_t>& memory, int64_t floats) {
    const size_t bytes = static_cast<size_t>(floats) * sizeof(float) + 64;
    if (memory.size() < bytes) memory.resize(bytes);
    return aligned(memory);
}

// Pieces that no threads share.
void attend_pieces(Attending& job, const Cut& cut, Pool& pool, float* queries, float* out, float* part) {
    Seen seen, later;
    int64_t first, last;
    while (pool.take(job.next, cut.pieces(job), 1, &first, &last)) {
        const Piece piece(job, cut, first);
        take_queries(job, cut, piece, Numbers(job, piece, queries));
        attend_segment(job, cut, piece, 0, queries, out, seen);
        for (int64_t segment = 1; segment < piece.segments; ++segment) {
            attend_segment(job, cut, piece, segment, queries, part, later);
            join(job, piece, part, later, out, seen);
        }
        leave(job, cut, piece, Numbers(job, piece, out), seen);
    }
}

// Pieces whose segments threads share. Returns when all are computed, not yet joined.
void attend_shares(Attending& job, const Cut& cut, Pool& pool, float* queries, float* partial) {
    const int64_t size = partial_size(job);
    int64_t first, last;
    while (pool.take(job.next, cut.pieces(job) * cut.shares, 1, &first, &last)) {
        const int64_t index = first / cut.shares, share = first % cut.shares;
        const Piece piece(job, cut, index);
        const int64_t end = piece.segments * (share + 1) / cut.shares;
        int64_t segment = piece.segments * share / cut.shares;
        if (segment < end) take_queries(job, cut, piece, Numbers(job, piece, queries));
        for (; segment < end; ++segment) {
            Seen seen;
            float* to = partial + (index * cut.segments + segment) * size;
            attend_segment(job, cut, piece, segment, queries, to, seen);
            memcpy(to + job.dim * MOST_ROWS, &seen, sizeof seen);
        }
    }
    pool.barrier();
}

void attend(Attending& job, int thread, Pool& pool) {
    const Cut cut(job, pool.size());
    const int64_t numbers = job.dim * MOST_ROWS;
    float* queries = room_for(pool.scratch(thread), 3 * numbers);
    float *out = queries + numbers, *part = out + numbers;
    if (cut.shares == 1) {
        attend_pieces(job, cut, pool, queries, out, part);
        return;
    }
    const int64_t pieces = cut.pieces(job), size = partial_size(job);
    if (thread == 0) room_for(pool.shared(), pieces * cut.segments * size);
    pool.barrier();
    float* partial = aligned(pool.shared());
    attend_shares(job, cut, pool, queries, partial);
    for (int64_t index = thread; index < pieces; index += pool.size()) {
        const Piece piece(job, cut, index);
        float* sums = partial + index * cut.segments * size;
        Seen seen, later;
        memcpy(&seen, sums + numbers, sizeof seen);
        for (int64_t segment = 1; segment < piece.segments; ++segment) {
            const float* from = sums + segment * size;
            memcpy(&later, from + numbers, sizeof later);
            join(job, piece, from, later, sums, seen);
        }
        leave(job, cut, piece, Numbers(job, piece, sums), seen);
    }
}

}  // namespace
}  // namespace pagewire
