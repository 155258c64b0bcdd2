// The most similar target of each source, by cosine (definition: reduction/matching.py).
//
// A panel of targets meets a few sources at a time; no matrix of similarities is kept. Vectors run over targets, and every
// product adds up its columns in the same order, so equal rows have equal similarities wherever they stand. Results do not
// depend on the number of threads, nor on whether most of the targets are ruled out by a cheaper look first.
//
// Return codes: 0 done, 1 no memory, 2 a position that is not there.
#pragma once
#include "abi.h"
#include "memory.h"
#include "product.h"
#include "threads.h"
#include "vec.h"

namespace {

constexpr int SIDE = 2, PANEL = SIDE * W;  // vectors and targets of a panel
#if defined(__AVX512F__)
constexpr int GROUP = 8;  // sources that share each load of the panel: all sums stay in registers
#else
constexpr int GROUP = 4;
#endif
constexpr int64_t PER_TASK = 32;         // sources
constexpr float SMALLEST_NORM = 1e-12f;  // as in reduction/matching.py

// Of the rows at `positions`, which lie anywhere, the one that is needed some time after row i, fetched already.
INLINE void fetch_row(const NearestArgs& p, int64_t b, const int64_t* positions, int64_t i, int64_t count) {
    constexpr int64_t AHEAD = 4;
    if (i + AHEAD >= count || outside(positions[i + AHEAD], p.length)) return;
    const float* row = (const float*)p.x + (b * p.length + positions[i + AHEAD]) * p.columns;
    for (int64_t f = 0; f < p.columns; f += 16) __builtin_prefetch(row + f);
}

// A row divided by its length; false where that is no finite number.
INLINE bool unit_row(const float* x, int64_t n, float* out) {
    vf total{};
    for (int64_t i = 0; i < n; i += W) {
        const vf v = load(x + i, (int)smaller(W, n - i));
        total += v * v;
    }
    const float square = sum(total), norm = square_root(square);
    const float inverse = 1.0f / (norm < SMALLEST_NORM ? SMALLEST_NORM : norm);
    for (int64_t i = 0; i < n; i += W) {
        const int m = (int)smaller(W, n - i);
        store(out + i, load(x + i, m) * inverse, m);
    }
    return square < INFINITY;
}

// The targets of one image.
struct Targets {
    const float* rows;  // (count, F), each divided by its length
    int64_t columns, count;

    int64_t panels() const { return (count + PANEL - 1) / PANEL; }
    vi there(int64_t v) const { return lanes() < (int32_t)(count - v * W); }  // which lanes of vector v are targets
    // Those of a panel transposed, (F, SIDE), zeros beyond the last one.
    void pack(int64_t panel, vf* packed) const {
        pack_panel<float, SIDE>(rows + panel * PANEL * columns, columns, smaller(PANEL, count - panel * PANEL), packed);
    }
};

// The best target of a source.
struct Found {
    float similarity = -INFINITY;
    int64_t target = 0;
};

// ----------------------------------------------------------------------------------------------- similarities, exactly

// The best targets of a source so far, one for each lane.
struct Best {
    vf value = splat(-INFINITY);
    vi where{};  // vectors

    // Takes what is better of a new vector; of equals the earlier one stays. NaN beats all, as in torch.max.
    void update(vf other, vi there, int64_t vector) {
        other = select(there, other, splat(-INFINITY));
        const vi better = (other > value) | ((other != other) & (value == value));
        value = select(better, other, value);
        where = better ? vi{} + (int32_t)vector : where;
    }

    // The best of all lanes.
    Found first() const {
        Found found{value[0], (int64_t)where[0] * W};
        for (int i = 1; i < W; i++) {
            const int64_t here = (int64_t)where[i] * W + i;
            const bool nan = value[i] != value[i], had = found.similarity != found.similarity;
            const bool equal = nan ? had : value[i] == found.similarity;
            if (equal ? here < found.target : nan || value[i] > found.similarity) found = {value[i], here};
        }
        return found;
    }
};

// GROUP sources against one panel.
INLINE void compare(const float* rows, const Targets& targets, const vf* packed, int64_t panel, Best* best) {
    vf acc[GROUP][SIDE];
    for (int g = 0; g < GROUP; g++)
        for (int v = 0; v < SIDE; v++) acc[g][v] = vf{};
    for (int64_t f = 0; f < targets.columns; f++) {
        const vf b0 = packed[f * SIDE], b1 = packed[f * SIDE + 1];
#pragma GCC unroll 8
        for (int g = 0; g < GROUP; g++) {
            const float a = rows[g * targets.columns + f];
            acc[g][0] += b0 * a;
            acc[g][1] += b1 * a;
        }
    }
    for (int v = 0; v < SIDE && panel * PANEL + v * W < targets.count; v++)
        for (int g = 0; g < GROUP; g++) best[g].update(acc[g][v], targets.there(panel * SIDE + v), panel * SIDE + v);
}

// ------------------------------------------------------------------------------------------- similarities, approximately
//
// With many targets most are out of the question, and whole numbers of 16 bits, of which one instruction multiplies twice
// as many, are enough to say so. What they leave is compared exactly, so the result is that of the exact search.
//
// The entries of a unit row times ONE are rounded by at most 1/2, so it is at most sqrt(F) / 2 away from what it stands
// for, and at most ONE + sqrt(F) / 2 long: a product of two fits into 32 bits, as all its parts do, and is wrong by at most
// (ONE + sqrt(F) / 4) sqrt(F). Rows that are no numbers are not screened.

#if defined(__AVX512VNNI__)
constexpr int64_t WORTH_A_SCREEN = 256;  // targets
#else
constexpr int64_t WORTH_A_SCREEN = INT64_MAX;  // such numbers are not faster
#endif
constexpr int64_t MOST_COLUMNS = 1 << 20;  // for which all this holds
constexpr float ONE = 32000.0f;

// Of each lane: sum + the products of two numbers with the two of `pair`.
INLINE vi add_pair(vi sum, vi numbers, int32_t pair) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)numbers, _mm512_set1_epi32(pair));
#else
    return sum + (numbers << 16 >> 16) * (int32_t)(int16_t)pair + (numbers >> 16) * (pair >> 16);
#endif
}

// The nearest whole numbers, of numbers below 2^22.
INLINE vi whole(vf x) { return (vi)(x + 12582912.0f) - (vi)splat(12582912.0f); }

// The targets of one image in 16 bits: (panels, pairs, SIDE).
struct Screen {
    struct Pair {
        int32_t source, target;
    };

    const Targets& targets;
    int64_t pairs, stride;  // pairs of columns; vectors of targets
    vf* numbers;
    int32_t slack;  // by how much two products may be wrong, together, and the exact ones too

    Screen(const Targets& targets, vf* numbers)
        : targets(targets), pairs((targets.columns + 1) / 2), stride(targets.panels() * SIDE), numbers(numbers) {
        const float columns = (float)targets.columns, length = 1.01f * square_root(columns);  // and what fp32 adds
        slack = (int32_t)(2.0f * (ONE + length / 4) * length + ONE * ONE * (columns + 16) * 0x1p-21f);
    }
    static bool worth(const NearestArgs& p) { return p.targets >= WORTH_A_SCREEN && p.columns <= MOST_COLUMNS; }

    // A unit row in whole numbers, in pairs.
    void narrow(const float* row, void* pairs_of_row) const {
        typedef int16_t Narrow __attribute__((vector_size(2 * W)));
        int16_t* out = (int16_t*)pairs_of_row;
        if (targets.columns % 2) memset(out + targets.columns, 0, sizeof(int16_t));
        for (int64_t f = 0; f < targets.columns; f += W) {
            const int m = (int)smaller(W, targets.columns - f);
            const Narrow some = __builtin_convertvector(whole(load(row + f, m) * ONE), Narrow);
            if (m == W) memcpy(out + f, &some, sizeof some);
            else memcpy(out + f, &some, (size_t)m * sizeof(int16_t));
        }
    }

    // Makes the numbers of a panel; `space` is for a row of each target.
    void make(int64_t panel, float* space) const {
        const int64_t first = panel * PANEL, live = smaller(PANEL, targets.count - first);
        for (int64_t i = 0; i < live; i++) narrow(targets.rows + (first + i) * targets.columns, space + i * pairs);
        pack_panel<float, SIDE>(space, pairs, live, numbers + panel * pairs * SIDE);
    }

    // GROUP sources against one panel: writes the products of each, and keeps the best.
    void compare(const int32_t* sources, int64_t panel, vi* products, vi* best) const {
        const vi* packed = (const vi*)numbers + panel * pairs * SIDE;
        vi acc[GROUP][SIDE];
        for (int g = 0; g < GROUP; g++)
            for (int v = 0; v < SIDE; v++) acc[g][v] = vi{};
        for (int64_t k = 0; k < pairs; k++) {
            const vi b0 = packed[k * SIDE], b1 = packed[k * SIDE + 1];
#pragma GCC unroll 8
            for (int g = 0; g < GROUP; g++) {
                acc[g][0] = add_pair(acc[g][0], b0, sources[g * pairs + k]);
                acc[g][1] = add_pair(acc[g][1], b1, sources[g * pairs + k]);
            }
        }
        for (int v = 0; v < SIDE; v++) {
            const vi there = targets.there(panel * SIDE + v);
            for (int g = 0; g < GROUP; g++) {
                const vi product = there ? acc[g][v] : vi{} + INT32_MIN;
                products[g * stride + panel * SIDE + v] = product;
                best[g] = product > best[g] ? product : best[g];
            }
        }
    }

    // What `search` needs for the sources of a task, in vectors.
    int64_t workspace() const { return PER_TASK * (stride + stride / W + 1 + pairs / W + 1); }

    // The best targets of `count` sources, whose rows of zeros fill the last group; false, and nothing found, where too
    // many are left to be compared exactly one by one.
    bool search(const float* rows, int64_t count, vf* workspace, Found* found) const {
        vi *products = (vi*)workspace, highest[PER_TASK];
        int32_t* sources = (int32_t*)(products + PER_TASK * stride);
        Pair* left = (Pair*)(sources + PER_TASK * pairs);
        for (int64_t i = 0; i < PER_TASK; i++) {
            highest[i] = vi{} + INT32_MIN;
            narrow(rows + i * targets.columns, sources + i * pairs);
        }
        for (int64_t panel = 0; panel < targets.panels(); panel++)
            for (int64_t i = 0; i < count; i += GROUP)
                compare(sources + i * pairs, panel, products + i * stride, highest + i);
        int64_t number = 0;
        const int64_t most = count * stride / 2;  // as dear as all of them together
        for (int64_t i = 0; i < count; i++) {
            int32_t top = INT32_MIN;
            for (int l = 0; l < W; l++) top = highest[i][l] > top ? highest[i][l] : top;
            for (int64_t v = 0; v < stride; v++)
                for (uint32_t set = lanes_set(products[i * stride + v] >= top - slack); set; set &= set - 1) {
                    if (number == most) return false;
                    left[number++] = {(int32_t)i, (int32_t)(v * W) + __builtin_ctz(set)};
                }
        }
        for (int64_t k = 0; k < number; k += W) look(rows, left + k, (int)smaller(W, number - k), found);
        return true;
    }

    // Compares up to W pairs exactly, a lane for each: its sum takes the columns in the order in which all others do.
    void look(const float* rows, const Pair* left, int count, Found* found) const {
        const float *source[W], *target[W];
        for (int k = 0; k < W; k++) {
            const Pair& pair = left[k < count ? k : 0];
            source[k] = rows + pair.source * targets.columns, target[k] = targets.rows + pair.target * targets.columns;
        }
        vf sum{};
        for (int64_t f = 0; f < targets.columns; f += W) {
            const int m = (int)smaller(W, targets.columns - f);
            vf a[W], b[W];
            for (int k = 0; k < W; k++) a[k] = load(target[k] + f, m), b[k] = load(source[k] + f, m);
            transpose(a);
            transpose(b);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) sum += a[i] * b[i];  // zeros behind the last column
        }
        for (int k = 0; k < count; k++)  // of equals the first stays
            if (sum[k] > found[left[k].source].similarity) found[left[k].source] = {sum[k], left[k].target};
    }
};

// -------------------------------------------------------------------------------------------------------------- search

// Unit rows of the targets of a panel of image b. Clears `finite` where one is no finite number.
int take_targets(const NearestArgs& p, int64_t b, int64_t panel, float* rows, char* finite) {
    const int64_t* target = (const int64_t*)p.target + b * p.target_batch;
    for (int64_t i = panel * PANEL; i < smaller(panel * PANEL + PANEL, p.targets); i++) {
        if (outside(target[i], p.length)) return 2;
        fetch_row(p, b, target, i, p.targets);
        if (unit_row((const float*)p.x + (b * p.length + target[i]) * p.columns, p.columns, rows + i * p.columns)) continue;
#pragma omp atomic write
        *finite = 0;
    }
    return 0;
}

// The best target of each of PER_TASK sources from `first` on. Without a screen, `panels` are the targets' panels, packed;
// with one they are packed where it does not help.
int search(const NearestArgs& p, int64_t b, int64_t first, const Targets& targets, const Screen* screen, bool finite,
           const vf* panels) {
    const int64_t columns = p.columns, count = smaller(PER_TASK, p.sources - first);
    const int64_t* source = (const int64_t*)p.source + b * p.source_batch + first;
    const int64_t* target = (const int64_t*)p.target + b * p.target_batch;
    static thread_local Kept kept;
    vf* workspace = kept.take((PER_TASK * columns + W - 1) / W + (screen ? screen->workspace() + columns * SIDE : 0));
    if (!workspace) return 1;
    float* rows = (float*)workspace;
    vf* rest = workspace + (PER_TASK * columns + W - 1) / W;
    for (int64_t i = 0; i < count; i++) {
        if (outside(source[i], p.length)) return 2;
        fetch_row(p, b, source, i, count);
        finite &= unit_row((const float*)p.x + (b * p.length + source[i]) * columns, columns, rows + i * columns);
    }
    memset(rows + count * columns, 0, (size_t)((PER_TASK - count) * columns) * sizeof(float));
    Found found[PER_TASK];
    if (!screen || !finite || !screen->search(rows, count, rest, found)) {
        Best best[PER_TASK];
        for (int64_t panel = 0; panel < targets.panels(); panel++) {
            if (screen) targets.pack(panel, rest);
            const vf* packed = screen ? rest : panels + panel * columns * SIDE;
            for (int64_t i = 0; i < count; i += GROUP) compare(rows + i * columns, targets, packed, panel, best + i);
        }
        for (int64_t i = 0; i < count; i++) found[i] = best[i].first();
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = b * p.sources + first + i;
        ((int64_t*)p.nearest)[at] = target[found[i].target];
        ((float*)p.similarity)[at] = found[i].similarity;
    }
    kept.drop();
    return 0;
}

int nearest(const NearestArgs& p) {
    const int64_t panels = (p.targets + PANEL - 1) / PANEL, tasks = (p.sources + PER_TASK - 1) / PER_TASK;
    const int64_t size = p.columns * SIDE;
    [[maybe_unused]] const int64_t worth = p.batch * p.sources * p.targets * p.columns / 4;  // unused without OpenMP
    const bool screens = Screen::worth(p);
    // of an image: unit rows, then the numbers of its screen or its panels
    const int64_t units = panels * size, each = units + (screens ? panels * (p.columns + 1) / 2 * SIDE : units);
    static thread_local Kept kept;
    vf* space = kept.take(p.batch * each);
    Memory<char> finite(p.batch);
    if (!space || !finite) return 1;
    memset(finite, 1, (size_t)p.batch);
    int failed = 0;
    auto fail = [&](int code) {
        if (!code) return;
#pragma omp atomic write
        failed = code;
    };
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1 && worth > WORTH_THREADS)
    {
        Memory<float> numbers(PANEL * (p.columns + 1) / 2);
        if (!numbers) fail(1);
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t panel = 0; panel < panels; panel++) {
                float* rows = (float*)(space + b * each);
                const Targets targets{rows, p.columns, p.targets};
                const int code = numbers ? take_targets(p, b, panel, rows, finite + b) : 1;
                fail(code);
                if (code) continue;
                if (screens) Screen(targets, space + b * each + units).make(panel, numbers);
                else targets.pack(panel, space + b * each + units + panel * size);
            }
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t task = 0; task < tasks; task++) {
                if (failed) continue;
                const Targets targets{(const float*)(space + b * each), p.columns, p.targets};
                vf* packed = space + b * each + units;
                const Screen screen(targets, packed);
                fail(search(p, b, task * PER_TASK, targets, screens ? &screen : nullptr, finite[b], packed));
            }
    }
    kept.drop();
    return failed;
}

}  // namespace
