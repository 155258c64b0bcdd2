// The stem: patches times a weight, special tokens between them, positions added to all (definition: models/layers.py).
#pragma once
#include "abi.h"
#include "memory.h"
#include "product.h"
#include "vec.h"

namespace {

// The pixels of a patch, as a row of the weight has them.
INLINE void patch_pixels(const EmbedArgs& p, int64_t b, int64_t patch, float* out) {
    const int64_t columns = p.width / p.patch_width, rows = p.height / p.patch_height;
    const int64_t x = patch % columns * p.patch_width, y = patch / columns % rows * p.patch_height;
    const int64_t t = patch / columns / rows * p.patch_frames;
    for (int64_t c = 0; c < p.channels; c++)
        for (int64_t f = 0; f < p.patch_frames; f++) {
            const int64_t frame = (b * p.channels + c) * p.frames + t + f;
            const float* from = (const float*)p.images + (frame * p.height + y) * p.width + x;
            for (int64_t row = 0; row < p.patch_height; row++, out += p.patch_width)
                memcpy(out, from + row * p.width, (size_t)p.patch_width * sizeof(float));
        }
}

// `at`: the ascending places of the special tokens.
int embed(const EmbedArgs& p, const int64_t* at) {
    const int64_t pixels = p.channels * p.patch_frames * p.patch_height * p.patch_width, rows = p.batch * p.length;
    static thread_local Kept kept;
    float* inputs = (float*)kept.take((rows * pixels + W - 1) / W);
    if (!inputs) return 1;
    const auto special_before = [&](int64_t place) {
        int64_t k = 0;
        while (k < p.special && at[k] < place) k++;
        return k;
    };
#pragma omp parallel for schedule(static) num_threads((int)p.threads) if (p.threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t place = row % p.length, k = special_before(place);
        if (k < p.special && at[k] == place) memset(inputs + row * pixels, 0, (size_t)pixels * sizeof(float));
        else patch_pixels(p, row / p.length, place - k, inputs + row * pixels);
    }
    ProductArgs made{};
    made.directions = 1, made.rows = rows, made.inputs = pixels, made.outputs = p.columns, made.threads = p.threads;
    made.x = (int64_t)inputs, made.y = p.y, made.base = p.bias, made.weight[0] = p.weight;
    const int failed = product<float, float>(made);
#pragma omp parallel for schedule(static) num_threads((int)p.threads) if (p.threads > 1 && !failed)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t place = row % p.length, k = special_before(place);
        const bool special = k < p.special && at[k] == place;
        float* y = (float*)p.y + row * p.columns;
        const float *own = special ? (const float*)p.special_rows + k * p.columns : y;
        const float* position = (const float*)p.positions + place * p.columns;
        for (int64_t i = 0; i < p.columns; i += W) {
            const int m = (int)smaller(W, p.columns - i);
            store(y + i, load(own + i, m) + load(position + i, m), m);
        }
    }
    kept.drop();
    return failed;
}

}  // namespace
