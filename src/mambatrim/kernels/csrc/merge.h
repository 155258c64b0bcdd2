// The step between two blocks: rows by position, and assignments (definition: reduction/assignment.py). Results do not
// depend on the number of threads.
//
// Return codes: 0 done, 1 no memory, 2 a position that is not there or is named twice.
#pragma once
#include "abi.h"
#include "memory.h"
#include "threads.h"
#include "vec.h"

namespace {

// ------------------------------------------------------------------------------------------------------------ rows

int take_rows(const RowsArgs& p) {
    const int64_t images = p.batch * p.directions;
    [[maybe_unused]] const int64_t worth = images * p.count * p.bytes;  // unused without OpenMP, as below
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads((int)p.threads) if (p.threads > 1 && worth > WORTH_THREADS)
    for (int64_t image = 0; image < images; image++) {
        const int64_t* positions = (const int64_t*)p.positions + image / p.directions * p.positions_batch;
        const char* x = (const char*)p.x + image * p.length * p.bytes;
        char* y = (char*)p.y + image * p.count * p.bytes;
        for (int64_t i = 0; i < p.count; i++) {
            if (outside(positions[i], p.length + p.or_zeros)) {
#pragma omp atomic write
                failed = 2;
                break;
            }
            if (positions[i] == p.length) {
                memset(y + i * p.bytes, 0, (size_t)p.bytes);
                continue;
            }
            if (p.bytes == 4) memcpy(y + i * 4, x + positions[i] * 4, 4);
            else memcpy(y + i * p.bytes, x + positions[i] * p.bytes, (size_t)p.bytes);
        }
    }
    return failed;
}

int inverse(const InverseArgs& p) {
    for (int64_t i = 0; i < p.count; i++) ((float*)p.y)[i] = 1.0f / ((const float*)p.x)[i];
    return 0;
}

// ----------------------------------------------------------------------------------------------------- assignments

// Marks n of the tokens of an image with `value` (0 or 1) and the others with its opposite; false where a position is wrong.
INLINE bool mark(const int64_t* positions, int64_t n, int64_t length, char value, char* marks) {
    memset(marks, !value, (size_t)length);
    for (int64_t i = 0; i < n; i++) {
        if (outside(positions[i], length) || marks[positions[i]] == value) return false;
        marks[positions[i]] = value;
    }
    return true;
}

int links(const LinksArgs& p) {
    const int64_t kept = p.length - p.sources;
    Memory<char> marks(p.length);
    if (!marks) return 1;
    for (int64_t b = 0; b < p.batch; b++) {
        const int64_t* source = (const int64_t*)p.source + b * p.source_batch;
        int64_t *keep = (int64_t*)p.keep + b * kept, *dest = (int64_t*)p.dest + b * p.length;
        if (!mark(source, p.sources, p.length, 0, marks)) return 2;
        int64_t next = 0;
        for (int64_t t = 0; t < p.length; t++) {
            dest[t] = marks[t] ? next : kept;
            if (marks[t]) keep[next++] = t;
        }
        if (!p.target) continue;
        const int64_t* target = (const int64_t*)p.target + b * p.target_batch;
        for (int64_t i = 0; i < p.sources; i++) {
            if (outside(target[i], p.length)) return 2;
            if (marks[target[i]]) dest[source[i]] = dest[target[i]];  // a source that joins a source is gone with it
        }
    }
    return 0;
}

int lift(const LiftArgs& p) {
    const int64_t survivors = p.kept + p.special;
    Memory<char> marks(p.length);
    Memory<int64_t> places(p.kept + 1);
    if (!marks || !places) return 1;
    for (int64_t b = 0; b < p.batch; b++) {
        const int64_t *positions = (const int64_t*)p.positions + b * p.patches, *fixed = (const int64_t*)p.fixed + b * p.fixed_batch;
        const int64_t *plan_keep = (const int64_t*)p.plan_keep + b * p.kept, *plan_dest = (const int64_t*)p.plan_dest + b * p.patches;
        int64_t *keep = (int64_t*)p.keep + b * survivors, *dest = (int64_t*)p.dest + b * p.length;
        if (!mark(fixed, p.special, p.length, 1, marks)) return 2;
        for (int64_t k = 0; k < p.kept; k++) {
            if (outside(plan_keep[k], p.patches)) return 2;
            const int64_t at = positions[plan_keep[k]];
            if (outside(at, p.length) || marks[at]) return 2;
            marks[at] = 2;
        }
        // in sequence order special tokens have the places that they keep; the patches share the others
        for (int64_t t = 0, next = 0, patch = 0; t < p.length; t++) {
            dest[t] = survivors;
            if (!marks[t]) continue;
            if (marks[t] == 1) {
                dest[t] = next;
                keep[next] = t;
            } else {
                keep[next] = positions[plan_keep[patch]];
                places[patch++] = next;
            }
            next++;
        }
        places[p.kept] = survivors;
        for (int64_t m = 0; m < p.patches; m++) {
            if (outside(plan_dest[m], p.kept + 1) || outside(positions[m], p.length)) return 2;
            dest[positions[m]] = places[plan_dest[m]];
        }
    }
    return 0;
}

// ----------------------------------------------------------------------------------------------------------- merge

// What one image is merged by: of each token that goes its share in the mean of its group, and the tokens that join each
// that stays, [joined[k - 1], joined[k]) of `tokens`, in sequence order.
struct Groups {
    float *total, *share;
    int64_t *joined, *tokens;
};

// All of one image but its rows: sizes, composed origins, groups.
INLINE bool merge_numbers(const MergeArgs& p, int64_t b, const Groups& groups) {
    const int64_t *keep = (const int64_t*)p.keep + b * p.kept, *dest = (const int64_t*)p.dest + b * p.length;
    const float *weight = (const float*)p.weight + b * p.length, *size = (const float*)p.size + b * p.length;
    float* out_size = (float*)p.out_size + b * p.kept;
    for (int64_t k = 0; k < p.kept; k++) {
        if (outside(keep[k], p.length) || dest[keep[k]] != k) return false;
        groups.total[k] = out_size[k] = 0.0f;
        groups.joined[k] = 0;
        ((int64_t*)p.out_keep)[b * p.kept + k] = ((const int64_t*)p.origin_keep)[b * p.length + keep[k]];
    }
    for (int64_t t = 0; t < p.length; t++) {
        if (outside(dest[t], p.kept + 1)) return false;
        if (dest[t] == p.kept) continue;
        groups.total[dest[t]] += weight[t];
        out_size[dest[t]] += size[t];
        if (keep[dest[t]] != t && dest[t] + 1 < p.kept) groups.joined[dest[t] + 1]++;
    }
    for (int64_t k = 1; k < p.kept; k++) groups.joined[k] += groups.joined[k - 1];
    for (int64_t t = 0; t < p.length; t++) {  // moves the start of every group to its end
        const int64_t k = dest[t];
        if (k == p.kept || keep[k] == t) continue;
        groups.share[t] = groups.total[k] > 0.0f ? weight[t] / groups.total[k] : 0.0f;
        groups.tokens[groups.joined[k]++] = t;
    }
    const int64_t* before = (const int64_t*)p.origin_dest + b * p.first;
    for (int64_t t = 0; t < p.first; t++) {
        if (outside(before[t], p.length + 1)) return false;
        ((int64_t*)p.out_dest)[b * p.first + t] = before[t] < p.length ? dest[before[t]] : p.kept;
    }
    return true;
}

// Rows `from` to `to` of one image: x_target + sum of share (x_source - x_target).
INLINE void merge_rows(const MergeArgs& p, int64_t b, const Groups& groups, int64_t from, int64_t to) {
    const int64_t* keep = (const int64_t*)p.keep + b * p.kept;
    const float* x = (const float*)p.x + b * p.length * p.columns;
    float* y = (float*)p.out_x + b * p.kept * p.columns;
    for (int64_t k = from; k < to; k++)
        for (int64_t i = 0; i < p.columns; i += W) {
            const int m = (int)smaller(W, p.columns - i);
            const vf target = load(x + keep[k] * p.columns + i, m);
            vf row = target;
            for (int64_t j = k ? groups.joined[k - 1] : 0; j < groups.joined[k]; j++) {
                const int64_t t = groups.tokens[j];
                row += groups.share[t] * (load(x + t * p.columns + i, m) - target);
            }
            store(y + k * p.columns + i, row, m);
        }
}

int merge(const MergeArgs& p) {
    constexpr int64_t PER_TASK = 32;  // rows
    const int64_t parts = (p.kept + PER_TASK - 1) / PER_TASK;
    [[maybe_unused]] const int64_t worth = p.batch * p.kept * p.columns * (int64_t)sizeof(float);
    Memory<float> share(p.batch * p.length), total(p.batch * p.kept);
    Memory<int64_t> joined(p.batch * p.kept), tokens(p.batch * p.length);
    if (!share || !total || !joined || !tokens) return 1;
    auto groups = [&](int64_t b) {
        return Groups{total + b * p.kept, share + b * p.length, joined + b * p.kept, tokens + b * p.length};
    };
    int failed = 0;
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1 && worth > WORTH_THREADS)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < p.batch; b++)
            if (!merge_numbers(p, b, groups(b))) {
#pragma omp atomic write
                failed = 2;
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t part = 0; part < parts; part++)
                if (!failed) merge_rows(p, b, groups(b), part * PER_TASK, smaller(p.kept, (part + 1) * PER_TASK));
    }
    return failed;
}

}  // namespace
