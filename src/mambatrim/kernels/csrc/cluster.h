// Agglomerative clustering of the rows of a matrix, exact and sequential (definition: kernels/clustering.py).
//
// A row remembers its cheapest partner among the rows behind it. After a pair was joined only the rows that remember one of
// the two look again; the others compare with the new cluster. A pair costs at least the distance of its places, so a row
// is multiplied only with those that are near enough to be its partner: no matrix of products is ever made.
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

// The first place where x is smallest; x has `stride` entries, whole vectors, infinite where nothing may be chosen.
INLINE int64_t smallest(const float* x, int64_t stride) {
    vf best = splat(INFINITY);
    const vi lane = lanes();
    vi at{};
    for (int64_t j = 0; j < stride; j += W) {
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
    float exponent;
    float* sums;                              // (M, width): of the rows in the cluster
    float *inverse, *weight, *gone, *price;   // (stride): 1 / length of the sum; infinite if gone; cost of the partner
    float* place;                             // (P, stride)
    int32_t *partner, *root;                  // (stride)

    static int64_t vectors(int64_t stride, int64_t width, int64_t axes, int64_t rows) {
        return (rows * width + (axes + 6) * stride) / W;
    }
    Clusters(const ClusterArgs& p, int64_t stride, int64_t width, float* memory)
        : rows(p.rows), stride(stride), width(width), axes(p.axes), exponent((float)p.exponent), sums(memory),
          inverse(sums + rows * width), weight(inverse + stride), gone(weight + stride), price(gone + stride),
          place(price + stride), partner((int32_t*)(place + axes * stride)), root(partner + stride) {}

    const float* row(int64_t i) const { return sums + i * width; }

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

    // Calls take(j, cost) for the rows j of [from, to) in turn; leaves out those that are farther from row i than limit(j).
    template <class Limit, class Take>
    void compare(int64_t i, int64_t from, int64_t to, Limit limit, Take take) const {
        for (int64_t j0 = from / W * W; j0 < to; j0 += W) {
            vf apart = load(gone + j0, W);
            for (int64_t a = 0; a < axes; a++) apart += magnitude(load(place + a * stride + j0, W) - place[a * stride + i]);
            uint32_t near = lanes_set((apart <= limit(j0)) & (apart < splat(INFINITY)));
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
    }

    // Finds the cheapest partner of row i among those behind it; of equals the first.
    void look(int64_t i) {
        float least = INFINITY;
        int64_t found = i + 1;
        compare(i, i + 1, rows, [&](int64_t) { return splat(least); }, [&](int64_t j, float cost) {
            if (cost < least) least = cost, found = j;
        });
        partner[i] = (int32_t)found;
        price[i] = least;
    }

    // Cluster `kept` is new: the rows before it for which it is cheaper than their partners take it.
    void offer(int64_t kept) {
        compare(kept, 0, kept, [&](int64_t i0) { return load(price + i0, W); }, [&](int64_t i, float cost) {
            if (cost < price[i] || (cost == price[i] && kept < partner[i])) {
                partner[i] = (int32_t)kept;
                price[i] = cost;
            }
        });
    }

    void measure(int64_t i) {
        const float* other[4] = {row(i), row(i), row(i), row(i)};
        float square[4];
        products(i, other, square);
        inverse[i] = inverse_length(square[0]);
    }

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
        for (int64_t i = 0; i < rows; i++) {
            const float* x = (const float*)p.x + (b * rows + i) * p.width;
            for (int64_t f = 0; f < width; f += W) {
                const int m = (int)smaller(W, p.width - f);
                store(sums + i * width + f, load(x + f, m) * weight[i], W);
            }
            measure(i);
        }
    }

    // Joins the cheapest pair.
    void join() {
        int64_t first = smallest(price, stride), second = partner[first];
        if (!(price[first] < INFINITY)) {  // costs that are no numbers: the first two rows that are left
            for (first = 0; gone[first] != 0.0f;) first++;
            for (second = first + 1; gone[second] != 0.0f;) second++;
        }
        const bool swap = weight[second] > weight[first];
        const int64_t kept = swap ? second : first, lost = swap ? first : second;
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
        for (int64_t i0 = 0; i0 < stride; i0 += W) {
            vi of;
            memcpy(&of, partner + i0, sizeof of);
            uint32_t again = lanes_set(((of == (int32_t)kept) | (of == (int32_t)lost)) & (load(gone + i0, W) == splat(0.0f)));
            for (; again; again &= again - 1)
                if (i0 + __builtin_ctz(again) != kept) look(i0 + __builtin_ctz(again));
        }
        look(kept);
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
    constexpr int64_t TOGETHER = 16;  // rows that look at a time
    const int64_t stride = (p.rows + W - 1) / W * W, width = (p.width + W - 1) / W * W;
    const int64_t each = Clusters::vectors(stride, width, p.axes, p.rows), parts = (p.rows + TOGETHER - 1) / TOGETHER;
    Scratch memory(p.batch * each);
    if (!memory) return 1;
    auto image = [&](int64_t b) { return Clusters(p, stride, width, (float*)(memory + b * each)); };
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < p.batch; b++) image(b).start(p, b);
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t part = 0; part < parts; part++)
                for (int64_t i = part * TOGETHER; p.r && i < smaller((part + 1) * TOGETHER, p.rows); i++) image(b).look(i);
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < p.batch; b++) {
            Clusters clusters = image(b);
            for (int64_t step = 0; step < p.r; step++) clusters.join();
            clusters.finish((int64_t*)p.keep + b * (p.rows - p.r), (int64_t*)p.dest + b * p.rows);
        }
    }
    return 0;
}

}  // namespace
