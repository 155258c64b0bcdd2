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

// ----------------------------------------------------------------------------------------------- similarities, exactly

// The targets of one image: unit rows, transposed, (panels, F, PANEL), zeros beyond the last one.
struct Targets {
    const vf* panels;
    int64_t columns, count;

    int64_t vectors() const { return (count + W - 1) / W; }
    const vf* vector(int64_t v) const { return panels + v / SIDE * columns * SIDE + v % SIDE; }
    vi there(int64_t v) const { return lanes() < (int32_t)(count - v * W); }  // which lanes of vector v are targets
};

// The best targets of a source so far, one for each lane.
struct Best {
    vf value;
    vi where;  // vectors

    // Takes what is better of a new vector; of equals the earlier one stays. NaN beats all, as in torch.max.
    INLINE void update(Best& best, const Targets& targets, vf value, int64_t vector) {
        value = select(targets.there(vector), value, splat(-__builtin_inff()));
        const vi better = (value > best.value) | ((value != value) & (best.value == best.value));
        best.value = select(better, value, best.value);
        best.where = better ? vi{} + (int32_t)vector : best.where;
    }

    // The best of all lanes: its similarity and the number of the target.
    int64_t first(float* similarity) const {
        float found = value[0];
        int64_t index = (int64_t)where[0] * W;
        for (int i = 1; i < W; i++) {
            const int64_t here = (int64_t)where[i] * W + i;
            const bool nan = value[i] != value[i], had = found != found;
            const bool equal = nan ? had : value[i] == found;
            if (equal ? here < index : nan || value[i] > found) found = value[i], index = here;
        }
        *similarity = found;
        return index;
    }
};

// GROUP sources against one panel.
INLINE void compare(const float* rows, const Targets& targets, int64_t panel, Best* best) {
    const vf* packed = targets.panels + panel * targets.columns * SIDE;
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
        for (int g = 0; g < GROUP; g++) Best::update(best[g], targets, acc[g][v], panel * SIDE + v);
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
constexpr int FEW = 4;  // vectors of targets that are looked at again at a time

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
    const Targets& targets;
    int64_t panels, pairs, width;  // pairs of columns; numbers of a source, in whole vectors
    vi* numbers;
    int32_t slack;  // by how much two products may be wrong, together, and the exact ones too

    static int64_t vectors(int64_t columns, int64_t count) {
        return (count + PANEL - 1) / PANEL * ((columns + 1) / 2) * SIDE;
    }
    Screen(const Targets& targets, vf* space)
        : targets(targets), panels((targets.count + PANEL - 1) / PANEL), pairs((targets.columns + 1) / 2),
          width((targets.columns + W - 1) / W * W), numbers((vi*)space) {
        const float columns = (float)targets.columns, length = 1.01f * square_root(columns);  // and what fp32 adds
        slack = (int32_t)(2.0f * (ONE + length / 4) * length + ONE * ONE * (columns + 16) * 0x1p-21f);
    }
    static bool worth(const NearestArgs& p) { return p.targets >= WORTH_A_SCREEN && p.columns <= MOST_COLUMNS; }

    void make(int64_t panel) const {
        for (int v = 0; v < SIDE; v++) {
            const vf* row = targets.vector(panel * SIDE + v);
            for (int64_t k = 0; k < pairs; k++) {
                const vi low = whole(row[2 * k * SIDE] * ONE);
                const vi high = 2 * k + 1 < targets.columns ? whole(row[(2 * k + 1) * SIDE] * ONE) : vi{};
                numbers[(panel * pairs + k) * SIDE + v] = (low & 0xffff) | high << 16;
            }
        }
    }

    // GROUP sources against one panel: writes products, those of a source `stride` vectors after those of the one before.
    INLINE void compare(const Screen& screen, const int16_t* sources, int64_t panel, vi* products, int64_t stride, vi* best) {
        const vi* packed = screen.numbers + panel * screen.pairs * SIDE;
        vi acc[GROUP][SIDE];
        for (int g = 0; g < GROUP; g++)
            for (int v = 0; v < SIDE; v++) acc[g][v] = vi{};
        for (int64_t k = 0; k < screen.pairs; k++) {
            const vi b0 = packed[k * SIDE], b1 = packed[k * SIDE + 1];
#pragma GCC unroll 8
            for (int g = 0; g < GROUP; g++) {
                int32_t pair;
                memcpy(&pair, sources + g * screen.width + 2 * k, sizeof pair);
                acc[g][0] = add_pair(acc[g][0], b0, pair);
                acc[g][1] = add_pair(acc[g][1], b1, pair);
            }
        }
        for (int v = 0; v < SIDE; v++) {
            const vi there = screen.targets.there(panel * SIDE + v);
            for (int g = 0; g < GROUP; g++) {
                const vi product = there ? acc[g][v] : vi{} + INT32_MIN;
                products[g * stride + panel * SIDE + v] = product;
                best[g] = product > best[g] ? product : best[g];
            }
        }
    }

    // Sources and vectors of targets that are to be compared exactly, a few at a time.
    struct Again {
        const Targets& targets;
        const float* rows[FEW];
        Best* best[FEW];
        int64_t vectors[FEW];
        int count = 0;

        void add(const float* row, Best* best_of_row, int64_t vector) {
            rows[count] = row, best[count] = best_of_row, vectors[count++] = vector;
            if (count == FEW) look();
        }
        void look() {
            const vf* packed[FEW];
            vf acc[FEW] = {};
            for (int k = count; k < FEW; k++) rows[k] = rows[0], vectors[k] = vectors[0];
            for (int k = 0; k < FEW; k++) packed[k] = targets.vector(vectors[k]);
            for (int64_t f = 0; f < targets.columns; f++)
#pragma GCC unroll 4
                for (int k = 0; k < FEW; k++) acc[k] += packed[k][f * SIDE] * rows[k][f];
            for (int k = 0; k < count; k++) Best::update(*best[k], targets, acc[k], vectors[k]);
            count = 0;
        }
    };

    // What `search` needs for the sources of a task, in vectors.
    static int64_t workspace(int64_t columns, int64_t count) {
        return PER_TASK * ((count + PANEL - 1) / PANEL * SIDE + ((columns + W - 1) / W + 1) / 2);
    }

    // The best targets of `count` sources; rows of zeros fill the last group.
    void search(const float* rows, int64_t count, vf* workspace, Best* best) const {
        typedef int16_t Narrow __attribute__((vector_size(2 * W)));
        const int64_t stride = panels * SIDE, columns = targets.columns, padded = (count + GROUP - 1) / GROUP * GROUP;
        vi* products = (vi*)workspace;
        int16_t* sources = (int16_t*)(products + PER_TASK * stride);
        vi highest[PER_TASK];
        for (int64_t i = 0; i < padded; i++) {
            highest[i] = vi{} + INT32_MIN;
            for (int64_t f = 0; f < columns; f += W) {
                const vf row = load(rows + i * columns + f, (int)smaller(W, columns - f));
                const Narrow narrow = __builtin_convertvector(whole(row * ONE), Narrow);
                memcpy(sources + i * width + f, &narrow, sizeof narrow);
            }
        }
        for (int64_t panel = 0; panel < panels; panel++)
            for (int64_t i = 0; i < count; i += GROUP)
                compare(*this, sources + i * width, panel, products + i * stride, stride, highest + i);
        Again again{targets, {}, {}, {}};
        for (int64_t i = 0; i < count; i++) {
            int32_t most = INT32_MIN;
            for (int l = 0; l < W; l++) most = highest[i][l] > most ? highest[i][l] : most;
            for (int64_t v = 0; v < targets.vectors(); v++)
                if (lanes_set(products[i * stride + v] >= most - slack)) again.add(rows + i * columns, best + i, v);
        }
        if (again.count) again.look();
    }
};

// -------------------------------------------------------------------------------------------------------------- search

// A panel of the targets of image b. Clears `finite` where one is no finite number.
int pack_targets(const NearestArgs& p, int64_t b, int64_t panel, vf* packed, char* finite) {
    const int64_t* target = (const int64_t*)p.target + b * p.target_batch + panel * PANEL;
    const int64_t live = smaller(PANEL, p.targets - panel * PANEL);
    Memory<float> rows(live * p.columns);
    if (!rows) return 1;
    for (int64_t i = 0; i < live; i++) {
        if (outside(target[i], p.length)) return 2;
        fetch_row(p, b, target, i, live);
        if (unit_row((const float*)p.x + (b * p.length + target[i]) * p.columns, p.columns, rows + i * p.columns)) continue;
#pragma omp atomic write
        *finite = 0;
    }
    pack_panel<float, SIDE>(rows, p.columns, live, packed);
    return 0;
}

// The best target of each of PER_TASK sources from `first` on.
int search(const NearestArgs& p, int64_t b, int64_t first, const Targets& targets, const Screen* screen) {
    const int64_t columns = p.columns, count = smaller(PER_TASK, p.sources - first);
    const int64_t* source = (const int64_t*)p.source + b * p.source_batch + first;
    const int64_t* target = (const int64_t*)p.target + b * p.target_batch;
    const int64_t space = screen ? Screen::workspace(columns, p.targets) : 0;
    static thread_local Kept kept;
    vf* workspace = kept.take(space + (PER_TASK * columns + W - 1) / W);
    if (!workspace) return 1;
    float* rows = (float*)(workspace + space);
    Best best[PER_TASK];
    for (int64_t i = 0; i < PER_TASK; i++) {
        best[i] = {splat(-INFINITY), vi{}};
        if (i >= count) {
            memset(rows + i * columns, 0, (size_t)columns * sizeof(float));
            continue;
        }
        if (outside(source[i], p.length)) return 2;
        fetch_row(p, b, source, i, count);
        if (!unit_row((const float*)p.x + (b * p.length + source[i]) * columns, columns, rows + i * columns)) screen = nullptr;
    }
    if (screen) screen->search(rows, count, workspace, best);
    for (int64_t panel = 0; !screen && panel * PANEL < p.targets; panel++)
        for (int64_t i = 0; i < count; i += GROUP) compare(rows + i * columns, targets, panel, best + i);
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = b * p.sources + first + i;
        ((int64_t*)p.nearest)[at] = target[best[i].first((float*)p.similarity + at)];
    }
    kept.drop();
    return 0;
}

int nearest(const NearestArgs& p) {
    const int64_t panels = (p.targets + PANEL - 1) / PANEL, tasks = (p.sources + PER_TASK - 1) / PER_TASK;
    const int64_t size = p.columns * SIDE, worth = p.batch * p.sources * p.targets * p.columns / 4;
    const bool screens = Screen::worth(p);
    const int64_t each = panels * size + (screens ? Screen::vectors(p.columns, p.targets) : 0);
    static thread_local Kept kept;
    vf* space = kept.take(p.batch * each);
    Memory<char> finite(p.batch);
    if (!space || !finite) return 1;
    memset(finite, 1, (size_t)p.batch);
    auto targets = [&](int64_t b) { return Targets{space + b * each, p.columns, p.targets}; };
    int failed = 0;
    auto fail = [&](int code) {
        if (!code) return;
#pragma omp atomic write
        failed = code;
    };
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1 && worth > WORTH_THREADS)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t panel = 0; panel < panels; panel++) {
                const int code = pack_targets(p, b, panel, space + b * each + panel * size, finite + b);
                fail(code);
                const Targets all = targets(b);
                if (!code && screens) Screen(all, space + b * each + panels * size).make(panel);
            }
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t task = 0; task < tasks; task++) {
                if (failed) continue;
                const Targets all = targets(b);
                const Screen screen(all, space + b * each + panels * size);
                fail(search(p, b, task * PER_TASK, all, screens && finite[b] ? &screen : nullptr));
            }
    }
    kept.drop();
    return failed;
}

}  // namespace
