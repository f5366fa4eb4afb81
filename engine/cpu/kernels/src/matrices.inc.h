// Products with matrices in 16 bits, in fp32. Included once for each instruction set, by a file compiled for it.
#include <algorithm>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "pagewire.h"
#include "vectors.h"

namespace pagewire {
namespace {

constexpr int VECTORS = ROWS / LANES;               // of a panel
constexpr int MOST_PANELS = LANES == 16 ? 2 : 1;    // at a time
constexpr int MOST_TOKENS = LANES == 16 ? 12 : 6;   // at a time: as many sums as registers hold
constexpr int64_t PART_COLUMNS = 512;               // of a panel, which stay in the first cache
constexpr int64_t PART_TOKENS = 128;                // whose columns stay in the second

inline Vector load_halves(const uint8_t* at) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#elif defined(__F16C__)
    return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#else
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    Halves halves;
    memcpy(&halves, at, sizeof halves);
    const Whole bits = __builtin_convertvector(halves, Whole), size = (bits & 0x7fff) << 13;
    // As an fp32 its exponent is 112 too small, also for those that are not normal.
    Vector value = reinterpret_cast<Vector>(size) * all(0x1p112f);
    const Whole endless = size >= (0x7c00 << 13);
    value = select(endless, reinterpret_cast<Vector>(size | 0x7f800000), value);
    return reinterpret_cast<Vector>(reinterpret_cast<Whole>(value) | (bits & 0x8000) << 16);
#endif
}

inline Whole load_whole(const uint8_t* at) {
    Whole value;
    memcpy(&value, at, sizeof value);
    return value;
}

// Some rows' sums of a token to where they belong: added to what is there, or else to the bias.
__attribute__((noinline)) void finish(const Product& product, int64_t row, int64_t token, Vector sum, bool adds) {
    const int64_t left = product.rows - row;
    float* to = product.out + token * product.out_stride + row;
    const float* other = adds ? to : product.bias ? product.bias + row : nullptr;
    if (left >= LANES) {
        store(to, other ? sum + load(other) : sum);
        return;
    }
    for (int64_t i = 0; i < left; ++i) to[i] = other ? sum[i] + other[i] : sum[i];
}

// The last of an odd number of BF16 columns.
void add_last_column(const Product& product, int64_t first, int64_t last) {
    const int64_t column = product.x.columns - 1, rows = std::min(last * ROWS, product.rows);
    const uint8_t* panels = product.panels + column * ROWS * 2;
    for (int64_t token = 0; token < product.x.num_tokens; ++token) {
        const float number = product.numbers[token * product.numbers_stride + column];
        float* out = product.out + token * product.out_stride;
        for (int64_t row = first * ROWS; row < rows; ++row) {
            uint16_t upper;
            memcpy(&upper, panels + row / ROWS * panel_bytes(BF16, product.x.columns, 0) + row % ROWS * 4, 2);
            const uint32_t bits = static_cast<uint32_t>(upper) << 16;
            float weight;
            memcpy(&weight, &bits, 4);
            out[row] += weight * number;
        }
    }
}

// Columns first to last of some panels and tokens: added to `out`, or written there if first is 0. Of BF16 both are
// even.
template <int KIND, int PANELS, int T>
void multiply_part(const Product& product, int64_t panel, int64_t token, int64_t first, int64_t last) {
    constexpr int V = PANELS * VECTORS;
    const int64_t bytes = panel_bytes(KIND, product.x.columns, 0);
    const uint8_t* at[PANELS];
    const float* x[T];
    for (int p = 0; p < PANELS; ++p) at[p] = product.panels + (panel + p) * bytes + first * ROWS * 2;
    for (int t = 0; t < T; ++t) x[t] = product.numbers + (token + t) * product.numbers_stride;
    Vector sums[T][V] = {};
    auto add = [&](const Vector (&weights)[V], int64_t column) __attribute__((always_inline)) {
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
            const Vector number = all(x[t][column]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[t][v] = fused(weights[v], number, sums[t][v]);
        }
    };
    auto load_at = [&](int v) __attribute__((always_inline)) { return at[v / VECTORS] + v % VECTORS * LANES * (KIND == BF16 ? 4 : 2); };
    int64_t column = first;
    if (KIND == BF16) {
        Vector weights[V];
        Whole upper = Whole{} + static_cast<int32_t>(0xffff0000);
        for (; column + 2 <= last; column += 2) {
            for (int v = 0; v < V; ++v) weights[v] = reinterpret_cast<Vector>(load_whole(load_at(v)) << 16);
            add(weights, column);
            // Loaded again, and the mask too: there is no register to keep them in.
            for (int p = 0; p < PANELS; ++p) asm("" : "+r"(at[p]));
            asm("" : "+m"(upper));
            for (int v = 0; v < V; ++v) weights[v] = reinterpret_cast<Vector>(load_whole(load_at(v)) & upper);
            add(weights, column + 1);
            for (int p = 0; p < PANELS; ++p) at[p] += ROWS * 4;
        }
    } else {
        for (; column < last; ++column) {
            Vector weights[V];
            for (int v = 0; v < V; ++v) weights[v] = load_halves(load_at(v));
            for (int p = 0; p < PANELS; ++p) at[p] += ROWS * 2;
            add(weights, column);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            finish(product, panel * ROWS + v * LANES, token + t, sums[t][v], first > 0);
        }
    }
}

template <int KIND, int PANELS>
void multiply_tokens(const Product& product, int64_t panel, int64_t token, int64_t end, int64_t first, int64_t last) {
    auto pass = [&]<int T>() {
        for (; token + T <= end; token += T) multiply_part<KIND, PANELS, T>(product, panel, token, first, last);
    };
    pass.template operator()<MOST_TOKENS>();
    pass.template operator()<4>();
    pass.template operator()<2>();
    pass.template operator()<1>();
}

// Columns first to last of panels `panel` to `last_panel`, and of tokens `token` to `end`.
template <int KIND>
void multiply_panels(const Product& product, int64_t panel, int64_t last_panel, int64_t token, int64_t end,
                     int64_t first, int64_t last) {
    for (; panel + MOST_PANELS <= last_panel; panel += MOST_PANELS) {
        multiply_tokens<KIND, MOST_PANELS>(product, panel, token, end, first, last);
    }
    for (; panel < last_panel; ++panel) multiply_tokens<KIND, 1>(product, panel, token, end, first, last);
}

// The columns of each part are summed one after the other, and then the parts, however many tokens there are: their
// bits do not depend on it.
template <int KIND>
void multiply_matrix(const Product& product, int64_t first, int64_t last) {
    const bool odd = KIND == BF16 && product.x.columns % 2;
    const int64_t columns = product.x.columns - odd, tokens = product.x.num_tokens;
    // A few tokens walk through each panel once; for many all panels' parts are read again.
    const int64_t at_once = tokens > MOST_TOKENS ? last - first : MOST_PANELS;
    for (int64_t token = 0; token < tokens; token += PART_TOKENS) {
        const int64_t end = std::min(token + PART_TOKENS, tokens);
        for (int64_t panel = first; panel < last; panel += at_once) {
            const int64_t last_panel = std::min(panel + at_once, last);
            int64_t column = 0;
            do {
                const int64_t column_end = std::min(column + PART_COLUMNS, columns);
                multiply_panels<KIND>(product, panel, last_panel, token, end, column, column_end);
                column = column_end;
            } while (column < columns);
        }
    }
    if (odd) add_last_column(product, first, last);
}

const Matrices MATRICES = {multiply_matrix<BF16>, multiply_matrix<F16>};

}  // namespace
}  // namespace pagewire
