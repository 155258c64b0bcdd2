// Agglomerative clustering of the rows of a matrix, exact and sequential (definition: kernels/clustering.py).
//
// A row remembers its cheapest partner among the rows behind it. After a pair was joined only the rows that remember one of
// the two look again; the others compare with the new cluster. So a join costs a few walks over one row.
#pragma once
#include <cmath>

#include "abi.h"
#include "vec.h"

namespace {

struct Clusters {
    int64_t axes;
    float exponent;
    const float *gram, *inverse, *weight, *gone;  // (M, stride), (stride) each
    const float* place;                           // (P, stride)
    int64_t stride;

    // Costs of row i with all rows, in `out`; infinite for those that are gone.
    void costs(int64_t i, float* out) const {
        const float* g = gram + i * stride;
        for (int64_t j = 0; j < stride; j += W) {
            const vf w = load(weight + j, W);
            vf ward = 2.0f * w * weight[i] / (w + weight[i]);
            if (exponent == 0.0f) ward = splat(1.0f);
            else if (exponent != 1.0f)
                for (int l = 0; l < W; l++) ward[l] = std::pow(ward[l], exponent);
            const vf cost = (1.0f - load(g + j, W) * inverse[i] * load(inverse + j, W)) * ward;
            vf apart = load(gone + j, W);
            for (int64_t a = 0; a < axes; a++) apart += magnitude(load(place + a * stride + j, W) - place[a * stride + i]);
            store(out + j, cost + apart, W);
        }
    }
};

INLINE float inverse_length(float square) {
    const float length = std::sqrt(square > 0.0f ? square : 0.0f);
    return length > 1e-12f ? 1.0f / length : 0.0f;
}

// The first place after `i` where x is smallest; x has `stride` entries, whole vectors, infinite where nothing may be chosen.
INLINE int64_t smallest_behind(const float* x, int64_t i, int64_t stride) {
    vf best = splat(INFINITY);
    vi at{}, lane{};
    for (int l = 0; l < W; l++) lane[l] = l;
    for (int64_t j = (i + 1) / W * W; j < stride; j += W) {
        const vi index = lane + (int32_t)j;
        const vf value = select(index > (int32_t)i, load(x + j, W), splat(INFINITY));
        const vi less = value < best;
        best = select(less, value, best);
        at = less ? index : at;
    }
    int64_t found = i + 1;
    float least = INFINITY;
    for (int l = 0; l < W; l++)
        if (best[l] < least || (best[l] == least && best[l] < INFINITY && at[l] < found)) {
            least = best[l];
            found = at[l];
        }
    return found;
}

// Products of all rows of x (M, F), row j times weight[j]: the upper triangle in blocks, and its mirror image.
void products(const float* x, int64_t rows, int64_t width, const float* weight, int64_t stride, float* turned, float* gram) {
    constexpr int64_t TALL = 6, WIDE = 2;
    for (int64_t j0 = 0; j0 < stride; j0 += W)  // in squares, which stay in the cache
        for (int64_t f = 0; f < width; f++)
            for (int64_t j = j0; j < j0 + W; j++) turned[f * stride + j] = j < rows ? x[j * width + f] * weight[j] : 0.0f;
    for (int64_t i0 = 0; i0 < rows; i0 += TALL)
        for (int64_t j0 = i0 / W * W; j0 < stride; j0 += WIDE * W) {
            vf sum[TALL][WIDE] = {};
            const int64_t second = smaller(j0 + W, stride - W);  // the last block may have one vector only
            const float* row[TALL];
            for (int64_t i = 0; i < TALL; i++) row[i] = x + smaller(i0 + i, rows - 1) * width;
            for (int64_t f = 0; f < width; f++) {
                const vf a = load(turned + f * stride + j0, W), b = load(turned + f * stride + second, W);
#pragma GCC unroll 6
                for (int64_t i = 0; i < TALL; i++) {
                    sum[i][0] += a * row[i][f];
                    sum[i][1] += b * row[i][f];
                }
            }
            for (int64_t i = i0; i < smaller(i0 + TALL, rows); i++) {
                store(gram + i * stride + j0, sum[i - i0][0] * weight[i], W);
                store(gram + i * stride + second, sum[i - i0][1] * weight[i], W);
            }
        }
    for (int64_t j0 = 0; j0 < rows; j0 += W)
        for (int64_t i = j0 + 1; i < rows; i++)
            for (int64_t j = j0; j < smaller(i, j0 + W); j++) gram[i * stride + j] = gram[j * stride + i];
}

// One image; `scratch` holds (M + P + 5 + F) * stride floats.
void agglomerate_one(const ClusterArgs& p, int64_t b, int64_t stride, float* scratch, int64_t* partner, int64_t* root) {
    const int64_t rows = p.rows, axes = p.axes, left = rows - p.r;
    float *gram = scratch, *place = gram + rows * stride, *inverse = place + axes * stride, *weight = inverse + stride;
    float *gone = weight + stride, *price = gone + stride, *costs = price + stride, *turned = costs + stride;
    for (int64_t j = 0; j < stride; j++) {
        const bool real = j < rows;
        weight[j] = real ? ((const float*)p.weight)[b * rows + j] : 1.0f;
        gone[j] = real ? 0.0f : INFINITY;
        price[j] = INFINITY;
        for (int64_t a = 0; a < axes; a++)
            place[a * stride + j] = real ? ((const float*)p.coordinates)[(b * rows + j) * axes + a] : 0.0f;
    }
    products((const float*)p.x + b * rows * p.width, rows, p.width, weight, stride, turned, gram);
    for (int64_t j = 0; j < stride; j++) inverse[j] = j < rows ? inverse_length(gram[j * stride + j]) : 0.0f;
    const Clusters clusters{axes, (float)p.exponent, gram, inverse, weight, gone, place, stride};
    auto look = [&](int64_t i) {
        clusters.costs(i, costs);
        partner[i] = smallest_behind(costs, i, stride);
        price[i] = partner[i] < rows ? costs[partner[i]] : INFINITY;
    };
    for (int64_t i = 0; i < rows; i++) root[i] = i;
    for (int64_t i = 0; p.r && i + 1 < rows; i++) look(i);
    for (int64_t step = 0; step < p.r; step++) {
        int64_t first = smallest_behind(price, -1, stride), second = partner[first];
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
        for (int64_t j = 0; j < rows; j++) gram[kept * stride + j] += gram[lost * stride + j];
        for (int64_t j = 0; j < rows; j++) gram[j * stride + kept] += gram[j * stride + lost];
        inverse[kept] = inverse_length(gram[kept * stride + kept]);
        gone[lost] = price[lost] = INFINITY;
        root[lost] = kept;  // roots are followed at the end
        for (int64_t i = 0; i + 1 < rows; i++)
            if (gone[i] == 0.0f && i != kept && (partner[i] == kept || partner[i] == lost)) look(i);
        look(kept);  // last, for the costs are used again
        for (int64_t i = 0; i < kept; i++)
            if (gone[i] == 0.0f && (costs[i] < price[i] || (costs[i] == price[i] && kept < partner[i]))) {
                partner[i] = kept;
                price[i] = costs[i];
            }
    }
    int64_t *keep = (int64_t*)p.keep + b * left, *dest = (int64_t*)p.dest + b * rows, found = 0;
    for (int64_t i = 0; i < rows; i++)
        if (root[i] == i && found < left) {
            keep[found] = i;
            dest[i] = found++;
        }
    for (int64_t i = 0; i < rows; i++) {
        int64_t top = i;
        while (root[top] != top) top = root[top];
        dest[i] = dest[top];
    }
}

int agglomerate(const ClusterArgs& p) {
    const int64_t stride = (p.rows + W - 1) / W * W;
    int failed = 0;
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1)
    {
        Scratch scratch((p.rows + p.axes + 5 + p.width) * stride / W);
        int64_t* partner = (int64_t*)malloc(sizeof(int64_t) * (size_t)(2 * p.rows));
        if (!scratch || !partner) {
#pragma omp atomic write
            failed = 1;
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t b = 0; b < p.batch; b++)
                agglomerate_one(p, b, stride, (float*)scratch.data, partner, partner + p.rows);
        }
        free(partner);
    }
    return failed;
}

}  // namespace
