// The stem: patches times a weight, special tokens between them, positions added to all (definition: models/layers.py).
#pragma once
#include "abi.h"
#include "memory.h"
#include "product.h"
#include "vec.h"

namespace {

INLINE void copy(float* to, const float* from, int64_t n) { memcpy(to, from, (size_t)n * sizeof(float)); }
INLINE void copy(bf16* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(to + i, load(from + i, (int)smaller(W, n - i)), (int)smaller(W, n - i));
}

// The pixels of a patch, as a row of the weight has them.
template <typename T>
INLINE void patch_pixels(const EmbedArgs& p, int64_t b, int64_t patch, T* out) {
    const int64_t columns = p.width / p.patch_width, rows = p.height / p.patch_height;
    const int64_t x = patch % columns * p.patch_width, y = patch / columns % rows * p.patch_height;
    const int64_t t = patch / columns / rows * p.patch_frames;
    for (int64_t c = 0; c < p.channels; c++)
        for (int64_t f = 0; f < p.patch_frames; f++) {
            const int64_t frame = (b * p.channels + c) * p.frames + t + f;
            const float* from = (const float*)p.images + (frame * p.height + y) * p.width + x;
            for (int64_t row = 0; row < p.patch_height; row++, out += p.patch_width)
                copy(out, from + row * p.width, p.patch_width);
        }
}

// `at`: the ascending places of the special tokens.
template <typename T>
int embed(const EmbedArgs& p, const int64_t* at) {
    const int64_t pixels = p.channels * p.patch_frames * p.patch_height * p.patch_width, rows = p.batch * p.length;
    static thread_local Kept kept;
    const int64_t columns = (p.columns + W - 1) / W * W;
    float* bias = (float*)kept.take((columns * (int64_t)sizeof(float) + rows * pixels * (int64_t)sizeof(T)) / (int64_t)sizeof(vf) + 1);
    if (!bias) return 1;
    T* inputs = (T*)(bias + columns);
    for (int64_t i = 0; i < p.columns; i += W) {
        const int m = (int)smaller(W, p.columns - i);
        store(bias + i, load((const T*)p.bias + i, m), m);
    }
    const auto special_before = [&](int64_t place) {
        int64_t k = 0;
        while (k < p.special && at[k] < place) k++;
        return k;
    };
#pragma omp parallel for schedule(static) num_threads((int)p.threads) if (p.threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t place = row % p.length, k = special_before(place);
        if (k < p.special && at[k] == place) memset((void*)(inputs + row * pixels), 0, (size_t)pixels * sizeof(T));
        else patch_pixels(p, row / p.length, place - k, inputs + row * pixels);
    }
    ProductArgs made{};
    made.directions = 1, made.rows = rows, made.inputs = pixels, made.outputs = p.columns, made.threads = p.threads;
    made.x = (int64_t)inputs, made.y = p.y, made.base = (int64_t)bias, made.weight[0] = p.weight;
    const int failed = product<T, float>(made);
#pragma omp parallel for schedule(static) num_threads((int)p.threads) if (p.threads > 1 && !failed)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t place = row % p.length, k = special_before(place);
        const bool special = k < p.special && at[k] == place;
        float* y = (float*)p.y + row * p.columns;
        const T* own = (const T*)p.special_rows + k * p.columns;
        const T* position = (const T*)p.positions + place * p.columns;
        for (int64_t i = 0; i < p.columns; i += W) {
            const int m = (int)smaller(W, p.columns - i);
            store(y + i, (special ? load(own + i, m) : load(y + i, m)) + load(position + i, m), m);
        }
    }
    kept.drop();
    return failed;
}

}  // namespace
