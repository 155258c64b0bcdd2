// The convolution and the scan over a virtual sequence: T positions, each of which reads one of L rows, so that a row may
// stand for several positions. What comes out of a row's positions is added up with the row's share (1 / their number for
// a mean). A position whose source is no row (>= L) is not there.
//
// Everything that depends on the row alone is made once per row (step sizes) or once per run of equal sources (decays,
// inputs, and the filter's output where its whole window lies in the run).
#pragma once
#include "conv.h"
#include "scan.h"

namespace {

template <typename T, int KS>
int virtual_conv_forward(const ConvArgs& p) {
    const int64_t blocks = (p.channels + W - 1) / W, rows = p.length, width = KS ? KS : p.width;
    int failed = 0;
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1)
    {
        Scratch mean(rows);
        if (!mean) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t block = 0; block < blocks; block++) {
                if (!mean) continue;  // every thread has to meet the loop
                const int m = (int)smaller(W, p.channels - block * W);
                const T* x = (const T*)p.x + b * p.x_batch + block * W;
                const int64_t* source = (const int64_t*)p.source + b * p.steps;
                const float* share = (const float*)p.share + b * rows;
                for (int64_t s = 0; s < p.directions; s++) {
                    const ConvDirection& dir = p.direction[s];
                    vf weight[KS ? KS : MAX_WIDTH], window[KS ? KS : MAX_WIDTH], bias, out{}, row_x{}, total{};
                    conv_parameters(p, s, width, block, m, weight, bias);
                    for (int64_t k = 0; k < width; k++) window[k] = vf{};
                    for (int64_t t = 0; t < rows; t++) mean[t] = vf{};
                    int64_t row = -1, run = 0;
                    for (int64_t j = 0; j < p.steps; j++) {
                        const int64_t now = source[dir.reverse ? p.steps - 1 - j : j];
                        if ((uint64_t)now >= (uint64_t)rows) continue;
                        if (now != row) {
                            if (run) mean[row] += total * share[row];
                            total = vf{};
                            run = 0;
                            row = now;
                            row_x = load(x + row * p.x_token, m);
                        }
                        if (run++ < width) {  // after that the window holds nothing but this row
                            for (int64_t k = 0; k + 1 < width; k++) window[k] = window[k + 1];
                            window[width - 1] = row_x;
                            out = bias;
                            for (int64_t k = 0; k < width; k++) out += weight[k] * window[k];
                            if (p.silu) out *= sigmoid(out);
                        }
                        total += out;
                    }
                    if (run) mean[row] += total * share[row];
                    T* y = (T*)p.y + (s * p.batch + b) * rows * p.channels + block * W;
                    for (int64_t t = 0; t < rows; t++) store(y + t * p.channels, mean[t], m);
                }
            }
    }
    return failed;
}

// One direction of one block of channels. `steps` is scratch for the step sizes of all rows.
template <typename T, int NS>
INLINE void virtual_block(const ScanArgs& p, int64_t s, const Packed& k, int64_t b, int64_t block, vf* sum_y, vf* sum_dt,
                          vf* steps) {
    const ScanDirection& dir = p.direction[s];
    const int64_t rows = p.length, n_states = NS ? NS : p.states;
    const int m = lanes(p.channels, block);
    const T* u = (const T*)dir.u + b * dir.u_batch + block * W;
    const float* bs = (const float*)dir.b + b * dir.b_batch;
    const float* cs = (const float*)dir.c + b * dir.c_batch;
    const float* repeats = p.repeats ? (const float*)p.repeats + b * rows : nullptr;
    const int64_t* source = (const int64_t*)p.source + b * p.steps;
    const float* share = (const float*)p.share + b * rows;
    const vf *a = k.a + block * n_states, d = k.d[block];
    vf live{};
    for (int i = 0; i < m; i++) live[i] = 1.0f;

    for (int64_t t0 = 0; t0 < rows; t0 += TILE) {
        const int n = (int)smaller(TILE, rows - t0);
        raw_steps(p, dir, k, b, block, m, n, [&](int64_t j) { return t0 + j; }, steps + t0);
        for (int64_t t = t0; t < t0 + n; t++) {
            if (p.softplus) steps[t] = softplus(steps[t]);
            if (dir.dt_mean) sum_dt[t] += steps[t] * live;
            if (repeats) steps[t] *= repeats[t];
            // D u of every position is D u of the row
            sum_y[t] = (s == 0 ? vf{} : sum_y[t]) + d * load(u + t * dir.u_token, m);
        }
    }
    constexpr int MANY = NS ? NS : MAX_STATES;
    vf h[MANY], decay[MANY], input[MANY], total{};
    for (int64_t i = 0; i < n_states; i++) h[i] = vf{};
    const float* ct = cs;
    int64_t row = -1;
    for (int64_t j = 0; j < p.steps; j++) {
        const int64_t now = source[dir.reverse ? p.steps - 1 - j : j];
        if ((uint64_t)now >= (uint64_t)rows) continue;
        vf out{}, odd{};
        if (now == row) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < n_states; i++) {
                h[i] = decay[i] * h[i] + input[i];
                if (i & 1) odd += h[i] * ct[i];
                else out += h[i] * ct[i];
            }
            total += out + odd;
            continue;
        }
        if (row >= 0) sum_y[row] += total * share[row];
        row = now;
        ct = cs + row * dir.c_token;
        const float* bt = bs + row * dir.b_token;
        const vf dt = steps[row], dtu = dt * load(u + row * dir.u_token, m);
#pragma GCC unroll 16
        for (int64_t i = 0; i < n_states; i++) {
            decay[i] = exp2(dt * a[i]);
            input[i] = dtu * bt[i];
            h[i] = decay[i] * h[i] + input[i];
            if (i & 1) odd += h[i] * ct[i];
            else out += h[i] * ct[i];
        }
        total = out + odd;
    }
    if (row >= 0) sum_y[row] += total * share[row];
    if (dir.state) {
        float* state = (float*)dir.state + (b * p.channels + block * W) * n_states;
        for (int64_t i = 0; i < n_states; i++)
            for (int e = 0; e < m; e++) state[e * n_states + i] = h[i][e];
    }
    if (s + 1 < p.directions) return;

    const float scale = (float)p.scale;
    const T* z = p.z ? (const T*)p.z + b * p.z_batch + block * W : nullptr;
    T* y = (T*)p.y + b * rows * p.channels + block * W;
    for (int64_t t = 0; t < rows; t++) {
        vf out = sum_y[t] * scale;
        if (z) {
            const vf zt = load(z + t * p.z_token, m);
            out *= zt * sigmoid(zt);
        }
        store(y + t * p.channels, out, m);
    }
}

template <typename T, int NS>
int virtual_scan_forward(const ScanArgs& p) {
    return scan_tasks(p, [&](int64_t s, const Packed& k, int64_t b, int64_t block, vf* sum_y, vf* sum_dt, vf* steps) {
        virtual_block<T, NS>(p, s, k, b, block, sum_y, sum_dt, steps);
    });
}

}  // namespace
