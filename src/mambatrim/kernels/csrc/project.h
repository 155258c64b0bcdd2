// Narrow projections: rows of E inputs times a few dozen rows of weights, in S directions at once (x_proj of a block).
//
// Both operands lie along E, so that nothing is packed: six rows times four outputs share their loads, and each sum is
// taken over its lanes at the end. Matrix libraries reorder the weight first, which here costs as much as the product.
#pragma once
#include "abi.h"
#include "vec.h"

namespace {

constexpr int TALL = 6, WIDE = 4;
constexpr int64_t ROWS = 8 * TALL;  // of a task; its inputs stay in the cache

INLINE void project_tile(const float* const* x, const float* const* w, int64_t inputs, vf (*acc)[WIDE]) {
    for (int i = 0; i < TALL; i++)
        for (int o = 0; o < WIDE; o++) acc[i][o] = vf{};
    auto step = [&](int64_t k, int m) {
        vf weight[WIDE];
#pragma GCC unroll 4
        for (int o = 0; o < WIDE; o++) weight[o] = load(w[o] + k, m);
#pragma GCC unroll 6
        for (int i = 0; i < TALL; i++) {
            const vf row = load(x[i] + k, m);
#pragma GCC unroll 4
            for (int o = 0; o < WIDE; o++) acc[i][o] += row * weight[o];
        }
    };
    int64_t k = 0;
    for (; k + W <= inputs; k += W) step(k, W);
    if (k < inputs) step(k, (int)(inputs - k));
}

int project(const ProjectArgs& p) {
    const int64_t tasks = (p.rows + ROWS - 1) / ROWS;
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads((int)p.threads) if (p.threads > 1)
    for (int64_t s = 0; s < p.directions; s++)
        for (int64_t task = 0; task < tasks; task++) {
            const float *x = (const float*)p.x + s * p.rows * p.inputs, *weight = (const float*)p.weight[s];
            float* y = (float*)p.y + s * p.rows * p.outputs;
            const int64_t end = smaller((task + 1) * ROWS, p.rows);
            for (int64_t o0 = 0; o0 < p.outputs; o0 += WIDE)
                for (int64_t t0 = task * ROWS; t0 < end; t0 += TALL) {
                    const float *row[TALL], *w[WIDE];  // past the end the last one again
                    for (int i = 0; i < TALL; i++) row[i] = x + smaller(t0 + i, end - 1) * p.inputs;
                    for (int o = 0; o < WIDE; o++) w[o] = weight + smaller(o0 + o, p.outputs - 1) * p.inputs;
                    vf acc[TALL][WIDE];
                    project_tile(row, w, p.inputs, acc);
                    for (int i = 0; i < TALL && t0 + i < end; i++)
                        for (int o = 0; o < WIDE && o0 + o < p.outputs; o++)
                            y[(t0 + i) * p.outputs + o0 + o] = sum(acc[i][o]);
                }
        }
    return 0;
}

}  // namespace
