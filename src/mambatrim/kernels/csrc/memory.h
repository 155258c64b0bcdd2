// Workspace of the kernels, and what those that take positions share.
#pragma once
#include <cstdint>
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vec.h"

namespace {

INLINE bool outside(int64_t position, int64_t length) { return (uint64_t)position >= (uint64_t)length; }

// Memory of n elements, freed with its scope.
template <typename T>
struct Memory {
    T* data;
    explicit Memory(int64_t n) : data((T*)malloc((size_t)(n > 0 ? n : 1) * sizeof(T))) {}
    ~Memory() { free(data); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    operator T*() const { return data; }
};

// A 64-byte aligned scratch array of n vectors, freed with its scope.
struct Scratch {
    vf* data;
    explicit Scratch(int64_t n) : data((vf*)aligned_alloc(64, ((n > 0 ? n : 1) * (int64_t)sizeof(vf) + 63) / 64 * 64)) {}
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator vf*() const { return data; }
};

// Scratch that the thread keeps for its next call, unless it is large: fresh memory costs a page fault every 4 KiB, and
// large pages spare the many misses of walks along tokens. One place in the code has one of these, a static thread_local.
struct Kept {
    static constexpr int64_t MOST = 16 << 20, PAGE = 2 << 20;  // bytes
    vf* data = nullptr;
    int64_t size = 0;
    ~Kept() { free(data); }
    vf* take(int64_t n) {  // n vectors, or null where there is no memory
        const int64_t bytes = n * (int64_t)sizeof(vf), unit = bytes >= PAGE / 2 ? PAGE : 4096;
        if (bytes <= size && data) return data;
        free(data);
        size = (bytes + unit - 1) / unit * unit;
        data = (vf*)aligned_alloc((size_t)unit, (size_t)size);
        if (!data) size = 0;
#if defined(__linux__)
        else if (unit == PAGE) madvise(data, (size_t)size, MADV_HUGEPAGE);  // where it is refused, all is as before
#endif
        return data;
    }
    void drop() {
        if (size <= MOST) return;
        free(data);
        data = nullptr, size = 0;
    }
};

}  // namespace
