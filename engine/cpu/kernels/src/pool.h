// Threads that work on one thing together.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace pagewire {

// The caller's thread and `size - 1` of its own. They watch for the next piece of work for a while before they sleep,
// since a step is hundreds of pieces one after the other, and they use no processor time between steps.
class Pool {
   public:
    using Work = void (*)(void* argument, int thread, Pool& pool);

    explicit Pool(int size);
    ~Pool();
    int size() const { return size_; }

    // Calls work(argument, thread, pool) once on each thread; returns when all have.
    void run(Work work, void* argument);

    // From within work: waits until every thread is here.
    void barrier();

    // From within work, after a barrier or the beginning: what is left of `count` pieces, `most` at a time. All threads
    // ask with the same counter; false when there is nothing left.
    bool take(std::atomic<int64_t>& next, int64_t count, int64_t most, int64_t* first, int64_t* last);

    // Memory that work may use, kept for the next call: bytes of it for each thread.
    std::vector<uint8_t>& scratch(int thread) { return scratch_[thread]; }
    std::vector<uint8_t>& shared() { return shared_; }

   private:
    void follow(int thread);
    void wait_for(const std::atomic<uint32_t>& value, uint32_t old);

    int size_;
    Work work_ = nullptr;
    void* argument_ = nullptr;
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> barriers_{0};
    std::atomic<bool> closing_{false};
    std::vector<std::thread> threads_;
    std::vector<std::vector<uint8_t>> scratch_;
    std::vector<uint8_t> shared_;
};

}  // namespace pagewire
