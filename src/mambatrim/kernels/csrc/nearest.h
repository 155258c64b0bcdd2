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
// With many targets most are out of the question, and numbers of 8 bits, of which one instruction multiplies four times
// as many, are enough to say so. What they leave is compared exactly, so the result is that of the exact search.
//
// Of u.v over targets v only u.(v - c) matters, which is c.(v - c) + (u - c).(v - c): with c about their mean, rows that
// are alike are told apart by what they differ in. Where rounding makes z' of z = u - c and w' of w = v - c, z.w changes
// by at most |z - z'| |w| + |z'| |w - w'|.

#if defined(__AVX512VNNI__)
constexpr int64_t WORTH_A_SCREEN = 256;  // targets
#else
constexpr int64_t WORTH_A_SCREEN = INT64_MAX;  // such numbers are not faster
#endif
constexpr int FOUR = 4;  // numbers of 8 bits that one step takes of a row, and vectors that are looked at again at a time

// What of each lane: sum + the products of four unsigned numbers with four signed ones, which are the same in all lanes.
INLINE vi add_four(vi sum, vi numbers, int32_t four) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)numbers, _mm512_set1_epi32(four));
#else
    for (int i = 0; i < FOUR; i++) sum += (numbers >> 8 * i & 255) * (int32_t)(int8_t)(four >> 8 * i);
    return sum;
#endif
}

INLINE vi whole(vf x) { return (vi)(x + 12582912.0f) - (vi)splat(12582912.0f); }  // the nearest, of numbers below 2^22

// A panel of targets in 8 bits; of each target the unit of its numbers, c.w, |w| and |w - w'|.
struct Rough {
    vf unit[SIDE], offset[SIDE], length[SIDE], error[SIDE];
    INLINE const vi* numbers(const Rough* panel) { return (const vi*)(panel + 1); }  // (steps, SIDE), each number + 128
};

// The targets of one image in 8 bits.
struct Screen {
    const Targets& targets;
    int64_t panels, steps, width;  // steps of a product; numbers of a row, in whole vectors
    vf* space;                     // the panels, then c
    float length = 0.0f, error = 0.0f;  // the most of any target; no numbers where one of them is none

    static int64_t vectors(int64_t columns, int64_t count) {
        const int64_t panels = (count + PANEL - 1) / PANEL, steps = (columns + FOUR - 1) / FOUR;
        return panels * ((int64_t)(sizeof(Rough) / sizeof(vf)) + steps * SIDE) + (columns + W - 1) / W;
    }
    Screen(const Targets& targets, vf* space)
        : targets(targets), panels((targets.count + PANEL - 1) / PANEL), steps((targets.columns + FOUR - 1) / FOUR),
          width((targets.columns + W - 1) / W * W), space(space) {}

    Rough* panel(int64_t number) const {
        return (Rough*)(space + number * ((int64_t)(sizeof(Rough) / sizeof(vf)) + steps * SIDE));
    }
    float* center() const { return (float*)panel(panels); }

    // c: the mean of every eighth panel is near enough to that of all.
    void find_center() const {
        for (int64_t f = 0; f < targets.columns; f++) {
            vf total{};
            int64_t taken = 0;
            for (int64_t v = 0; (v + 1) * W <= targets.count; v += 8 * SIDE, taken += W) total += targets.vector(v)[f * SIDE];
            center()[f] = sum(total) / (float)taken;
        }
    }

    void make(int64_t number) const {
        Rough* rough = panel(number);
        for (int v = 0; v < SIDE; v++) {
            const vf* row = targets.vector(number * SIDE + v);
            vf most{}, square{}, offset{}, lost{};
            for (int64_t f = 0; f < targets.columns; f++) {
                const vf w = row[f * SIDE] - center()[f];
                most = larger(magnitude(w), most);
                square += w * w;
                offset += w * center()[f];
            }
            const vf unit = most / 127.0f, inverse = select(unit > splat(0.0f), 1.0f / unit, vf{});
            for (int64_t k = 0; k < steps; k++) {
                vi four{};
                for (int64_t i = 0, f = k * FOUR; i < FOUR; i++, f++) {
                    const vf w = f < targets.columns ? row[f * SIDE] - center()[f] : vf{};
                    const vi number = whole(w * inverse);
                    const vf rest = w - __builtin_convertvector(number, vf) * unit;
                    lost += rest * rest;
                    four |= ((number + 128) & 255) << 8 * i;
                }
                ((vi*)Rough::numbers(rough))[k * SIDE + v] = four;
            }
            const vi there = targets.there(number * SIDE + v);
            rough->unit[v] = unit;
            rough->offset[v] = select(there, offset, splat(-INFINITY));
            for (int i = 0; i < W; i++) rough->length[v][i] = there[i] ? square_root(square[i]) : 0.0f;
            for (int i = 0; i < W; i++) rough->error[v][i] = there[i] ? square_root(lost[i]) : 0.0f;
        }
    }
    void find_most() {
        vf lengths{}, errors{}, none{};
        for (int64_t i = 0; i < panels * SIDE; i++) {
            const vf one = panel(i / SIDE)->length[i % SIDE];
            lengths = larger(one, lengths), errors = larger(panel(i / SIDE)->error[i % SIDE], errors);
            none += one * 0.0f;  // no number where the length is none, or infinite
        }
        length = largest(lengths) + sum(none), error = largest(errors);
    }

    struct Source {
        float unit, slack;  // by how much two of its similarities may be wrong, together
        int32_t more;       // takes from a sum what the 128 added to numbers of targets put in
    };

    Source take(const float* row, int8_t* numbers) const {
        typedef int8_t Narrow __attribute__((vector_size(W)));
        auto from_center = [&](int64_t f, int m) { return load(row + f, m) - load(center() + f, m); };
        vf most{}, square{}, lost{}, total{};
        for (int64_t f = 0; f < targets.columns; f += W) {
            const vf z = from_center(f, (int)smaller(W, targets.columns - f));
            most = larger(magnitude(z), most);
            square += z * z;
        }
        const float unit = largest(most) / 127.0f, inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
        for (int64_t f = 0; f < targets.columns; f += W) {
            const vf z = from_center(f, (int)smaller(W, targets.columns - f));
            const vi number = whole(z * inverse);
            const vf rounded = __builtin_convertvector(number, vf), rest = z - rounded * unit;
            const Narrow narrow = __builtin_convertvector(number, Narrow);
            memcpy(numbers + f, &narrow, sizeof narrow);
            lost += rest * rest;
            total += rounded;
        }
        const float own = square_root(sum(lost)), around = square_root(sum(square)) + own;
        const float rounding = (float)(targets.columns + 16) * 0x1p-21f;  // of every sum in fp32, the exact ones too
        return {unit, 2.0f * (own * length + around * error) + rounding, (int32_t)(-128.0f * sum(total))};
    }

    // GROUP sources against one panel: writes similarities, those of a source `stride` vectors after those of the one before.
    INLINE void compare(const Screen& screen, const int8_t* numbers, const Source* sources, int64_t panel, vf* similar,
                        int64_t stride, vf* best) {
        const Rough* rough = screen.panel(panel);
        const vi* packed = Rough::numbers(rough);
        vi acc[GROUP][SIDE];
        for (int g = 0; g < GROUP; g++)
            for (int v = 0; v < SIDE; v++) acc[g][v] = vi{} + sources[g].more;
        for (int64_t k = 0; k < screen.steps; k++) {
            const vi b0 = packed[k * SIDE], b1 = packed[k * SIDE + 1];
#pragma GCC unroll 8
            for (int g = 0; g < GROUP; g++) {
                int32_t four;
                memcpy(&four, numbers + g * screen.width + k * FOUR, sizeof four);
                acc[g][0] = add_four(acc[g][0], b0, four);
                acc[g][1] = add_four(acc[g][1], b1, four);
            }
        }
        for (int g = 0; g < GROUP; g++)
            for (int v = 0; v < SIDE; v++) {
                const vf product = __builtin_convertvector(acc[g][v], vf) * sources[g].unit;
                const vf value = product * rough->unit[v] + rough->offset[v];
                similar[g * stride + panel * SIDE + v] = value;
                best[g] = larger(value, best[g]);
            }
    }

    // Exactly: the vectors of targets that have one which may be the best of a source.
    void look_again(const float* row, const vf* similar, float least, Best& best) const {
        int64_t found[FOUR];
        int count = 0;
        for (int64_t v = 0; v < targets.vectors(); v++) {
            if (lanes_set(~(similar[v] < least))) found[count++] = v;  // what is no number is looked at too
            if (count < FOUR && (count == 0 || v + 1 < targets.vectors())) continue;
            const vf* packed[FOUR];
            vf acc[FOUR] = {};
            for (int k = 0; k < FOUR; k++) packed[k] = targets.vector(found[k < count ? k : 0]);
            for (int64_t f = 0; f < targets.columns; f++)
#pragma GCC unroll 4
                for (int k = 0; k < FOUR; k++) acc[k] += packed[k][f * SIDE] * row[f];
            for (int k = 0; k < count; k++) Best::update(best, targets, acc[k], found[k]);
            count = 0;
        }
    }

    // What `search` needs for the sources of a task, in vectors.
    static int64_t workspace(int64_t columns, int64_t count) {
        return PER_TASK * ((count + PANEL - 1) / PANEL * SIDE + (columns + W - 1) / W);
    }

    // The best targets of `count` sources; rows of zeros fill the last group.
    void search(const float* rows, int64_t count, vf* workspace, Best* best) const {
        const int64_t stride = panels * SIDE;
        int8_t* numbers = (int8_t*)(workspace + PER_TASK * stride);
        Source sources[PER_TASK];
        vf highest[PER_TASK];
        for (int64_t i = 0; i < count; i += GROUP)
            for (int64_t g = i; g < i + GROUP; g++) {
                sources[g] = take(rows + g * targets.columns, numbers + g * width);
                highest[g] = splat(-INFINITY);
            }
        for (int64_t panel = 0; panel < panels; panel++)
            for (int64_t i = 0; i < count; i += GROUP)
                compare(*this, numbers + i * width, sources + i, panel, workspace + i * stride, stride, highest + i);
        for (int64_t i = 0; i < count; i++)
            look_again(rows + i * targets.columns, workspace + i * stride, largest(highest[i]) - sources[i].slack, best[i]);
    }
};

// -------------------------------------------------------------------------------------------------------------- search

// A panel of the targets of image b.
int pack_targets(const NearestArgs& p, int64_t b, int64_t panel, vf* packed) {
    const int64_t* target = (const int64_t*)p.target + b * p.target_batch + panel * PANEL;
    const int64_t live = smaller(PANEL, p.targets - panel * PANEL);
    Memory<float> rows(live * p.columns);
    if (!rows) return 1;
    for (int64_t i = 0; i < live; i++) {
        if (outside(target[i], p.length)) return 2;
        unit_row((const float*)p.x + (b * p.length + target[i]) * p.columns, p.columns, rows + i * p.columns);
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
        unit_row((const float*)p.x + (b * p.length + source[i]) * columns, columns, rows + i * columns);
    }
    if (screen) screen->search(rows, count, workspace, best);
    for (int64_t panel = 0; !screen && panel * PANEL < p.targets; panel++)
        for (int64_t i = 0; i < count; i += GROUP) compare(rows + i * columns, targets, panel, best + i);
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = b * p.sources + first + i;
        ((int64_t*)p.nearest)[at] = target[best[i].first((float*)p.similarity + at)];
    }
    return 0;
}

int nearest(const NearestArgs& p) {
    const int64_t panels = (p.targets + PANEL - 1) / PANEL, tasks = (p.sources + PER_TASK - 1) / PER_TASK;
    const int64_t exact = panels * p.columns * SIDE, worth = p.batch * p.sources * p.targets * p.columns / 4;
    const bool screens = p.targets >= WORTH_A_SCREEN;
    const int64_t each = exact + (screens ? Screen::vectors(p.columns, p.targets) : 0);
    static thread_local Kept kept;
    vf* space = kept.take(p.batch * each);
    if (!space) return 1;
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
            for (int64_t panel = 0; panel < panels; panel++)
                fail(pack_targets(p, b, panel, space + b * each + panel * p.columns * SIDE));
        if (screens && !failed) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < p.batch; b++) Screen(targets(b), space + b * each + exact).find_center();
#pragma omp for collapse(2) schedule(static)
            for (int64_t b = 0; b < p.batch; b++)
                for (int64_t panel = 0; panel < panels; panel++) Screen(targets(b), space + b * each + exact).make(panel);
        }
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t task = 0; task < tasks; task++) {
                if (failed) continue;
                const Targets all = targets(b);
                Screen screen(all, space + b * each + exact);
                if (screens) screen.find_most();
                fail(search(p, b, task * PER_TASK, all, screens ? &screen : nullptr));
            }
    }
    kept.drop();
    return failed;
}

}  // namespace
