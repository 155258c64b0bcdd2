// Vectors of W floats for the instruction set that this unit is compiled for, and the elementary functions on them.
// GCC/Clang vector extensions, so the same source serves x86 and Arm; intrinsics only where the compiler needs help.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // a false alarm inside GCC's own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

namespace {  // every unit keeps its own copies: the same names mean other instructions elsewhere

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
struct bf16 {
    uint16_t bits;
};

INLINE vf splat(float s) { return vf{} + s; }
INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
INLINE vf clamp(vf x, float low, float high) {  // keeps NaN
    x = select(x < splat(low), splat(low), x);
    return select(x > splat(high), splat(high), x);
}
INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// 2^x, relative error below 2e-7; 2^0 = 1 exactly, 2^-inf = 0, NaN stays NaN.
INLINE vf exp2(vf x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    // x = floor(x) + f; the polynomial on [0, 1) has its value 1 at 0; vscalef takes floor(x) itself
    vf f = (vf)_mm512_reduce_ps((__m512)x, 0x01);
    vf p = splat(0.001867130072f);
    p = p * f + 0.009017030317f;
    p = p * f + 0.05579991311f;
    p = p * f + 0.2401644502f;
    p = p * f + 0.6931513118f;
    p = p * f + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    x = clamp(x, -127.0f, 128.0f);
    vf shifted = x + 12582912.0f;  // 1.5 * 2^23: the nearest integer lands in the low mantissa bits
    vf f = x - (shifted - 12582912.0f);
    vf p = splat(0.001326472718f);
    p = p * f + 0.009671512641f;
    p = p * f + 0.05550733743f;
    p = p * f + 0.2402224209f;
    p = p * f + 0.6931469776f;
    p = p * f + 1.0f;
    return p * (vf)(((vi)shifted + 127) << 23);
#endif
}

constexpr float LOG2E = 1.44269504088896341f;
INLINE vf exp(vf x) { return exp2(x * LOG2E); }
INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }  // exactly 0 where e^-x is infinite, as in PyTorch

// log(1 + e^x) = max(x, 0) + 2 atanh(t / (2 + t)) with t = e^-|x|: relatively accurate for very negative x too
INLINE vf softplus(vf x) {
    vf t = exp(-magnitude(x));
    vf s = t / (2.0f + t), q = s * s;
    vf p = splat(0.1214477921f);
    p = p * q + 0.1071537031f;
    p = p * q + 0.1430829838f;
    p = p * q + 0.1999944418f;
    p = p * q + 0.3333333775f;
    p = p * q + 1.0f;
    return select(x > splat(0.0f), x, splat(0.0f)) + 2.0f * s * p;
}

INLINE float square_root(float x) { return __builtin_sqrtf(x); }
INLINE vi lanes() {  // 0, 1, ..., W - 1
    vi lane{};
    for (int l = 0; l < W; l++) lane[l] = l;
    return lane;
}

// Bit l is set where lane l is (all lanes are 0 or -1).
INLINE uint32_t lanes_set(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
    uint32_t bits = 0;
    for (int l = 0; l < W; l++) bits |= (uint32_t)(mask[l] & 1) << l;
    return bits;
#endif
}

INLINE float largest(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    for (int w = W / 2; w; w /= 2)
        for (int i = 0; i < w; i++) x[i] = x[i + w] > x[i] ? x[i + w] : x[i];
    return x[0];
#endif
}
INLINE float sum(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int w = W / 2; w; w /= 2)
        for (int i = 0; i < w; i++) x[i] += x[i + w];
    return x[0];
#endif
}

#if defined(__AVX512F__)
INLINE __mmask16 first_lanes(int m) { return m > 0 ? (__mmask16)((1u << m) - 1) : 0; }
#endif

// Loads and stores of the first m of W lanes, none where m is not positive; the other lanes read as zero. m == W is the
// fast path.
INLINE vf load(const float* p, int m) {
    vf x{};
    if (m == W) memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)
    else x = (vf)_mm512_maskz_loadu_ps(first_lanes(m), p);
#else
    else for (int i = 0; i < m; i++) x[i] = p[i];
#endif
    return x;
}
INLINE void store(float* p, vf x, int m) {
    if (m == W) memcpy(p, &x, sizeof x);
#if defined(__AVX512F__)
    else _mm512_mask_storeu_ps(p, first_lanes(m), (__m512)x);
#else
    else for (int i = 0; i < m; i++) p[i] = x[i];
#endif
}
INLINE vf load(const bf16* p, int m) {
    vh x{};
    if (m == W) memcpy(&x, p, sizeof x);
    else for (int i = 0; i < m; i++) x[i] = p[i].bits;
    return (vf)(__builtin_convertvector(x, vi) << 16);
}
INLINE void store(bf16* p, vf x, int m) {
    vi bits = (vi)x;
    vi rounded = bits + 0x7fff + ((bits >> 16) & 1);  // round to nearest, ties to even
    vi quiet = bits | 0x400000;                       // rounding must not turn a NaN into infinity
    vi chosen = (x == x) ? rounded : quiet;
    vh half = __builtin_convertvector((chosen >> 16) & 0xffff, vh);
    if (m == W) memcpy(p, &half, sizeof half);
    else for (int i = 0; i < m; i++) p[i].bits = half[i];
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
