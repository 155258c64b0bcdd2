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
    int64_t rows, axes;
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
            vf cost = (1.0f - load(g + j, W) * inverse[i] * load(inverse + j, W)) * ward;
            for (int64_t a = 0; a < axes; a++) cost += magnitude(load(place + a * stride + j, W) - place[a * stride + i]);
            store(out + j, cost + load(gone + j, W), W);
        }
    }
};

INLINE float inverse_length(float square) {
    const float length = std::sqrt(square > 0.0f ? square : 0.0f);
    return length > 1e-12f ? 1.0f / length : 0.0f;
}

INLINE int64_t cheapest_behind(const float* costs, int64_t i, int64_t rows) {
    int64_t best = i + 1;
    for (int64_t j = i + 2; j < rows; j++)
        if (costs[j] < costs[best]) best = j;
    return best;
}

// One image; `scratch` holds (M + P + 6) * stride floats.
void agglomerate_one(const ClusterArgs& p, int64_t b, int64_t stride, float* scratch, int64_t* partner) {
    const int64_t rows = p.rows, axes = p.axes;
    float *gram = scratch, *place = gram + rows * stride, *inverse = place + axes * stride, *weight = inverse + stride;
    float *gone = weight + stride, *price = gone + stride, *costs = price + stride;
    int64_t* root = (int64_t*)p.root + b * rows;
    const float* given = (const float*)p.gram + b * rows * rows;
    for (int64_t j = 0; j < stride; j++) {
        const bool real = j < rows;
        weight[j] = real ? ((const float*)p.weight)[b * rows + j] : 1.0f;
        gone[j] = real ? 0.0f : INFINITY;
        inverse[j] = real ? inverse_length(given[j * rows + j]) : 0.0f;
        for (int64_t a = 0; a < axes; a++)
            place[a * stride + j] = real ? ((const float*)p.coordinates)[(b * rows + j) * axes + a] : 0.0f;
        if (!real) continue;
        root[j] = j;
        for (int64_t i = 0; i < stride; i++) gram[j * stride + i] = i < rows ? given[j * rows + i] : 0.0f;
    }
    const Clusters clusters{rows, axes, (float)p.exponent, gram, inverse, weight, gone, place, stride};
    for (int64_t i = 0; i + 1 < rows; i++) {
        clusters.costs(i, costs);
        partner[i] = cheapest_behind(costs, i, rows);
        price[i] = costs[partner[i]];
    }
    for (int64_t step = 0; step < p.r; step++) {
        int64_t first = 0;
        while (gone[first] != 0.0f) first++;
        for (int64_t i = first + 1; i + 1 < rows; i++)
            if (gone[i] == 0.0f && price[i] < price[first]) first = i;
        const int64_t second = partner[first];
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
        gone[lost] = INFINITY;
        for (int64_t j = 0; j < rows; j++)
            if (root[j] == lost) root[j] = kept;
        for (int64_t i = 0; i + 1 < rows; i++) {
            if (gone[i] != 0.0f || (i != kept && partner[i] != kept && partner[i] != lost)) continue;
            clusters.costs(i, costs);
            partner[i] = cheapest_behind(costs, i, rows);
            price[i] = costs[partner[i]];
        }
        clusters.costs(kept, costs);
        for (int64_t i = 0; i < kept; i++)
            if (gone[i] == 0.0f && (costs[i] < price[i] || (costs[i] == price[i] && kept < partner[i]))) {
                partner[i] = kept;
                price[i] = costs[i];
            }
    }
}

int agglomerate(const ClusterArgs& p) {
    const int64_t stride = (p.rows + W - 1) / W * W;
    int failed = 0;
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1)
    {
        Scratch scratch((p.rows + p.axes + 6) * stride / W);
        int64_t* partner = (int64_t*)malloc(sizeof(int64_t) * (size_t)(p.rows + 1));
        if (!scratch || !partner) {
#pragma omp atomic write
            failed = 1;
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t b = 0; b < p.batch; b++) agglomerate_one(p, b, stride, (float*)scratch.data, partner);
        }
        free(partner);
    }
    return failed;
}

}  // namespace
