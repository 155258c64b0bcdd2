// A Mamba mixer with the norm before it and the residual around it, x + out_proj(scans(conv(in_proj(norm(x))))), as one
// call: the kernels of the other files, one after the other, a few images at a time, so that what one makes is still in
// the cache when the next one reads it.
#pragma once
#include "abi.h"
#include "conv.h"
#include "norm.h"
#include "product.h"
#include "scan.h"
#include "virtual.h"

namespace {

constexpr int64_t CACHE = 2 << 20;  // bytes of cache for each thread, about

template <typename T>
INLINE const float* widened(const T* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += W) store(out + i, load(x + i, (int)smaller(W, n - i)), (int)smaller(W, n - i));
    return out;
}
INLINE const float* widened(const float* x, int64_t, float*) { return x; }

// Where a packed mixer has its parameters, in vectors: in the order in which they are read, each part as its kernel wants it.
template <typename T>
struct Places {
    static constexpr int64_t LINE = 64 / sizeof(vf);
    int64_t norm = 0, in, conv, narrow, scan, out, size;
    explicit Places(const MixerArgs& p) {
        const int64_t blocks = (p.channels + W - 1) / W, s = p.directions;
        in = (p.columns + W - 1) / W;
        conv = in + 2 * all(p.columns, p.channels);
        narrow = conv + s * blocks * (p.taps + 1);
        scan = narrow + s * all(p.channels, p.rank + 2 * p.states);
        out = scan + s * blocks * (p.states + p.rank + 2);
        size = (out + all(p.channels, p.columns) + LINE - 1) / LINE * LINE;
    }
    static int64_t all(int64_t inputs, int64_t outputs) {
        const Panels<T> panels(inputs, outputs);
        return panels.count * panels.size;
    }
};

// The records of the steps. What depends on the images at hand is filled in by `run`.
template <typename T>
struct Mixer {
    const MixerArgs& p;
    const int64_t images, proj;  // images at a time; outputs of x_proj
    NormArgs norm{};
    ProductArgs in{}, narrow{}, out{};
    ConvArgs conv{};
    ScanArgs scan{};
    vf* space;
    T *normed, *hidden, *u, *y;
    float *projected, *dt_weight;

    static int64_t at_a_time(const MixerArgs& p) {
        const int64_t bytes = (2 + p.directions) * p.length * p.channels * (int64_t)sizeof(T);
        // where the weights are larger than the cache, each reading of them has to serve as many images
        const int64_t weights = 3 * p.columns * p.channels * (int64_t)sizeof(T), own = CACHE * p.threads;
        const int64_t fit = (own > weights ? own : weights) / (bytes ? bytes : 1);
        return smaller(p.batch, fit > 1 ? fit : 1);
    }
    static int64_t vectors(int64_t n, int64_t size) { return (n * size + (int64_t)sizeof(vf) - 1) / (int64_t)sizeof(vf); }

    static Kept& kept() {
        static thread_local Kept kept;
        return kept;
    }
    ~Mixer() { kept().drop(); }

    explicit Mixer(const MixerArgs& p) : p(p), images(at_a_time(p)), proj(p.rank + 2 * p.states) {
        const int64_t widest = p.directions * p.channels > p.columns ? p.directions * p.channels : p.columns;
        const int64_t sizes[] = {vectors(2 * images * p.length * p.channels, sizeof(T)),
                                 vectors(images * p.length * widest, sizeof(T)),
                                 vectors(p.directions * images * p.length * proj, sizeof(float)),
                                 vectors(p.directions * p.channels * p.rank, sizeof(float))};
        space = kept().take(sizes[0] + sizes[1] + sizes[2] + sizes[3]);
        if (!space) return;
        hidden = (T*)space;
        u = (T*)(space + sizes[0]);
        projected = (float*)(space + sizes[0] + sizes[1]);
        dt_weight = (float*)(space + sizes[0] + sizes[1] + sizes[2]);
        normed = u;  // read before u is written
        y = hidden;  // written when the convolution has read it
        norm.columns = p.columns, norm.threads = p.threads, norm.weight = p.norm, norm.y = (int64_t)normed, norm.eps = p.eps;
        in.directions = 2, in.inputs = p.columns, in.outputs = p.channels, in.threads = p.threads;  // hidden, then gate
        in.x = (int64_t)normed, in.y = (int64_t)hidden;
        for (int i = 0; i < 2; i++) in.weight[i] = (int64_t)((const T*)p.in_weight + i * p.channels * p.columns);
        narrow.directions = p.directions, narrow.inputs = p.channels, narrow.outputs = proj, narrow.threads = p.threads;
        narrow.x = (int64_t)u, narrow.y = (int64_t)projected;
        out.directions = 1, out.inputs = p.channels, out.outputs = p.columns, out.threads = p.threads;
        out.x = (int64_t)y, out.weight[0] = p.out_weight, out.base_row = p.columns;
        conv.length = p.length, conv.channels = p.channels, conv.width = p.taps, conv.directions = p.directions;
        conv.silu = 1, conv.threads = p.threads, conv.y = (int64_t)u;
        conv.x = (int64_t)hidden, conv.x_batch = p.length * p.channels, conv.x_token = p.channels;
        conv.steps = p.conv_steps;
        scan.length = p.length, scan.channels = p.channels, scan.states = p.states, scan.rank = p.rank;
        scan.directions = p.directions, scan.softplus = 1, scan.threads = p.threads, scan.log_a = 1, scan.scale = p.scale;
        scan.z_batch = p.length * p.channels, scan.z_token = p.channels, scan.y = (int64_t)y, scan.steps = p.scan_steps;
        for (int64_t s = 0; s < p.directions; s++) {
            const MixerDirection& from = p.direction[s];
            conv.direction[s].weight = from.conv_weight, conv.direction[s].bias = from.conv_bias;
            conv.direction[s].reverse = scan.direction[s].reverse = p.reverse[s];
            narrow.weight[s] = from.x_weight;
            ScanDirection& to = scan.direction[s];
            to.a = from.a_log, to.d = from.d, to.bias = from.dt_bias;
            if (!p.packed) to.weight = (int64_t)widened((const T*)from.dt_weight, p.channels * p.rank, dt_weight + s * p.channels * p.rank);
            to.u_batch = p.length * p.channels, to.u_token = p.channels;
            to.dt_batch = to.b_batch = to.c_batch = p.length * proj, to.dt_token = to.b_token = to.c_token = proj;
        }
        if (p.packed) read_at((const vf*)p.packed);
    }

    // All parameters at `at` instead.
    void read_at(const vf* at) {
        const Places<T> places(p);
        norm.weight = (int64_t)(at + places.norm), in.packed = (int64_t)(at + places.in), conv.packed = (int64_t)(at + places.conv);
        narrow.packed = (int64_t)(at + places.narrow), scan.packed = (int64_t)(at + places.scan), out.packed = (int64_t)(at + places.out);
    }

    void pack_to(vf* at) {
        const Places<T> places(p);
        memcpy(at + places.norm, (const void*)p.norm, (size_t)p.columns * sizeof(float));
        pack_weights<T>(in, at + places.in);
        pack_conv(conv, at + places.conv);
        pack_weights<T>(narrow, at + places.narrow);
        Packed parameters[4];
        place(scan, at + places.scan, parameters);
        for (int64_t block = 0; block * W < p.channels; block++) pack(scan, parameters, block);
        pack_weights<T>(out, at + places.out);
    }

    template <int KS>
    int convolve() {
        return p.conv_source ? virtual_conv_forward<T, KS>(conv) : conv_forward<T, KS>(conv);
    }

    // Images `first` to `first + count`.
    template <int NS>
    int run(int64_t first, int64_t count) {
        const int64_t rows = count * p.length, from = first * p.length * p.columns;
        norm.rows = in.rows = narrow.rows = out.rows = rows;
        norm.x = out.base = (int64_t)((const float*)p.x + from), out.y = (int64_t)((float*)p.y + from);
        norm_forward<T>(norm);
        int failed = product<T, T>(in);
        if (failed) return failed;
        conv.batch = count;
        conv.source = p.conv_source ? (int64_t)((const int64_t*)p.conv_source + first * p.conv_steps) : 0;
        conv.share = scan.share = p.share ? (int64_t)((const float*)p.share + first * p.length) : 0;
        failed = p.taps == 4 ? convolve<4>() : convolve<0>();
        if (failed) return failed;
        narrow.x_direction = rows * p.channels;
        failed = product<T, float>(narrow);
        if (failed) return failed;
        scan.batch = count, scan.z = (int64_t)(hidden + rows * p.channels);
        scan.repeats = p.repeats ? (int64_t)((const float*)p.repeats + first * p.length) : 0;
        scan.source = p.scan_source ? (int64_t)((const int64_t*)p.scan_source + first * p.scan_steps) : 0;
        for (int64_t s = 0; s < p.directions; s++) {
            ScanDirection& to = scan.direction[s];
            to.u = (int64_t)(u + s * rows * p.channels);
            to.dt = (int64_t)(projected + s * rows * proj);
            to.b = to.dt + 4 * p.rank, to.c = to.b + 4 * p.states;
            if (!p.dt_mean) continue;
            to.dt_mean_batch = p.directions * p.length;
            to.dt_mean = (int64_t)((float*)p.dt_mean + (first * p.directions + s) * p.length);
        }
        failed = p.scan_source ? virtual_scan_forward<T, NS>(scan) : scan_forward<T, NS>(scan);
        return failed ? failed : product<T, float>(out);
    }
};

template <typename T, int NS>
int mixer(const MixerArgs& p) {
    Mixer<T> steps(p);
    if (!steps.space) return 1;
    for (int64_t first = 0; first < p.batch; first += steps.images) {
        const int failed = steps.template run<NS>(first, smaller(steps.images, p.batch - first));
        if (failed) return failed;
    }
    return 0;
}

template <typename T>
int pack_mixer(const MixerArgs& p, vf* at) {
    Mixer<T> steps(p);
    if (!steps.space) return 1;
    steps.pack_to(at);
    return 0;
}

inline int64_t packed_size(const MixerArgs& p) { return p.bfloat16 ? Places<bf16>(p).size : Places<float>(p).size; }

}  // namespace
