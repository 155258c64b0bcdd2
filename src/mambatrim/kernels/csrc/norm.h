// RMSNorm over the last dimension of a fp32 stream: y = x rsqrt(mean(x^2) + eps) weight, forward and backward.
#pragma once
#include "abi.h"
#include "memory.h"
#include "vec.h"

namespace {

float sqrt_of(float x) { return __builtin_sqrtf(x); }

INLINE float inverse_rms(const float* x, int64_t n, double eps) {
    vf total{};
    for (int64_t i = 0; i < n; i += W) {
        const vf v = load(x + i, (int)smaller(W, n - i));
        total += v * v;
    }
    return 1.0f / sqrt_of(sum(total) / (float)n + (float)eps);
}

template <typename T>
int norm_forward(const NormArgs& p) {
    const float* weight = (const float*)p.weight;
#pragma omp parallel for schedule(static) num_threads((int)p.threads) if (p.threads > 1)
    for (int64_t row = 0; row < p.rows; row++) {
        const float* x = (const float*)p.x + row * p.columns;
        T* y = (T*)p.y + row * p.columns;
        const float r = inverse_rms(x, p.columns, p.eps);
        for (int64_t i = 0; i < p.columns; i += W) {
            const int m = (int)smaller(W, p.columns - i);
            store(y + i, load(x + i, m) * r * load(weight + i, m), m);
        }
    }
    return 0;
}

// dx = r (w dy - x r^2 mean(w dy x)), dw = sum over rows of dy x r
template <typename T>
int norm_backward(const NormArgs& p) {
    const float* weight = (const float*)p.weight;
    const int64_t chunks = smaller(p.rows, 16), blocks = (p.columns + W - 1) / W;
    Scratch partial(chunks * blocks);
    if (!partial) return 1;
    for (int64_t i = 0; i < chunks * blocks; i++) partial[i] = vf{};
#pragma omp parallel for schedule(static) num_threads((int)p.threads) if (p.threads > 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t row = chunk * p.rows / chunks; row < (chunk + 1) * p.rows / chunks; row++) {
            const float* x = (const float*)p.x + row * p.columns;
            const T* gy = (const T*)p.grad_y + row * p.columns;
            float* gx = (float*)p.grad_x + row * p.columns;
            const float r = inverse_rms(x, p.columns, p.eps);
            vf along{};
            for (int64_t i = 0; i < p.columns; i += W) {
                const int m = (int)smaller(W, p.columns - i);
                along += load(x + i, m) * load(weight + i, m) * load(gy + i, m);
            }
            const float mean = sum(along) / (float)p.columns * r * r;
            for (int64_t i = 0; i < p.columns; i += W) {
                const int m = (int)smaller(W, p.columns - i);
                const vf xv = load(x + i, m), g = load(gy + i, m);
                store(gx + i, r * (load(weight + i, m) * g - xv * mean), m);
                partial[chunk * blocks + i / W] += g * xv * r;
            }
        }
    for (int64_t block = 0; block < blocks; block++) {
        vf total{};
        for (int64_t c = 0; c < chunks; c++) total += partial[c * blocks + block];
        store((float*)p.grad_weight + block * W, total, (int)smaller(W, p.columns - block * W));
    }
    return 0;
}

}  // namespace
