// Which thread does what.
#pragma once
#include <atomic>
#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "vec.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 16;  // bytes moved, or a quarter of the multiply-adds, that pay for waking them

INLINE int64_t own_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// The tasks of a parallel region. A thread does those of its own share first, the same ones of kernels after each other, so
// that what it made is still in its cache; then what others have left, for threads do not run equally fast.
class Shares {
    static constexpr int64_t MOST = 64;
    struct alignas(64) Next {
        std::atomic<int64_t> task;
    };
    int64_t tasks, shares;
    Next next[MOST];

    int64_t end(int64_t share) const { return (share + 1) * tasks / shares; }

   public:
    Shares(int64_t tasks, int64_t threads) : tasks(tasks), shares(threads < MOST ? threads : MOST) {
        for (int64_t share = 0; share < shares; share++) next[share].task = share * tasks / shares;
    }
    // Every thread of the region calls this.
    template <class Run>
    void work(Run run) {
        for (int64_t k = 0; k < shares; k++) {
            const int64_t share = (own_number() + k) % shares;
            for (int64_t task; (task = next[share].task.fetch_add(1, std::memory_order_relaxed)) < end(share);) run(task);
        }
    }
};

}  // namespace
