// What Python calls.
#include <algorithm>
#include <cmath>

#include "library.h"
#include "pagewire.h"
#include "pool.h"
#include "processor.h"

using namespace pagewire;

namespace {

const Instructions* choose(const char* wanted) {
    const Instructions* known[] = {
#if defined(PAGEWIRE_AVX512)
        has_avx512() ? &avx512_instructions() : nullptr,
#endif
#if defined(PAGEWIRE_AVXVNNI)
        has_avxvnni() ? &avxvnni_instructions() : nullptr,
#endif
#if defined(PAGEWIRE_AVX2)
        has_avx2() ? &avx2_instructions() : nullptr,
#endif
        &plain_instructions(),
    };
    for (const Instructions* each : known) {
        if (each && (!*wanted || !strcmp(each->name, wanted))) return each;
    }
    return nullptr;
}

struct Packing {
    int kind;
    const uint8_t* source;  // as a file has it, or the codes of integers in groups
    int64_t row_bytes, rows, columns;
    const float *scales, *minima;  // of groups
    int64_t group;
    uint8_t* panels;
    std::atomic<int64_t> next{0};
};

void pack(void* argument, int, Pool& pool) {
    auto& job = *static_cast<Packing*>(argument);
    const int64_t bytes = panel_bytes(job.kind, job.columns, job.group);
    const int64_t groups = job.group ? (job.columns / BLOCK + job.group - 1) / job.group : 0;
    int64_t first, last;
    while (pool.take(job.next, (job.rows + ROWS - 1) / ROWS, 8, &first, &last)) {
        for (int64_t panel = first; panel < last; ++panel) {
            int rows = static_cast<int>(std::min<int64_t>(ROWS, job.rows - panel * ROWS));
            const uint8_t* source = job.source + panel * ROWS * job.row_bytes;
            uint8_t* to = job.panels + panel * bytes;
            if (!is_grouped(job.kind)) {
                pack_panel(job.kind, source, job.row_bytes, rows, job.columns, to);
                continue;
            }
            const int64_t before = panel * ROWS * groups;
            pack_groups(job.kind, source, job.scales + before, job.minima + before, rows, job.columns, job.group, to);
        }
    }
}

void need(std::vector<uint8_t>& memory, size_t bytes) {
    if (memory.size() < bytes) memory.resize(bytes);
}

size_t rounded_bytes(const Tokens& x) {
    return static_cast<size_t>(x.num_tokens * (x.columns / BLOCK)) * sizeof(Rounded);
}

struct Multiplying {
    const Instructions* instructions;
    int kind;
    Product product;
    std::atomic<int64_t> next{0};
};

// Tokens up to which each thread turns all of them into 8 bits, rather than wait for the others to do their part.
constexpr int64_t FEW_TOKENS = 2;

void multiply(void* argument, int thread, Pool& pool) {
    auto& job = *static_cast<Multiplying*>(argument);
    Product product = job.product;
    const int64_t tokens = product.x.num_tokens;
    if (!is_16_bit(job.kind)) {
        const bool alone = tokens <= FEW_TOKENS;
        auto& memory = alone ? pool.scratch(thread) : pool.shared();
        if (alone) need(memory, rounded_bytes(product.x));
        product.x.blocks = reinterpret_cast<Rounded*>(memory.data());
        if (alone) {
            job.instructions->quantize(product, 0, tokens);
        } else {
            job.instructions->quantize(product, tokens * thread / pool.size(), tokens * (thread + 1) / pool.size());
            pool.barrier();
        }
    }
    const int64_t panels = (product.rows + ROWS - 1) / ROWS;
    const int64_t most = std::max<int64_t>(1, panels / (pool.size() * 8));
    int64_t first, last;
    while (pool.take(job.next, panels, most, &first, &last)) {
        job.instructions->multiply[job.kind](product, first, last);
    }
}

struct Embedding {
    int kind;
    const uint8_t* panels;
    int64_t columns, group;
    const int64_t* ids;
    float* out;
};

void embed(const Embedding& job, int64_t first, int64_t last) {
    const int64_t bytes = panel_bytes(job.kind, job.columns, job.group);
    for (int64_t token = first; token < last; ++token) {
        const int64_t id = job.ids[token];
        unpack_row(job.kind, job.panels + id / ROWS * bytes, static_cast<int>(id % ROWS), job.columns,
                   job.group, job.out + token * job.columns);
    }
}

// A kernel over the tokens of a job, which do not depend on each other.
template <class Job>
struct OverTokens {
    void (*kernel)(const Job& job, int64_t first, int64_t last);
    const Job* job;
    int64_t tokens;

    static void work(void* argument, int thread, Pool& pool) {
        auto& self = *static_cast<OverTokens*>(argument);
        self.kernel(*self.job, self.tokens * thread / pool.size(), self.tokens * (thread + 1) / pool.size());
    }
};

// Numbers below which waking the other threads takes longer than they save.
constexpr int64_t FEW_NUMBERS = 1 << 14;

template <class Job>
void over_tokens(Pool& pool, void (*kernel)(const Job&, int64_t, int64_t), const Job& job, int64_t tokens,
                 int64_t numbers_each) {
    if (tokens * numbers_each < FEW_NUMBERS) {
        kernel(job, 0, tokens);
        return;
    }
    OverTokens<Job> all = {kernel, &job, tokens};
    pool.run(OverTokens<Job>::work, &all);
}

struct AdapterWork {
    const Layers* layers;
    const Adapting* job;

    static void work(void* argument, int thread, Pool& pool) {
        auto& self = *static_cast<AdapterWork*>(argument);
        const int64_t shrunk = self.job->tokens * self.job->parts * self.job->rank;
        const int64_t out = self.job->tokens * self.job->rows;
        self.layers->shrink(*self.job, shrunk * thread / pool.size(), shrunk * (thread + 1) / pool.size());
        pool.barrier();
        self.layers->expand(*self.job, out * thread / pool.size(), out * (thread + 1) / pool.size());
    }
};

struct AttentionWork {
    const Layers* layers;
    Attending* job;

    static void work(void* argument, int thread, Pool& pool) {
        auto& self = *static_cast<AttentionWork*>(argument);
        self.layers->attend(*self.job, thread, pool);
    }
};

}  // namespace

extern "C" {

struct PagewireLibrary {
    Pool pool;
    const Instructions* instructions;
};

// `instructions`: "" for the best that the processor has. Null if it lacks those asked for.
PagewireLibrary* pagewire_open(int threads, const char* instructions) {
    const Instructions* chosen = choose(instructions);
    return chosen ? new PagewireLibrary{Pool(threads), chosen} : nullptr;
}

void pagewire_close(PagewireLibrary* library) { delete library; }

const char* pagewire_instructions(PagewireLibrary* library) { return library->instructions->name; }

int64_t pagewire_packed_bytes(int kind, int64_t rows, int64_t columns, int64_t group) {
    return (rows + ROWS - 1) / ROWS * panel_bytes(kind, columns, group);
}

void pagewire_pack(PagewireLibrary* library, int kind, const uint8_t* source, int64_t rows, int64_t columns,
                   uint8_t* panels) {
    const int64_t row_bytes = columns / unit_columns(kind) * file_bytes(kind);
    Packing job = {kind, source, row_bytes, rows, columns, nullptr, nullptr, 0, panels};
    library->pool.run(pack, &job);
}

// codes [rows, columns], scales and minima [rows, groups]; a group is so many blocks, the last one may be shorter.
void pagewire_pack_groups(PagewireLibrary* library, int kind, const uint8_t* codes, const float* scales,
                          const float* minima, int64_t rows, int64_t columns, int64_t group, uint8_t* panels) {
    Packing job = {kind, codes, columns, rows, columns, scales, minima, group, panels};
    library->pool.run(pack, &job);
}

void pagewire_multiply(PagewireLibrary* library, int kind, const uint8_t* panels, int64_t rows, int64_t columns,
                       int64_t group, const float* x, int64_t x_stride, int64_t tokens, const float* bias, float* out,
                       int64_t out_stride) {
    Multiplying job;
    job.instructions = library->instructions;
    job.kind = kind;
    job.product = {panels, rows, group, {nullptr, columns, tokens}, x, x_stride, bias, out, out_stride};
    if (!is_16_bit(kind)) need(library->pool.shared(), rounded_bytes(job.product.x));
    library->pool.run(multiply, &job);
}

// Ids are below the matrix's rows.
void pagewire_embed(PagewireLibrary* library, int kind, const uint8_t* panels, int64_t columns, int64_t group,
                    const int64_t* ids, int64_t tokens, float* out) {
    over_tokens<Embedding>(library->pool, embed, {kind, panels, columns, group, ids, out}, tokens, columns);
}

void pagewire_norm(PagewireLibrary* library, const Norm* job) {
    over_tokens(library->pool, library->instructions->layers.norm, *job, job->tokens, job->size);
}

void pagewire_gate(PagewireLibrary* library, const Gating* job) {
    over_tokens(library->pool, library->instructions->layers.gate, *job, job->tokens, job->size * 4);
}

void pagewire_scale(PagewireLibrary* library, const Scaling* job) {
    over_tokens(library->pool, library->instructions->layers.scale, *job, job->tokens, job->size);
}

void pagewire_rotate(PagewireLibrary* library, const Rotating* job) {
    over_tokens(library->pool, library->instructions->layers.rotate, *job, job->tokens, job->heads * job->dim);
}

void pagewire_adapt(PagewireLibrary* library, Adapting* job) {
    AdapterWork work = {&library->instructions->layers, job};
    library->pool.run(AdapterWork::work, &work);
}

void pagewire_attend(PagewireLibrary* library, Attending* job) {
    job->next.store(0);
    AttentionWork work = {&library->instructions->layers, job};
    library->pool.run(AttentionWork::work, &work);
}
}
