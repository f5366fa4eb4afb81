// Steps that were recorded once and run again and again in one call.
#include <cstdint>
#include <cstring>

#include "library.h"

namespace {

struct Multiplying {
    int64_t kind;
    const uint8_t* panels;
    int64_t rows, columns, group;
    const float* x;
    int64_t x_stride, tokens;
    const float* bias;
    float* out;
};

struct Embedding {
    int64_t kind;
    const uint8_t* panels;
    int64_t columns, group;
    const int64_t* ids;
    int64_t tokens;
    float* out;
};

struct Gathering {
    const float* x;          // [any, size]
    const int64_t* index;    // [count], rows of x
    float* out;              // [count, size]
    int64_t count, size;
};

enum Operation : int64_t { MULTIPLY, EMBED, NORM, GATE, ROTATE, ATTEND, GATHER, SCALE, ADAPT };

}  // namespace

extern "C" {

// One step: `operation` says what `job` is.
void pagewire_do(PagewireLibrary* library, int64_t operation, void* job) {
    switch (operation) {
        case MULTIPLY: {
            const auto& m = *static_cast<Multiplying*>(job);
            pagewire_multiply(library, static_cast<int>(m.kind), m.panels, m.rows, m.columns, m.group, m.x,
                              m.x_stride, m.tokens, m.bias, m.out, m.rows);
            break;
        }
        case EMBED: {
            const auto& e = *static_cast<Embedding*>(job);
            pagewire_embed(library, static_cast<int>(e.kind), e.panels, e.columns, e.group, e.ids, e.tokens,
                           e.out);
            break;
        }
        case NORM: pagewire_norm(library, static_cast<pagewire::Norm*>(job)); break;
        case GATE: pagewire_gate(library, static_cast<pagewire::Gating*>(job)); break;
        case ROTATE: pagewire_rotate(library, static_cast<pagewire::Rotating*>(job)); break;
        case ATTEND: pagewire_attend(library, static_cast<pagewire::Attending*>(job)); break;
        case SCALE: pagewire_scale(library, static_cast<pagewire::Scaling*>(job)); break;
        case ADAPT: pagewire_adapt(library, static_cast<pagewire::Adapting*>(job)); break;
        case GATHER: {
            const auto& g = *static_cast<Gathering*>(job);
            for (int64_t row = 0; row < g.count; ++row)
                memcpy(g.out + row * g.size, g.x + g.index[row] * g.size, static_cast<size_t>(g.size) * sizeof(float));
            break;
        }
    }
}

struct PagewireStep {
    int64_t operation;
    void* job;
};

void pagewire_run(PagewireLibrary* library, const PagewireStep* steps, int64_t count) {
    for (int64_t step = 0; step < count; ++step) pagewire_do(library, steps[step].operation, steps[step].job);
}
}
