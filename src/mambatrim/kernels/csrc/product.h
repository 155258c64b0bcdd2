// Matrix products with weights: y (S, M, O) = x (S, M, I) weight (S, O, I)^T, in S directions at once, sums in fp32.
//
// A task packs a panel of outputs, transposed, so that vectors run over outputs, and takes its rows a few at a time: all
// sums of a tile stay in registers. Packing costs a few per cent at 200 rows; no packed weight outlives the call, so that
// weights may change at any time. Every sum adds up its inputs in order, whatever the tile: equal rows give equal results.
#pragma once
#include "abi.h"
#include "memory.h"
#include "threads.h"
#include "vec.h"

namespace {

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
#if defined(__AVX512F__)
constexpr int TALL = 8, WIDE = 3;  // rows, and vectors of outputs, of a tile
#define LOW_PAIRS(a, b) PICK(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_PAIRS(a, b) PICK(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif defined(__AVX2__)
constexpr int TALL = 6, WIDE = 2;
#define LOW_PAIRS(a, b) PICK(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_PAIRS(a, b) PICK(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
constexpr int TALL = 6, WIDE = 2;
#define LOW_PAIRS(a, b) PICK(a, b, 0, 4, 1, 5)
#define HIGH_PAIRS(a, b) PICK(a, b, 2, 6, 3, 7)
#endif

// W rows of W elements become columns. Each round interleaves the first half of the rows with the second.
INLINE void transpose(vf* rows) {
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        vf next[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; i++) {
            next[2 * i] = LOW_PAIRS(rows[i], rows[i + W / 2]);
            next[2 * i + 1] = HIGH_PAIRS(rows[i], rows[i + W / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) rows[i] = next[i];
    }
}

// How a row is read: `Unit` is what one step of a sum takes of it; `packed` loads m units of a weight as a vector.
template <typename T>
struct Operand {
    typedef T Unit;
    static constexpr int64_t PER_UNIT = 1;
    INLINE vf packed(const T* p, int m) { return load(p, m); }
    INLINE vf broadcast(const float* p) { return splat(*p); }
    INLINE vf broadcast(const bf16* p) {
        const uint32_t bits = (uint32_t)p->bits << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        return splat(value);
    }
    INLINE vf add(vf sum, vf x, vf w) { return sum + x * w; }
};

#if defined(__AVX512BF16__)
// Two elements of bf16 in each 32 bits, multiplied and added by one instruction.
template <>
struct Operand<bf16> {
    typedef float Unit;  // 32 bits: a pair
    static constexpr int64_t PER_UNIT = 2;
    INLINE vf packed(const float* p, int m) { return load(p, m); }
    INLINE vf broadcast(const float* p) { return splat(*p); }
    INLINE vf add(vf sum, vf x, vf w) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }
};
#endif

// V vectors of outputs, of which `live` are there, as columns: rows of `units` units from `weight` on -> (units, V).
template <typename T, int V>
INLINE void pack_panel(const typename Operand<T>::Unit* weight, int64_t units, int64_t live, vf* packed) {
    for (int v = 0; v < V; v++) {
        const typename Operand<T>::Unit* from = weight + v * W * units;
        const int64_t there = live - v * W;
        int64_t k = 0;
        vf rows[W];
        for (; there >= W && k + W <= units; k += W) {
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) rows[i] = Operand<T>::packed(from + i * units + k, W);
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) packed[(k + i) * V + v] = rows[i];
        }
        for (; k < units; k += W) {
            const int m = (int)smaller(W, units - k);
            for (int i = 0; i < W; i++) rows[i] = i < there ? Operand<T>::packed(from + i * units + k, m) : vf{};
            transpose(rows);
            for (int i = 0; i < m; i++) packed[(k + i) * V + v] = rows[i];
        }
    }
}

// How weights are cut: into panels of `width` vectors of outputs, all about alike; `size` vectors each when packed.
template <typename T>
struct Panels {
    int64_t units, count, width, size;
    Panels(int64_t inputs, int64_t outputs) : units(inputs / Operand<T>::PER_UNIT) {
        const int64_t vectors = (outputs + W - 1) / W;
        count = (vectors + WIDE - 1) / WIDE;
        width = count ? (vectors + count - 1) / count : 0;
        size = units * width;
    }
};

// A panel of direction s from output `column` on.
template <typename T>
INLINE void pack_panel(const ProductArgs& p, const Panels<T>& panels, int64_t s, int64_t column, vf* packed) {
    typedef typename Operand<T>::Unit Unit;
    const Unit* weight = (const Unit*)p.weight[s] + column * panels.units;
    const int64_t live = smaller(panels.width * W, p.outputs - column);
    if (panels.width == 1) pack_panel<T, 1>(weight, panels.units, live, packed);
    else if (panels.width == 2) pack_panel<T, 2>(weight, panels.units, live, packed);
    else pack_panel<T, WIDE>(weight, panels.units, live, packed);
}

// All panels in the order in which `product` takes them: directions * count * size vectors.
template <typename T>
void pack_weights(const ProductArgs& p, vf* packed) {
    const Panels<T> panels(p.inputs, p.outputs);
    for (int64_t j = 0; j < panels.count; j++)
        for (int64_t s = 0; s < p.directions; s++, packed += panels.size)
            if (j * panels.width * W < p.outputs) pack_panel(p, panels, s, j * panels.width * W, packed);
}

// The sums of H rows and V vectors of outputs.
template <typename T, int H, int V>
INLINE void multiply(const typename Operand<T>::Unit* const* x, const vf* packed, int64_t units, vf (*sum)[V]) {
#pragma GCC unroll 8
    for (int i = 0; i < H; i++)
        for (int v = 0; v < V; v++) sum[i][v] = vf{};
    for (int64_t k = 0; k < units; k++) {
        vf w[V];
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) w[v] = packed[k * V + v];
#pragma GCC unroll 8
        for (int i = 0; i < H; i++) {
            const vf one = Operand<T>::broadcast(x[i] + k);
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) sum[i][v] = Operand<T>::add(sum[i][v], one, w[v]);
        }
    }
}

// Memory that is wanted soon, fetched a part at a time.
struct Soon {
    const char *at, *end;
    int64_t part;
    INLINE void fetch(Soon& soon) {
        for (const char* stop = soon.at + soon.part; soon.at < stop && soon.at < soon.end; soon.at += 64)
            __builtin_prefetch(soon.at, 0, 2);
    }
};

// Rows `first` to `end` of V vectors of outputs from output `column` on.
template <typename T, typename Y, int H, int V>
void panel_rows(const ProductArgs& p, int64_t s, const vf* packed, int64_t column, int64_t first, int64_t end, Soon& soon) {
    typedef typename Operand<T>::Unit Unit;
    const int64_t units = p.inputs / Operand<T>::PER_UNIT, live = smaller(V * W, p.outputs - column);
    const Unit* x = (const Unit*)p.x + s * p.x_direction / Operand<T>::PER_UNIT;
    Y* y = (Y*)p.y + s * p.rows * p.outputs + column;
    const Y* base = p.base ? (const Y*)p.base + s * p.rows * p.base_row + column : nullptr;
    for (int64_t t = first; t < end; t += H) {
        const Unit* rows[H];  // past the end the last one again
        for (int i = 0; i < H; i++) rows[i] = x + smaller(t + i, end - 1) * units;
        Soon::fetch(soon);
        vf sum[H][V];
        multiply<T, H, V>(rows, packed, units, sum);
#pragma GCC unroll 8
        for (int i = 0; i < H; i++) {
            if (t + i >= end) break;
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) {
                const int m = (int)smaller(W, live - v * W);
                const vf more = base ? load(base + (t + i) * p.base_row + v * W, m) : vf{};
                store(y + (t + i) * p.outputs + v * W, sum[i][v] + more, m);
            }
        }
    }
}

// The same for all of them, and fetches meanwhile what `soon` names.
template <typename T, typename Y, int V>
INLINE void panel(const ProductArgs& p, int64_t s, const vf* packed, int64_t column, int64_t first, int64_t end, Soon soon) {
    soon.part = (soon.end - soon.at) / ((end - first + TALL - 1) / TALL) + 64;
    const int64_t rest = (end - first) % TALL, full = end - rest;
    panel_rows<T, Y, TALL, V>(p, s, packed, column, first, full, soon);
    // the last rows, in a tile that is hardly higher
    if (rest > 6) panel_rows<T, Y, TALL, V>(p, s, packed, column, full, end, soon);
    else if (rest > 4) panel_rows<T, Y, 6, V>(p, s, packed, column, full, end, soon);
    else if (rest > 2) panel_rows<T, Y, 4, V>(p, s, packed, column, full, end, soon);
    else panel_rows<T, Y, 2, V>(p, s, packed, column, full, end, soon);
}

template <typename T, typename Y>
int product(const ProductArgs& p) {
    typedef typename Operand<T>::Unit Unit;
    const Panels<T> panels(p.inputs, p.outputs);
    // the panels are shared out, and where they do not go round their rows are too
    const int64_t units = panels.count * p.directions, width = panels.width;
    const int64_t parts = units % p.threads ? (4 * p.threads + units - 1) / units : 1;
    const int64_t height = ((p.rows + parts - 1) / parts + TALL - 1) / TALL * TALL, slices = (p.rows + height - 1) / height;
    Shares shares(units * slices, p.threads);
    int failed = 0;
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1)
    {
        static thread_local Kept kept;
        vf* space = p.packed ? nullptr : kept.take(panels.size);
        if (!space && !p.packed) {
#pragma omp atomic write
            failed = 1;
        }
        const auto make = [&](int64_t task) {
            const int64_t unit = task / slices, s = unit % p.directions, column = unit / p.directions * width * W;
            const int64_t first = task % slices * height, end = smaller(p.rows, first + height);
            if (column >= p.outputs) return;
            // the panel that the thread takes next
            const vf* packed = (const vf*)p.packed + unit * panels.size;
            const char *at = (const char*)(packed + panels.size), *after = (const char*)(packed + 2 * panels.size);
            if (!p.packed) {
                const int64_t next = (unit + 1) / p.directions * width * W, there = smaller(width * W, p.outputs - next);
                at = (const char*)((const Unit*)p.weight[(unit + 1) % p.directions] + next * panels.units);
                after = at + (there > 0 ? there * panels.units * (int64_t)sizeof(Unit) : 0);
                pack_panel(p, panels, s, column, space);
                packed = space;
            }
            if (width == 1) panel<T, Y, 1>(p, s, packed, column, first, end, {at, after, 0});
            else if (width == 2) panel<T, Y, 2>(p, s, packed, column, first, end, {at, after, 0});
            else panel<T, Y, WIDE>(p, s, packed, column, first, end, {at, after, 0});
        };
        if (space || p.packed) shares.work(make);
        kept.drop();
    }
    return failed;
}

}  // namespace
