// The step between two blocks: rows by position, the most similar target of each source, and assignments (definitions:
// reduction/assignment.py, reduction/matching.py). Results do not depend on the number of threads.
//
// Return codes: 0 done, 1 no memory, 2 a position that is not there or is named twice.
#pragma once
#include "abi.h"
#include "vec.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 16;  // bytes moved, or a quarter of the multiply-adds, that pay for waking them

INLINE float square_root(float x) { return __builtin_sqrtf(x); }
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

// ------------------------------------------------------------------------------------------------------------ rows

int take_rows(const RowsArgs& p) {
    const int64_t images = p.batch * p.directions, worth = images * p.count * p.bytes;
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

// --------------------------------------------------------------------------------------------------------- nearest
//
// Cosine similarity of sources with targets, a panel of targets against a few sources at a time; only the best so far is
// kept. Vectors run over targets, and every product adds up its columns in the same order, so equal rows have equal
// similarities wherever they stand.

constexpr int SIDE = 2, PANEL = SIDE * W;  // vectors and targets of a panel
#if defined(__AVX512F__)
constexpr int GROUP = 8;  // sources that share each load of the panel: all sums stay in registers
#else
constexpr int GROUP = 4;
#endif
constexpr int64_t PER_TASK = 32;         // sources
constexpr float SMALLEST_NORM = 1e-12f;  // as in reduction/matching.py

// A row divided by its length.
INLINE void unit_row(const float* x, int64_t n, float* out) {
    vf total{};
    for (int64_t i = 0; i < n; i += W) {
        const vf v = load(x + i, (int)smaller(W, n - i));
        total += v * v;
    }
    const float norm = square_root(sum(total));
    const float inverse = 1.0f / (norm < SMALLEST_NORM ? SMALLEST_NORM : norm);
    for (int64_t i = 0; i < n; i += W) {
        const int m = (int)smaller(W, n - i);
        store(out + i, load(x + i, m) * inverse, m);
    }
}

// The better of the best so far and a new vector of similarities; of equals the earlier one. NaN beats all, as in torch.max.
INLINE void update(vf& best, vi& where, vf value, int32_t vector) {
    const vi better = (value > best) | ((value != value) & (best == best));
    best = select(better, value, best);
    where = better ? vi{} + vector : where;
}

// Similarities of GROUP unit rows with a panel of targets, of which `live` are there.
INLINE void compare(const float* rows, const vf* panel, int64_t columns, int64_t number, int live, vf* best, vi* where) {
    vf acc[GROUP][SIDE];
    for (int g = 0; g < GROUP; g++)
        for (int v = 0; v < SIDE; v++) acc[g][v] = vf{};
    for (int64_t f = 0; f < columns; f++) {
        const vf b0 = panel[f * SIDE], b1 = panel[f * SIDE + 1];
#pragma GCC unroll 8
        for (int g = 0; g < GROUP; g++) {
            const float a = rows[g * columns + f];
            acc[g][0] += b0 * a;
            acc[g][1] += b1 * a;
        }
    }
    for (int v = 0; v < SIDE && v * W < live; v++) {
        vi there{};
        for (int i = 0; i < W; i++) there[i] = v * W + i < live ? -1 : 0;
        for (int g = 0; g < GROUP; g++)
            update(best[g], where[g], select(there, acc[g][v], splat(-__builtin_inff())), (int32_t)(number * SIDE + v));
    }
}

// The best of all lanes: writes the similarity, returns the index of the target.
INLINE int64_t first_best(vf best, vi where, float* similarity) {
    float value = best[0];
    int64_t index = (int64_t)where[0] * W;
    for (int i = 1; i < W; i++) {
        const int64_t here = (int64_t)where[i] * W + i;
        const bool nan = best[i] != best[i], had = value != value;
        const bool equal = nan ? had : best[i] == value;
        if (equal ? here < index : nan || best[i] > value) value = best[i], index = here;
    }
    *similarity = value;
    return index;
}

// Unit rows of a panel of targets, transposed: (F, PANEL), zeros beyond the last target.
int pack_panel(const NearestArgs& p, int64_t b, int64_t panel, vf* packed) {
    const int64_t* target = (const int64_t*)p.target + b * p.target_batch + panel * PANEL;
    const int64_t live = smaller(PANEL, p.targets - panel * PANEL);
    Memory<float> row(p.columns);
    if (!row) return 1;
    float* out = (float*)packed;
    for (int64_t i = 0; i < PANEL; i++) {
        if (i < live) {
            if (outside(target[i], p.length)) return 2;
            unit_row((const float*)p.x + (b * p.length + target[i]) * p.columns, p.columns, row);
        }
        for (int64_t f = 0; f < p.columns; f++) out[f * PANEL + i] = i < live ? row[f] : 0.0f;
    }
    return 0;
}

// The best target of each of PER_TASK sources from `first` on.
int search(const NearestArgs& p, int64_t b, int64_t first, const vf* packed) {
    const int64_t columns = p.columns, count = smaller(PER_TASK, p.sources - first), padded = (count + GROUP - 1) / GROUP * GROUP;
    const int64_t* source = (const int64_t*)p.source + b * p.source_batch + first;
    const int64_t* target = (const int64_t*)p.target + b * p.target_batch;
    Memory<float> rows(padded * columns);
    if (!rows) return 1;
    vf best[PER_TASK];
    vi where[PER_TASK];
    for (int64_t i = 0; i < padded; i++) {
        best[i] = splat(-__builtin_inff());
        where[i] = vi{};
        if (i >= count) {
            memset(rows + i * columns, 0, (size_t)columns * sizeof(float));
            continue;
        }
        if (outside(source[i], p.length)) return 2;
        unit_row((const float*)p.x + (b * p.length + source[i]) * columns, columns, rows + i * columns);
    }
    for (int64_t panel = 0; panel * PANEL < p.targets; panel++)
        for (int64_t i = 0; i < count; i += GROUP)
            compare(rows + i * columns, packed + panel * columns * SIDE, columns, panel,
                    (int)smaller(PANEL, p.targets - panel * PANEL), best + i, where + i);
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = b * p.sources + first + i;
        ((int64_t*)p.nearest)[at] = target[first_best(best[i], where[i], (float*)p.similarity + at)];
    }
    return 0;
}

int nearest(const NearestArgs& p) {
    const int64_t columns = p.columns, panels = (p.targets + PANEL - 1) / PANEL, size = columns * SIDE;
    const int64_t tasks = (p.sources + PER_TASK - 1) / PER_TASK;
    const int64_t worth = p.batch * p.sources * p.targets * columns / 4;
    static thread_local Kept kept;
    vf* packed = kept.take(p.batch * panels * size);
    if (!packed) return 1;
    int failed = 0;
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1 && worth > WORTH_THREADS)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t panel = 0; panel < panels; panel++) {
                const int code = pack_panel(p, b, panel, packed + (b * panels + panel) * size);
                if (code) {
#pragma omp atomic write
                    failed = code;
                }
            }
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t task = 0; task < tasks; task++) {
                const int code = failed ? failed : search(p, b, task * PER_TASK, packed + b * panels * size);
                if (code) {
#pragma omp atomic write
                    failed = code;
                }
            }
    }
    kept.drop();
    return failed;
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

// All of one image but its rows: sizes, composed origins, and the share in its group's mean of every token that goes.
INLINE bool merge_numbers(const MergeArgs& p, int64_t b, float* total, float* share) {
    const int64_t *keep = (const int64_t*)p.keep + b * p.kept, *dest = (const int64_t*)p.dest + b * p.length;
    const float *weight = (const float*)p.weight + b * p.length, *size = (const float*)p.size + b * p.length;
    float* out_size = (float*)p.out_size + b * p.kept;
    for (int64_t k = 0; k < p.kept; k++) {
        if (outside(keep[k], p.length) || dest[keep[k]] != k) return false;
        total[k] = out_size[k] = 0.0f;
        ((int64_t*)p.out_keep)[b * p.kept + k] = ((const int64_t*)p.origin_keep)[b * p.length + keep[k]];
    }
    for (int64_t t = 0; t < p.length; t++) {
        if (outside(dest[t], p.kept + 1)) return false;
        if (dest[t] == p.kept) continue;
        total[dest[t]] += weight[t];
        out_size[dest[t]] += size[t];
    }
    for (int64_t t = 0; t < p.length; t++)
        share[t] = dest[t] < p.kept && total[dest[t]] > 0.0f ? weight[t] / total[dest[t]] : 0.0f;
    const int64_t* before = (const int64_t*)p.origin_dest + b * p.first;
    for (int64_t t = 0; t < p.first; t++) {
        if (outside(before[t], p.length + 1)) return false;
        ((int64_t*)p.out_dest)[b * p.first + t] = before[t] < p.length ? dest[before[t]] : p.kept;
    }
    return true;
}

// Columns `from` to `to` of the rows of one image: x_target + sum of share (x_source - x_target).
INLINE void merge_columns(const MergeArgs& p, int64_t b, const float* share, int64_t from, int64_t to) {
    const int64_t *keep = (const int64_t*)p.keep + b * p.kept, *dest = (const int64_t*)p.dest + b * p.length;
    const float* x = (const float*)p.x + b * p.length * p.columns;
    float* y = (float*)p.out_x + b * p.kept * p.columns;
    for (int64_t k = 0; k < p.kept; k++)
        memcpy(y + k * p.columns + from, x + keep[k] * p.columns + from, (size_t)(to - from) * sizeof(float));
    for (int64_t t = 0; t < p.length; t++) {
        const int64_t k = dest[t];
        if (k == p.kept || keep[k] == t) continue;
        const float *own = x + keep[k] * p.columns, *other = x + t * p.columns;
        for (int64_t i = from; i < to; i += W) {
            const int m = (int)smaller(W, to - i);
            const vf target = load(own + i, m);
            store(y + k * p.columns + i, load(y + k * p.columns + i, m) + share[t] * (load(other + i, m) - target), m);
        }
    }
}

int merge(const MergeArgs& p) {
    const int64_t stripe = 256, stripes = (p.columns + stripe - 1) / stripe;
    const int64_t worth = p.batch * p.kept * p.columns * (int64_t)sizeof(float);
    Memory<float> share(p.batch * p.length), total(p.batch * p.kept);
    if (!share || !total) return 1;
    int failed = 0;
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1 && worth > WORTH_THREADS)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < p.batch; b++)
            if (!merge_numbers(p, b, total + b * p.kept, share + b * p.length)) {
#pragma omp atomic write
                failed = 2;
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t part = 0; part < stripes; part++)
                if (!failed)
                    merge_columns(p, b, share + b * p.length, part * stripe, smaller(p.columns, (part + 1) * stripe));
    }
    return failed;
}

}  // namespace
