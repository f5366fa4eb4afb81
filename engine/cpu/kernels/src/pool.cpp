#include "pool.h"

#include <algorithm>

namespace pagewire {
namespace {

// Looks at a value before a thread sleeps: some 50 us. Those behind the first let others have the processor between
// them, since one of those may be the thread that is waited for.
constexpr int LOOKS = 2000;
constexpr int FIRST_LOOKS = 200;
constexpr int LOOKS_A_TURN = 20;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int size) : size_(size), scratch_(static_cast<size_t>(size)) {
    for (int thread = 1; thread < size; ++thread) threads_.emplace_back([this, thread] { follow(thread); });
}

Pool::~Pool() {
    closing_.store(true);
    generation_.fetch_add(1);
    generation_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Pool::run(Work work, void* argument) {
    work_ = work;
    argument_ = argument;
    if (size_ > 1) {
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
    }
    work(argument, 0, *this);
    barrier();
}

void Pool::follow(int thread) {
    uint32_t seen = 0;
    for (;;) {
        wait_for(generation_, seen);
        ++seen;
        if (closing_.load()) return;
        work_(argument_, thread, *this);
        barrier();
    }
}

void Pool::wait_for(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int look = 0; look < LOOKS; ++look) {
        if (value.load(std::memory_order_acquire) != old) return;
        if (look >= FIRST_LOOKS && look % LOOKS_A_TURN == 0) {
            std::this_thread::yield();
        } else {
            relax();
        }
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

void Pool::barrier() {
    if (size_ == 1) return;
    uint32_t before = barriers_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size_)) {
        arrived_.store(0, std::memory_order_relaxed);
        barriers_.fetch_add(1, std::memory_order_release);
        barriers_.notify_all();
    } else {
        wait_for(barriers_, before);
    }
}

bool Pool::take(std::atomic<int64_t>& next, int64_t count, int64_t most, int64_t* first, int64_t* last) {
    *first = next.fetch_add(most, std::memory_order_relaxed);
    *last = std::min(*first + most, count);
    return *first < count;
}

}  // namespace pagewire
