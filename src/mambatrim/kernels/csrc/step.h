// A whole step of a method between two blocks, from scores or features to the tokens after it: the kernels of the other
// files one after the other, for at batch 1 their small results cost more to hand to Python and back than to make.
#pragma once
#include <algorithm>

#include "abi.h"
#include "cluster.h"
#include "memory.h"
#include "merge.h"
#include "nearest.h"

namespace {

constexpr int64_t WORTH_SORTING = 1024;  // tokens of all images that pay for waking threads

// Marks where the special tokens of image b are now; false where one is gone.
template <class Args>
INLINE bool mark_special(const Args& p, const int64_t* special, int64_t b, char* marks) {
    const int64_t* dest = (const int64_t*)p.origin_dest + b * p.first;
    memset(marks, 0, (size_t)p.length);
    for (int64_t i = 0; i < p.special; i++) {
        if (outside(special[i], p.first) || outside(dest[special[i]], p.length)) return false;
        marks[dest[special[i]]] = 1;
    }
    return true;
}

// What both kinds of step end with.
template <class Args>
int merge_step(const Args& p, const int64_t* keep, const int64_t* dest) {
    return merge({p.batch, p.first, p.length, p.length - p.r, p.columns, p.threads, (int64_t)keep, (int64_t)dest,
                  p.origin_keep, p.origin_dest, p.size, p.size, p.x, p.out_size, p.out_x, p.out_keep, p.out_dest});
}

// The first n patches by rank, the least important first, of equals the first in the sequence; NaN comes last, as in
// torch.sort. False where there are not so many.
INLINE bool rank(const RankedArgs& p, int64_t b, int64_t n, const char* marks, uint64_t* keys, int64_t* order) {
    const float* score = (const float*)p.score + b * p.directions * p.length;
    int64_t patches = 0;
    for (int64_t t = 0; t < p.length; t++) {
        if (marks[t]) continue;
        float total = score[t];
        for (int64_t s = 1; s < p.directions; s++) total += score[s * p.length + t];
        total += 0.0f;  // no negative zero
        uint32_t bits;
        memcpy(&bits, &total, sizeof bits);
        bits = total != total ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;  // ordered as unsigned
        keys[patches++] = (uint64_t)bits << 32 | (uint64_t)t;
    }
    if (patches < n) return false;
    if (n < patches) std::nth_element(keys, keys + n, keys + patches);
    std::sort(keys, keys + n);
    for (int64_t i = 0; i < n; i++) order[i] = (int64_t)(keys[i] & 0xffffffffu);
    return true;
}

int ranked_step(const RankedArgs& p) {
    const int64_t kept = p.length - p.r, n = p.r + p.targets;
    Memory<int64_t> order(p.batch * n), best(p.batch * p.r), keep(p.batch * kept), dest(p.batch * p.length);
    Memory<float> similarity(p.batch * p.r);
    if (!order || !best || !keep || !dest || !similarity) return 1;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads((int)p.threads) if (p.threads > 1 && p.batch > 1 && p.batch * p.length > WORTH_SORTING)
    for (int64_t b = 0; b < p.batch; b++) {
        Memory<char> marks(p.length);
        Memory<uint64_t> keys(p.length);
        const bool memory = marks && keys;
        if (memory && mark_special(p, (const int64_t*)(&p + 1), b, marks) && rank(p, b, n, marks, keys, order + b * n)) continue;
#pragma omp atomic write
        failed = memory ? 2 : 1;
    }
    if (failed) return failed;
    const int64_t source = (int64_t)order.data, target = source + p.r * (int64_t)sizeof(int64_t);
    failed = nearest({p.batch, p.length, p.columns, p.r, p.targets, p.threads, p.x, source, n, target, n, (int64_t)best.data,
                      (int64_t)similarity.data});
    if (failed) return failed;
    failed = links({p.batch, p.length, p.r, source, n, (int64_t)best.data, p.r, (int64_t)keep.data, (int64_t)dest.data});
    return failed ? failed : merge_step(p, keep, dest);
}

// Of the patches of image b: positions, sizes, and places on the sequence and on the grid, each times its price.
INLINE bool patches_of(const ClusteredArgs& p, int64_t b, const char* marks, int64_t* positions, float* weight,
                       float* coordinates) {
    const int64_t *sides = (const int64_t*)(&p + 1), *special = sides + p.sides;
    const int64_t* origin = (const int64_t*)p.origin_keep + b * p.length;
    int64_t patch = 0;
    for (int64_t t = 0; t < p.length; t++) {
        if (marks[t]) continue;
        if (patch == p.length - p.special) return false;
        positions[patch] = t;
        weight[patch++] = ((const float*)p.size)[b * p.length + t];
        int64_t id = origin[t];
        for (int64_t i = 0; i < p.special; i++) id -= origin[t] > special[i];
        *coordinates++ = (float)id * (float)p.distance;
        if (p.apart == 0.0) continue;
        for (int64_t side = p.sides - 1; side > 0; id /= sides[side--]) *coordinates++ = (float)(id % sides[side]) * (float)p.apart;
        *coordinates++ = (float)id * (float)p.apart;
    }
    return patch == p.length - p.special;
}

int clustered_step(const ClusteredArgs& p) {
    const int64_t patches = p.length - p.special, left = patches - p.r, axes = p.apart == 0.0 ? 1 : 1 + p.sides;
    const int64_t* special = (const int64_t*)(&p + 1) + p.sides;
    for (int64_t i = 0; i < p.sides; i++)
        if (((const int64_t*)(&p + 1))[i] < 1) return 2;
    Memory<char> marks(p.length);
    Memory<int64_t> positions(p.batch * patches), fixed(p.batch * p.special), plan_keep(p.batch * left),
        plan_dest(p.batch * patches), keep(p.batch * (p.length - p.r)), dest(p.batch * p.length);
    Memory<float> weight(p.batch * patches), coordinates(p.batch * patches * axes);
    if (!marks || !positions || !fixed || !plan_keep || !plan_dest || !keep || !dest || !weight || !coordinates) return 1;
    for (int64_t b = 0; b < p.batch; b++) {
        if (!mark_special(p, special, b, marks)) return 2;
        for (int64_t i = 0; i < p.special; i++)
            fixed[b * p.special + i] = ((const int64_t*)p.origin_dest)[b * p.first + special[i]];
        if (!patches_of(p, b, marks, positions + b * patches, weight + b * patches, coordinates + b * patches * axes)) return 2;
    }
    int failed = agglomerate({p.batch, patches, p.columns, axes, p.r, p.threads, p.length, p.x, (int64_t)positions.data,
                              (int64_t)weight.data, (int64_t)coordinates.data, (int64_t)plan_keep.data,
                              (int64_t)plan_dest.data, p.exponent});
    if (failed) return failed;
    failed = lift({p.batch, p.length, p.special, left, patches, (int64_t)positions.data, (int64_t)fixed.data, p.special,
                   (int64_t)plan_keep.data, (int64_t)plan_dest.data, (int64_t)keep.data, (int64_t)dest.data});
    return failed ? failed : merge_step(p, keep, dest);
}

}  // namespace
