// Depthwise causal convolution (+ SiLU) in S directions at once, forward and backward.
// In a reversed direction a token sees itself and the K - 1 tokens behind it, without any flip.
#pragma once
#include "abi.h"
#include "memory.h"
#include "vec.h"

namespace {

constexpr int MAX_WIDTH = 8;

INLINE void conv_parameters(const ConvDirection& dir, int64_t width, int64_t block, int m, vf* weight, vf& bias) {
    const float* rows = (const float*)dir.weight + block * W * width;
    for (int64_t k = 0; k < width; k++) {
        weight[k] = vf{};
        for (int i = 0; i < m; i++) weight[k][i] = rows[i * width + k];
    }
    bias = dir.bias ? load((const float*)dir.bias + block * W, m) : vf{};
}

// What `pack_conv` leaves, or the parameters as they are.
INLINE void conv_parameters(const ConvArgs& p, int64_t s, int64_t width, int64_t block, int m, vf* weight, vf& bias) {
    if (!p.packed) return conv_parameters(p.direction[s], width, block, m, weight, bias);
    const vf* packed = (const vf*)p.packed + (block * p.directions + s) * (width + 1);
    for (int64_t k = 0; k < width; k++) weight[k] = packed[k];
    bias = packed[width];
}

// K + 1 vectors for each direction of each block of channels.
inline void pack_conv(const ConvArgs& p, vf* packed) {
    for (int64_t block = 0; block * W < p.channels; block++)
        for (int64_t s = 0; s < p.directions; s++, packed += p.width + 1) {
            const int m = (int)smaller(W, p.channels - block * W);
            conv_parameters(p.direction[s], p.width, block, m, packed, packed[p.width]);
        }
}

template <typename T, int KS>
int conv_forward(const ConvArgs& p) {
    const int64_t blocks = (p.channels + W - 1) / W, length = p.length, width = KS ? KS : p.width;
#pragma omp parallel for collapse(2) schedule(static) num_threads((int)p.threads) if (p.threads > 1)
    for (int64_t b = 0; b < p.batch; b++)
        for (int64_t block = 0; block < blocks; block++) {
            const int m = (int)smaller(W, p.channels - block * W);
            const T* x = (const T*)p.x + b * p.x_batch + block * W;
            for (int64_t s = 0; s < p.directions; s++) {
                const ConvDirection& dir = p.direction[s];
                vf weight[KS ? KS : MAX_WIDTH], window[KS ? KS : MAX_WIDTH], bias;
                conv_parameters(p, s, width, block, m, weight, bias);
                T* y = (T*)p.y + (s * p.batch + b) * length * p.channels + block * W;
                for (int64_t k = 0; k < width; k++) window[k] = vf{};
                for (int64_t j = 0; j < length; j++) {
                    const int64_t t = dir.reverse ? length - 1 - j : j;
                    for (int64_t k = 0; k + 1 < width; k++) window[k] = window[k + 1];
                    window[width - 1] = load(x + t * p.x_token, m);
                    vf out = bias;
                    for (int64_t k = 0; k < width; k++) out += weight[k] * window[k];
                    if (p.silu) out *= sigmoid(out);
                    store(y + t * p.channels, out, m);
                }
            }
        }
    return 0;
}

template <typename T, int KS>
int conv_backward(const ConvArgs& p) {
    const int64_t blocks = (p.channels + W - 1) / W, length = p.length, width = KS ? KS : p.width;
    const int64_t chunks = smaller(p.batch, 16), per_chunk = p.directions * blocks * (width + 1);
    Scratch parameters(chunks * per_chunk);
    if (!parameters) return 1;
    for (int64_t i = 0; i < chunks * per_chunk; i++) parameters[i] = vf{};
    int failed = 0;
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1)
    {
        Scratch grad(length), grad_x(length);  // of the sum before SiLU, by position in the walk; of x, by token
        const bool ready = grad && grad_x;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < chunks * blocks; task++) {
            if (!ready) continue;  // every thread meets every loop
            const int64_t chunk = task / blocks, block = task % blocks;
            const int m = (int)smaller(W, p.channels - block * W);
            for (int64_t b = chunk * p.batch / chunks; b < (chunk + 1) * p.batch / chunks; b++) {
                const T* x = (const T*)p.x + b * p.x_batch + block * W;
                for (int64_t t = 0; t < length; t++) grad_x[t] = vf{};
                for (int64_t s = 0; s < p.directions; s++) {
                    const ConvDirection& dir = p.direction[s];
                    vf weight[KS ? KS : MAX_WIDTH], window[KS ? KS : MAX_WIDTH], bias;
                    conv_parameters(dir, width, block, m, weight, bias);
                    const T* gy = (const T*)p.grad_y + (s * p.batch + b) * length * p.channels + block * W;
                    vf* own = parameters + chunk * per_chunk + (s * blocks + block) * (width + 1);
                    for (int64_t k = 0; k < width; k++) window[k] = vf{};
                    for (int64_t j = 0; j < length; j++) {
                        const int64_t t = dir.reverse ? length - 1 - j : j;
                        for (int64_t k = 0; k + 1 < width; k++) window[k] = window[k + 1];
                        window[width - 1] = load(x + t * p.x_token, m);
                        vf g = load(gy + t * p.channels, m);
                        if (p.silu) {
                            vf out = bias;
                            for (int64_t k = 0; k < width; k++) out += weight[k] * window[k];
                            const vf gate = sigmoid(out);
                            g *= gate * (1.0f + out * (1.0f - gate));
                        }
                        grad[j] = g;
                        for (int64_t k = 0; k < width; k++) own[k] += g * window[k];
                        own[width] += g;
                    }
                    for (int64_t j = 0; j < length; j++) {
                        vf g{};  // token j is tap width - 1 of its own output, the tap before of the next one, ...
                        for (int64_t k = width - 1; k >= 0 && j + width - 1 - k < length; k--)
                            g += weight[k] * grad[j + width - 1 - k];
                        grad_x[dir.reverse ? length - 1 - j : j] += g;
                    }
                }
                T* out = (T*)p.grad_x + b * length * p.channels + block * W;
                for (int64_t t = 0; t < length; t++) store(out + t * p.channels, grad_x[t], m);
            }
        }
    }
    if (failed) return 1;
    for (int64_t s = 0; s < p.directions; s++)
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t k = 0; k <= width; k++) {
                vf total{};
                for (int64_t c = 0; c < chunks; c++)
                    total += parameters[c * per_chunk + (s * blocks + block) * (width + 1) + k];
                for (int e = 0; e < (int)smaller(W, p.channels - block * W); e++) {
                    const int64_t channel = block * W + e;
                    if (k < width) ((float*)p.direction[s].grad_weight)[channel * width + k] = total[e];
                    else ((float*)p.direction[s].grad_bias)[channel] = total[e];
                }
            }
    return 0;
}

}  // namespace
