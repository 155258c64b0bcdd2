// Agglomerative clustering of the rows of a matrix, exact and sequential (definition: kernels/clustering.py).
//
// A row remembers its cheapest partner among the rows behind it. After a pair was joined only the rows that remember one of
// the two look again; the others compare with the new cluster. A pair costs at least the distance of its places, so a row
// is multiplied only with those that are near enough to be its partner: no matrix of products is ever made. Blocks of rows
// know between which places theirs lie, so that of a long sequence the blocks are asked and not the rows.
#pragma once
#include <cmath>

#include "abi.h"
#include "memory.h"
#include "vec.h"

namespace {

INLINE float inverse_length(float square) {
    const float length = std::sqrt(square > 0.0f ? square : 0.0f);
    return length > 1e-12f ? 1.0f / length : 0.0f;
}

// The first place where x is smallest, of n, a whole number of vectors; 0 where all are infinite.
INLINE int64_t smallest(const float* x, int64_t n) {
    const vi lane = lanes();
    vf best = splat(INFINITY);
    vi at{};
    for (int64_t j = 0; j < n; j += W) {
        const vf value = load(x + j, W);
        const vi less = value < best;
        best = select(less, value, best);
        at = less ? lane + (int32_t)j : at;
    }
    int64_t found = 0;
    float least = INFINITY;
    for (int l = 0; l < W; l++)
        if (best[l] < least || (best[l] == least && best[l] < INFINITY && at[l] < found)) {
            least = best[l];
            found = at[l];
        }
    return found;
}

// The clusters of one image, each at the row that stands for it.
struct Clusters {
    int64_t rows, stride, width, axes;  // stride: of numbers per row, and width: of a row, both in whole vectors
    int64_t blocks;                     // of W rows each, in whole vectors
    float exponent;
    float* sums;                             // (M, width): of the rows in the cluster
    float *inverse, *weight, *gone, *price;  // (stride): 1 / length of the sum; infinite if gone; cost of the partner
    float* place;                            // (P, stride)
    int32_t *partner, *root, *again;         // (stride); again: rows that are to look again
    float *low, *high, *least, *most;        // (blocks): of the rows that are left, places on the first axis and prices

    static int64_t whole(int64_t n) { return (n + W - 1) / W * W; }
    static int64_t vectors(int64_t stride, int64_t width, int64_t axes, int64_t rows) {
        return (rows * width + (axes + 7) * stride + 4 * whole(stride / W)) / W;
    }
    Clusters(const ClusterArgs& p, int64_t stride, int64_t width, float* memory)
        : rows(p.rows), stride(stride), width(width), axes(p.axes), blocks(whole(stride / W)),
          exponent((float)p.exponent), sums(memory),
          inverse(sums + rows * width), weight(inverse + stride), gone(weight + stride), price(gone + stride),
          place(price + stride), partner((int32_t*)(place + axes * stride)), root(partner + stride), again(root + stride),
          low((float*)(again + stride)), high(low + blocks), least(high + blocks), most(least + blocks) {}

    const float* row(int64_t i) const { return sums + i * width; }
    float first_place(int64_t i) const { return axes ? place[i] : 0.0f; }

    // Row i has another place, or is gone: so has its block.
    void settle_place(int64_t i) {
        const int64_t block = i / W;
        const vf at = axes ? load(place + block * W, W) : vf{};
        const vi near = (load(gone + block * W, W) == splat(0.0f)) & (at == at);  // no number: near no other
        low[block] = -largest(select(near, -at, splat(-INFINITY)));
        high[block] = largest(select(near, at, splat(-INFINITY)));
    }

    // Row i has another price, or is gone.
    void settle_price(int64_t i) {
        const int64_t block = i / W;
        const vf cost = load(price + block * W, W);
        least[block] = -largest(-cost);
        most[block] = largest(select(load(gone + block * W, W) == splat(0.0f), cost, splat(-INFINITY)));
    }

    // The blocks of [block, block + W) that may have a row no farther from `at` than theirs or the given limit.
    uint32_t near_blocks(int64_t block, float at, vf limit) const {
        const vf before = load(low + block, W) - at, behind = at - load(high + block, W);
        return lanes_set((before <= limit) & (behind <= limit));
    }

    // Products of row i with four others.
    void products(int64_t i, const float* const* other, float* out) const {
        vf dot[4] = {};
        for (int64_t f = 0; f < width; f += W) {
            const vf own = load(row(i) + f, W);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) dot[k] += own * load(other[k] + f, W);
        }
        for (int k = 0; k < 4; k++) out[k] = sum(dot[k]);
    }

    float cost(int64_t i, int64_t j, float product, float apart) const {
        const float unlike = 1.0f - product * (inverse[i] * inverse[j]);
        float ward = 2.0f * weight[i] * weight[j] / (weight[i] + weight[j]);
        if (exponent == 0.0f) ward = 1.0f;
        else if (exponent != 1.0f) ward = std::pow(ward, exponent);
        return (unlike < 0.0f ? 0.0f : unlike) * ward + apart;
    }

    // Calls take(j, cost) for the rows j of [from, to) in turn; leaves out those that are farther from row i than the limits
    // of their blocks, limit(first of W blocks), and within a block than near(its first row).
    template <class Limit, class Near, class Take>
    void compare(int64_t i, int64_t from, int64_t to, Limit limit, Near near, Take take) const {
        for (int64_t block = from / W / W * W; block * W < to; block += W)
            for (uint32_t left = near_blocks(block, first_place(i), limit(block)); left; left &= left - 1) {
                const int64_t j0 = (block + __builtin_ctz(left)) * W;
                if (j0 + W > from && j0 < to) compare_block(i, j0, from, to, near(j0), take);
            }
    }

    template <class Take>
    void compare_block(int64_t i, int64_t j0, int64_t from, int64_t to, vf limit, Take take) const {
        vf apart = load(gone + j0, W);
        for (int64_t a = 0; a < axes; a++) apart += magnitude(load(place + a * stride + j0, W) - place[a * stride + i]);
        uint32_t near = lanes_set((apart <= limit) & (apart < splat(INFINITY)));
        if (j0 < from) near &= ~0u << (from - j0);
        if (to - j0 < W) near &= (1u << (to - j0)) - 1;
        while (near) {
            const float* other[4];
            int64_t j[4];
            float product[4];
            int count = 0;
            for (; near && count < 4; near &= near - 1) j[count++] = j0 + __builtin_ctz(near);
            for (int k = 0; k < 4; k++) other[k] = row(j[k < count ? k : 0]);
            products(i, other, product);
            for (int k = 0; k < count; k++) take(j[k], cost(i, j[k], product[k], apart[j[k] - j0]));
        }
    }

    // Finds the cheapest partner of row i among those behind it; of equals the first.
    void look(int64_t i) {
        float cheapest = INFINITY;
        int64_t found = i + 1;
        auto limit = [&](int64_t) { return splat(cheapest); };
        compare(i, i + 1, rows, limit, limit, [&](int64_t j, float cost) {
            if (cost < cheapest) cheapest = cost, found = j;
        });
        partner[i] = (int32_t)found;
        price[i] = cheapest;
    }

    // Cluster `kept` is new: the rows before it for which it is cheaper than their partners take it.
    void offer(int64_t kept) {
        auto limit = [&](int64_t block) { return load(most + block, W); };
        auto near = [&](int64_t i0) { return load(price + i0, W); };
        compare(kept, 0, kept, limit, near, [&](int64_t i, float cost) {
            if (cost < price[i] || (cost == price[i] && kept < partner[i])) {
                partner[i] = (int32_t)kept;
                price[i] = cost;
                settle_price(i);
            }
        });
    }

    void measure(int64_t i) {
        const float* other[4] = {row(i), row(i), row(i), row(i)};
        float square[4];
        products(i, other, square);
        inverse[i] = inverse_length(square[0]);
    }

    // All numbers of image b.
    void start(const ClusterArgs& p, int64_t b) {
        for (int64_t j = 0; j < stride; j++) {
            const bool real = j < rows;
            weight[j] = real ? ((const float*)p.weight)[b * rows + j] : 1.0f;
            gone[j] = real ? 0.0f : INFINITY;
            price[j] = INFINITY;
            root[j] = partner[j] = (int32_t)j;
            for (int64_t a = 0; a < axes; a++)
                place[a * stride + j] = real ? ((const float*)p.coordinates)[(b * rows + j) * axes + a] : 0.0f;
        }
        for (int64_t block = stride / W; block < blocks; block++) {
            low[block] = least[block] = INFINITY;
            high[block] = most[block] = -INFINITY;
        }
        for (int64_t i = 0; i < rows; i += W) settle_place(i);
    }

    // Row i of image b, times its weight.
    void fetch(const ClusterArgs& p, int64_t b, int64_t i) {
        const int64_t at = p.positions ? ((const int64_t*)p.positions)[b * rows + i] : i;
        const float* x = (const float*)p.x + (b * p.length + at) * p.width;
        for (int64_t f = 0; f < width; f += W) {
            const int m = (int)smaller(W, p.width - f);
            store(sums + i * width + f, load(x + f, m) * weight[i], W);
        }
        measure(i);
    }

    // Rows that remember one of the two, which are no farther from it than their prices: their number.
    int64_t remember(int64_t kept, int64_t lost) {
        int64_t count = 0;
        for (int64_t block = 0; block * W < stride; block += W) {
            const vf limit = load(most + block, W);
            uint32_t near = near_blocks(block, first_place(kept), limit) | near_blocks(block, first_place(lost), limit);
            for (; near; near &= near - 1) {
                const int64_t i0 = (block + __builtin_ctz(near)) * W;
                vi of;
                memcpy(&of, partner + i0, sizeof of);
                uint32_t those = lanes_set(((of == (int32_t)kept) | (of == (int32_t)lost)) & (load(gone + i0, W) == splat(0.0f)));
                for (; those; those &= those - 1) again[count++] = (int32_t)(i0 + __builtin_ctz(those));
            }
        }
        return count;
    }

    // Joins the cheapest pair.
    void join() {
        const int64_t block = smallest(least, blocks);
        int64_t first = block * W + smallest(price + block * W, W), second = partner[first];
        if (!(price[first] < INFINITY)) {  // costs that are no numbers: the first two rows that are left
            for (first = 0; gone[first] != 0.0f;) first++;
            for (second = first + 1; gone[second] != 0.0f;) second++;
        }
        const bool swap = weight[second] > weight[first];
        const int64_t kept = swap ? second : first, lost = swap ? first : second, count = remember(kept, lost);
        const float w = weight[kept], v = weight[lost];
        for (int64_t a = 0; a < axes; a++) {
            float* at = place + a * stride;
            at[kept] = (w * at[kept] + v * at[lost]) / (w + v);
        }
        weight[kept] = w + v;
        for (int64_t f = 0; f < width; f += W)
            store(sums + kept * width + f, load(row(kept) + f, W) + load(row(lost) + f, W), W);
        measure(kept);
        gone[lost] = price[lost] = INFINITY;
        root[lost] = (int32_t)kept;  // roots are followed at the end
        settle_place(lost);
        settle_place(kept);
        settle_price(lost);
        for (int64_t k = 0; k < count; k++)
            if (again[k] != kept && again[k] != lost) {
                look(again[k]);
                settle_price(again[k]);
            }
        look(kept);
        settle_price(kept);
        offer(kept);
    }

    void finish(int64_t* keep, int64_t* dest) const {
        int64_t found = 0;
        for (int64_t i = 0; i < rows; i++)
            if (root[i] == i) {
                keep[found] = i;
                dest[i] = found++;
            }
        for (int64_t i = 0; i < rows; i++) {
            int64_t top = i;
            while (root[top] != top) top = root[top];
            dest[i] = dest[top];
        }
    }
};

int agglomerate(const ClusterArgs& p) {
    constexpr int64_t TOGETHER = 16, SPACE = 8 << 20;  // rows at a time; bytes for the images that are made at a time
    const int64_t stride = Clusters::whole(p.rows), width = Clusters::whole(p.width);
    const int64_t each = Clusters::vectors(stride, width, p.axes, p.rows), parts = (p.rows + TOGETHER - 1) / TOGETHER;
    const int64_t fit = SPACE / (each * (int64_t)sizeof(vf)), images = smaller(p.batch, fit > p.threads ? fit : p.threads);
    static thread_local Kept kept;
    vf* memory = kept.take(images * each);
    if (!memory) return 1;
    for (int64_t first = 0; first < p.batch; first += images) {
        const int64_t end = smaller(p.batch, first + images);
        auto image = [&](int64_t b) { return Clusters(p, stride, width, (float*)(memory + (b - first) * each)); };
        auto each_row = [&](int64_t part, auto what) {
            for (int64_t i = part * TOGETHER; i < smaller((part + 1) * TOGETHER, p.rows); i++) what(i);
        };
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1)
        {
#pragma omp for schedule(static)
            for (int64_t b = first; b < end; b++) image(b).start(p, b);
#pragma omp for collapse(2) schedule(static)
            for (int64_t b = first; b < end; b++)
                for (int64_t part = 0; part < parts; part++) each_row(part, [&](int64_t i) { image(b).fetch(p, b, i); });
#pragma omp for collapse(2) schedule(dynamic, 1)
            for (int64_t b = first; b < end; b++)
                for (int64_t part = 0; part < parts; part++)
                    if (p.r) each_row(part, [&](int64_t i) { image(b).look(i); });
#pragma omp for schedule(dynamic, 1)
            for (int64_t b = first; b < end; b++) {
                Clusters clusters = image(b);
                for (int64_t i = 0; i < p.rows; i += W) clusters.settle_price(i);
                for (int64_t step = 0; step < p.r; step++) clusters.join();
                clusters.finish((int64_t*)p.keep + b * (p.rows - p.r), (int64_t*)p.dest + b * p.rows);
            }
        }
    }
    kept.drop();
    return 0;
}

}  // namespace
