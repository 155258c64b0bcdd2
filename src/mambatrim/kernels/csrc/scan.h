// The selective scan over S directions, forward and backward (definition: kernels/reference.py).
//
// A task is one image and a group of channels; vectors run over channels, states stay in registers, tokens are walked in
// tiles: first the step sizes of a tile (projection, bias, softplus), then the recurrence. Directions of one task follow each
// other, so that their sum, the gate and the average need one pass and no temporary outside the cache. Which channels form a
// task depends on the shape alone, never on the number of threads: results are the same on any number of them.
#pragma once
#include "abi.h"
#include "memory.h"
#include "product.h"
#include "threads.h"
#include "vec.h"

namespace {

constexpr int TILE = 16;       // tokens whose step sizes are made at once
constexpr int PREFETCH = 12;   // tokens ahead
constexpr int MAX_STATES = 256;

// Parameters of one direction, transposed so that a block of W channels reads whole vectors.
struct Packed {
    vf* a;       // (blocks, N): A log2(e)
    vf* weight;  // (blocks, R)
    vf* bias;    // (blocks)
    vf* d;       // (blocks)
};

INLINE int lanes(int64_t channels, int64_t block) { return (int)smaller(W, channels - block * W); }

// Vectors that the parameters of all directions take.
INLINE int64_t packed_size(const ScanArgs& p) { return p.directions * ((p.channels + W - 1) / W) * (p.states + p.rank + 2); }

// Where the parameters of each direction lie in `out`.
void place(const ScanArgs& p, vf* out, Packed* packed) {
    const int64_t blocks = (p.channels + W - 1) / W, n = p.states, r = p.rank;
    for (int64_t s = 0; s < p.directions; s++) {
        vf* a = out + s * blocks * (n + r + 2);
        packed[s] = {a, a + blocks * n, a + blocks * (n + r), a + blocks * (n + r + 1)};
    }
}

// Fills in the parameters of one block, of all directions.
INLINE void pack(const ScanArgs& p, const Packed* packed, int64_t block) {
    const int64_t n = p.states, r = p.rank;
    const int m = lanes(p.channels, block);
    for (int64_t s = 0; s < p.directions; s++) {
        const ScanDirection& dir = p.direction[s];
        vf* a = packed[s].a + block * n;
        pack_panel<float, 1>((const float*)dir.a + block * W * n, n, m, a);
        for (int64_t i = 0; i < n; i++) a[i] = (p.log_a ? -exp(a[i]) : a[i]) * LOG2E;
        if (r) pack_panel<float, 1>((const float*)dir.weight + block * W * r, r, m, packed[s].weight + block * r);
        packed[s].bias[block] = dir.bias ? load((const float*)dir.bias + block * W, m) : vf{};
        packed[s].d[block] = dir.d ? load((const float*)dir.d + block * W, m) : vf{};
    }
}

// Raw step sizes (projection + bias) of n <= TILE tokens of one block. Token j of the walk is row at(j).
template <class At>
INLINE void raw_steps(const ScanArgs& p, const ScanDirection& dir, const Packed& k, int64_t b, int64_t block, int m, int n,
                      At at, vf* out) {
    const float* rows = (const float*)dir.dt + b * dir.dt_batch;
    const vf bias = k.bias[block];
    if (!p.rank) {
        for (int j = 0; j < n; j++) out[j] = load(rows + at(j) * dir.dt_token + block * W, m) + bias;
        return;
    }
    const vf* weight = k.weight + block * p.rank;
    for (int j0 = 0; j0 < n; j0 += 8) {  // eight tokens share each load of the weight
        const float* row[8];
        vf acc[8];
        for (int i = 0; i < 8; i++) {
            row[i] = rows + at(smaller(j0 + i, n - 1)) * dir.dt_token;
            acc[i] = bias;
        }
        for (int64_t r = 0; r < p.rank; r++) {
            const vf w = weight[r];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) acc[i] += w * row[i][r];
        }
        for (int i = 0; i < 8 && j0 + i < n; i++) out[j0 + i] = acc[i];
    }
}

template <typename T, int NS>
INLINE void forward_block(const ScanArgs& p, int64_t s, const Packed& k, int64_t b, int64_t block, vf* sum_y, vf* sum_dt) {
    const ScanDirection& dir = p.direction[s];
    const int64_t length = p.length, n_states = NS ? NS : p.states;
    const int m = lanes(p.channels, block);
    const bool first = s == 0, last = s + 1 == p.directions;
    const T* u = (const T*)dir.u + b * dir.u_batch + block * W;
    const T* z = p.z ? (const T*)p.z + b * p.z_batch + block * W : nullptr;
    T* y = (T*)p.y + b * length * p.channels + block * W;
    const float* bs = (const float*)dir.b + b * dir.b_batch;
    const float* cs = (const float*)dir.c + b * dir.c_batch;
    const float* repeats = p.repeats ? (const float*)p.repeats + b * length : nullptr;
    const vf *a = k.a + block * n_states, d = k.d[block];
    const float scale = (float)p.scale;
    vf live{};  // 1 in the lanes that hold a channel
    for (int i = 0; i < m; i++) live[i] = 1.0f;

    vf h[NS ? NS : MAX_STATES];
    for (int64_t i = 0; i < n_states; i++) h[i] = vf{};
    for (int64_t t0 = 0; t0 < length; t0 += TILE) {
        const int n = (int)smaller(TILE, length - t0);
        auto at = [&](int64_t j) { return dir.reverse ? length - 1 - (t0 + j) : t0 + j; };
        vf dt[TILE];
        raw_steps(p, dir, k, b, block, m, n, at, dt);
        for (int j = 0; j < n; j++) {
            if (p.softplus) dt[j] = softplus(dt[j]);
            if (dir.dt_mean) sum_dt[at(j)] += dt[j] * live;
            if (repeats) dt[j] *= repeats[at(j)];
        }
        for (int j = 0; j < n; j++) {
            const int64_t t = at(j), ahead = dir.reverse ? t - PREFETCH : t + PREFETCH;
            if (ahead >= 0 && ahead < length) {
                __builtin_prefetch(u + ahead * dir.u_token);
                if (last && z) __builtin_prefetch(z + ahead * p.z_token);
            }
            const float *bt = bs + t * dir.b_token, *ct = cs + t * dir.c_token;
            const vf ut = load(u + t * dir.u_token, m), dtu = dt[j] * ut;
            vf out = d * ut, odd{};
#pragma GCC unroll 16
            for (int64_t i = 0; i < n_states; i++) {
                h[i] = exp2(dt[j] * a[i]) * h[i] + dtu * bt[i];
                if (i & 1) odd += h[i] * ct[i];
                else out += h[i] * ct[i];
            }
            out += odd;
            if (!first) out += sum_y[t];
            if (!last) {
                sum_y[t] = out;
                continue;
            }
            out *= scale;
            if (z) {
                const vf zt = load(z + t * p.z_token, m);
                out *= zt * sigmoid(zt);
            }
            store(y + t * p.channels, out, m);
        }
    }
    if (!dir.state) return;
    float* state = (float*)dir.state + (b * p.channels + block * W) * n_states;
    for (int64_t i = 0; i < n_states; i++)
        for (int e = 0; e < m; e++) state[e * n_states + i] = h[i][e];
}

// Calls `run` for every image, block of channels and direction, and averages the step sizes over the channels.
template <class Block>
int scan_tasks(const ScanArgs& p, Block run) {
    const int64_t blocks = (p.channels + W - 1) / W, per_task = W >= 16 ? 2 : 32 / W;
    const int64_t groups = (blocks + per_task - 1) / per_task, tasks = p.batch * groups, length = p.length;
    const bool means = p.direction[0].dt_mean;
    Scratch parameters(p.packed ? 0 : packed_size(p));
    float* partial = (float*)malloc(sizeof(float) * (size_t)(means ? tasks * p.directions * length : 1));
    if (!parameters || !partial) {
        free(partial);
        return 1;
    }
    Packed packed[4];
    place(p, p.packed ? (vf*)p.packed : parameters.data, packed);
    Shares shares(tasks, p.threads);
    int failed = 0;
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1)
    {
        if (!p.packed) {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; block++) pack(p, packed, block);
        }
        Scratch sum_y(length), sum_dt(length), steps(length);
        const bool ready = sum_y && sum_dt && steps;
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
        const auto make = [&](int64_t task) {
            const int64_t b = task / groups, group = task % groups;
            const int64_t end = smaller((group + 1) * per_task, blocks);
            // the directions of a block follow each other; the mean of dt needs one sum per direction over all blocks
            for (int64_t block = group * per_task; block < end; block++)
                for (int64_t s = 0; s < p.directions; s++) {
                    for (int64_t t = 0; t < length && means; t++) sum_dt[t] = vf{};
                    run(s, packed[s], b, block, sum_y, sum_dt, steps);
                    if (!means) continue;
                    float* mean = partial + (task * p.directions + s) * length;
                    const bool fresh = block == group * per_task;
                    for (int64_t t = 0; t < length; t++) mean[t] = (fresh ? 0.0f : mean[t]) + sum(sum_dt[t]);
                }
        };
        if (ready) shares.work(make);
    }
    for (int64_t b = 0; b < p.batch && means && !failed; b++)
        for (int64_t s = 0; s < p.directions; s++) {
            float* out = (float*)p.direction[s].dt_mean + b * p.direction[s].dt_mean_batch;
            for (int64_t t = 0; t < length; t++) {
                float total = 0;
                for (int64_t g = 0; g < groups; g++)
                    total += partial[((b * groups + g) * p.directions + s) * length + t];
                out[t] = total / (float)p.channels;
            }
        }
    free(partial);
    return failed;
}

template <typename T, int NS>
int scan_forward(const ScanArgs& p) {
    return scan_tasks(p, [&](int64_t s, const Packed& k, int64_t b, int64_t block, vf* sum_y, vf* sum_dt, vf*) {
        forward_block<T, NS>(p, s, k, b, block, sum_y, sum_dt);
    });
}

// ---------------------------------------------------------------------------------------------------------------- backward
//
// The states are not kept by the forward pass. One walk stores the state at the start of every tile; then the tiles are
// taken from the last to the first, their states made again, and the gradients carried against the walk. Tiles are outside,
// blocks of channels inside, so that states, decays, dB and dC of a tile stay in the first-level cache.

constexpr int TILE_STATES = 128;  // vectors of states in a tile: its tokens are TILE_STATES / N
constexpr int MAX_TILE = 64;

// What a task keeps, for `blocks` blocks of channels: of one direction, then of the block (all directions), then of a tile.
struct BackwardScratch {
    int64_t tile, tiles;
    Scratch raw, steps, starts, carry;  // (blocks, L), (blocks, L), (tiles, blocks, N), (blocks, N)
    Scratch incoming, sum_y;            // (blocks, L): gradient of the un-gated output, and that output
    Scratch decay, state, grad_b, grad_c;
    BackwardScratch(int64_t length, int64_t states, int64_t blocks)
        : tile(states >= TILE_STATES ? 1 : smaller(MAX_TILE, TILE_STATES / states)), tiles((length + tile - 1) / tile),
          raw(length * blocks), steps(length * blocks), starts(tiles * blocks * states), carry(blocks * states),
          incoming(length * blocks), sum_y(length * blocks), decay(tile * states), state((tile + 1) * states),
          grad_b(tile * states), grad_c(tile * states) {}
    bool failed() const {
        return !raw || !steps || !starts || !carry || !incoming || !sum_y || !decay || !state || !grad_b || !grad_c;
    }
};

// The walk of one block: step sizes of all tokens, and the state at the start of every tile in `starts`, tiles `stride` apart.
template <typename T, int NS>
INLINE void first_walk(const ScanArgs& p, int64_t s, const Packed& k, int64_t b, int64_t block, int64_t tile, vf* raw,
                       vf* steps, vf* starts, int64_t stride) {
    const ScanDirection& dir = p.direction[s];
    const int64_t length = p.length, n_states = NS ? NS : p.states;
    const int m = lanes(p.channels, block);
    const T* u = (const T*)dir.u + b * dir.u_batch + block * W;
    const float* bs = (const float*)dir.b + b * dir.b_batch;
    const float* repeats = p.repeats ? (const float*)p.repeats + b * length : nullptr;
    const vf* a = k.a + block * n_states;
    vf h[NS ? NS : MAX_STATES];
    for (int64_t i = 0; i < n_states; i++) h[i] = vf{};
    for (int64_t t0 = 0; t0 < length; t0 += tile, starts += stride, raw += tile, steps += tile) {
        for (int64_t i = 0; i < n_states; i++) starts[i] = h[i];
        const int n = (int)smaller(tile, length - t0);
        auto at = [&](int64_t j) { return dir.reverse ? length - 1 - (t0 + j) : t0 + j; };
        raw_steps(p, dir, k, b, block, m, n, at, raw);
        for (int j = 0; j < n; j++) {
            steps[j] = p.softplus ? softplus(raw[j]) : raw[j];
            if (repeats) steps[j] *= repeats[at(j)];
        }
        if (t0 + tile >= length) return;
        for (int64_t j = 0; j < tile; j++) {
            const vf dt = steps[j], dtu = dt * load(u + at(j) * dir.u_token, m);
            const float* bt = bs + at(j) * dir.b_token;
#pragma GCC unroll 16
            for (int64_t i = 0; i < n_states; i++) h[i] = exp2(dt * a[i]) * h[i] + dtu * bt[i];
        }
    }
}

// One tile of one block: n tokens from position t0 of the walk on; `at` gives their rows. `steps`, `raw`: of these tokens.
// `carry` (N): gradient that reaches the last state of the tile from the tokens behind it; becomes that of the tile's start.
// `parameters` (N + 2): gradients that sum over images: A, then D, then the bias. `incoming`, `sum_y` (L): of the block.
template <typename T, int NS, class At>
INLINE void backward_tile(const ScanArgs& p, int64_t s, const Packed& k, int64_t b, int64_t block, int n, At at,
                          const vf* raw, const vf* steps, const vf* start, vf* carry, BackwardScratch& w,
                          const vf* incoming, vf* sum_y, vf* parameters) {
    const ScanDirection& dir = p.direction[s];
    const int64_t n_states = NS ? NS : p.states;
    const int m = lanes(p.channels, block);
    const T* u = (const T*)dir.u + b * dir.u_batch + block * W;
    T* grad_u = (T*)dir.grad_u + b * p.length * p.channels + block * W;
    T* grad_dt = (T*)dir.grad_dt + b * p.length * p.channels + block * W;
    const float* bs = (const float*)dir.b + b * dir.b_batch;
    const float* cs = (const float*)dir.c + b * dir.c_batch;
    const float* repeats = p.repeats ? (const float*)p.repeats + b * p.length : nullptr;
    const vf *a = k.a + block * n_states, d = k.d[block];

    vf inputs[MAX_TILE], through_a[MAX_TILE], through_b[MAX_TILE];
    vf h[NS ? NS : MAX_STATES];
    for (int64_t i = 0; i < n_states; i++) w.state[i] = h[i] = start[i];
    for (int j = 0; j < n; j++) {
        const int64_t t = at(j);
        const float *bt = bs + t * dir.b_token, *ct = cs + t * dir.c_token;
        inputs[j] = load(u + t * dir.u_token, m);
        const vf dt = steps[j], dtu = dt * inputs[j];
        vf *after = w.state + (j + 1) * n_states, *decay = w.decay + j * n_states;
        vf out = d * inputs[j], odd{};
#pragma GCC unroll 16
        for (int64_t i = 0; i < n_states; i++) {
            decay[i] = exp2(dt * a[i]);
            after[i] = h[i] = decay[i] * h[i] + dtu * bt[i];
            if (i & 1) odd += h[i] * ct[i];
            else out += h[i] * ct[i];
        }
        sum_y[t] = (s ? sum_y[t] : vf{}) + out + odd;
        through_a[j] = through_b[j] = vf{};
    }
    // a few states at a time, so that their carries and the gradients of A stay in registers
    constexpr int PART = NS == 1 ? 1 : 8;
    for (int64_t i0 = 0; i0 < n_states; i0 += PART) {
        const int part = NS ? PART : (int)smaller(PART, n_states - i0);
        vf c[PART], grad_a[PART];
        for (int i = 0; i < part; i++) {
            c[i] = carry[i0 + i];
            grad_a[i] = parameters[i0 + i];
        }
        for (int j = n - 1; j >= 0; j--) {
            const int64_t t = at(j);
            const float *bt = bs + t * dir.b_token + i0, *ct = cs + t * dir.c_token + i0;
            const vf dt = steps[j], dtu = dt * inputs[j], g = incoming[t];
            const vf *before = w.state + j * n_states + i0, *after = before + n_states;
            const vf* decay = w.decay + j * n_states + i0;
            vf *grad_b = w.grad_b + j * n_states + i0, *grad_c = w.grad_c + j * n_states + i0;
            vf by_a = through_a[j], by_b = through_b[j];
#pragma GCC unroll 8
            for (int i = 0; i < part; i++) {
                const vf lambda = c[i] + g * ct[i];
                grad_c[i] += g * after[i];
                grad_b[i] += lambda * dtu;
                c[i] = lambda * decay[i];
                const vf kept = c[i] * before[i];
                grad_a[i] += kept * dt;
                by_a += kept * a[i0 + i];
                by_b += lambda * bt[i];
            }
            through_a[j] = by_a;  // sum over states of lambda decay h_before A log2(e)
            through_b[j] = by_b;  // sum over states of lambda B
        }
        for (int i = 0; i < part; i++) {
            carry[i0 + i] = c[i];
            parameters[i0 + i] = grad_a[i];
        }
    }
    vf grad_d{}, grad_bias{};
    for (int j = 0; j < n; j++) {
        const int64_t t = at(j);
        const vf g = incoming[t];
        grad_d += g * inputs[j];
        store(grad_u + t * p.channels, d * g + steps[j] * through_b[j], m);
        vf grad_step = through_a[j] * (1.0f / LOG2E) + through_b[j] * inputs[j];
        if (repeats) grad_step *= repeats[t];
        if (p.softplus) grad_step *= sigmoid(raw[j]);
        grad_bias += grad_step;
        store(grad_dt + t * p.channels, grad_step, m);
    }
    parameters[n_states] += grad_d;
    parameters[n_states + 1] += grad_bias;
}

// One direction of one image, for the blocks from block0 to block1; writes dB and dC (L, N) of these channels.
template <typename T, int NS>
void backward_direction(const ScanArgs& p, int64_t s, const Packed& k, int64_t b, int64_t block0, int64_t block1,
                        BackwardScratch& w, vf* parameters, float* out_b, float* out_c) {
    const int64_t length = p.length, n_states = p.states, count = block1 - block0;
    for (int64_t i = 0; i < count; i++)
        first_walk<T, NS>(p, s, k, b, block0 + i, w.tile, w.raw + i * length, w.steps + i * length,
                          w.starts + i * n_states, count * n_states);
    for (int64_t i = 0; i < count * n_states; i++) w.carry[i] = vf{};
    for (int64_t tile = w.tiles - 1; tile >= 0; tile--) {
        const int64_t t0 = tile * w.tile;
        const int n = (int)smaller(w.tile, length - t0);
        auto at = [&](int64_t j) { return p.direction[s].reverse ? length - 1 - (t0 + j) : t0 + j; };
        for (int64_t i = 0; i < n * n_states; i++) w.grad_b[i] = w.grad_c[i] = vf{};
        for (int64_t i = 0; i < count; i++)
            backward_tile<T, NS>(p, s, k, b, block0 + i, n, at, w.raw + i * length + t0, w.steps + i * length + t0,
                                 w.starts + (tile * count + i) * n_states, w.carry + i * n_states, w,
                                 w.incoming + i * length, w.sum_y + i * length, parameters + i * (n_states + 2));
        for (int j = 0; j < n; j++)
            for (int64_t i = 0; i < n_states; i++) {
                out_b[at(j) * n_states + i] = sum(w.grad_b[j * n_states + i]);
                out_c[at(j) * n_states + i] = sum(w.grad_c[j * n_states + i]);
            }
    }
}

// The gradient of the un-gated output: dy scale silu(z), the same for all directions.
template <typename T>
INLINE void before_gate(const ScanArgs& p, int64_t b, int64_t block, vf* incoming) {
    const int m = lanes(p.channels, block);
    const T* z = p.z ? (const T*)p.z + b * p.z_batch + block * W : nullptr;
    const T* gy = (const T*)p.grad_y + b * p.grad_y_batch + block * W;
    for (int64_t t = 0; t < p.length; t++) {
        vf g = load(gy + t * p.grad_y_token, m) * (float)p.scale;
        if (z) {
            const vf zt = load(z + t * p.z_token, m);
            g *= zt * sigmoid(zt);
        }
        incoming[t] = g;
    }
}

// dz = dy scale (sum over directions of y) silu'(z), after all directions of the block
template <typename T>
INLINE void backward_gate(const ScanArgs& p, int64_t b, int64_t block, const vf* sum_y) {
    const int m = lanes(p.channels, block);
    const T* z = (const T*)p.z + b * p.z_batch + block * W;
    const T* gy = (const T*)p.grad_y + b * p.grad_y_batch + block * W;
    T* grad_z = (T*)p.grad_z + b * p.length * p.channels + block * W;
    for (int64_t t = 0; t < p.length; t++) {
        const vf zt = load(z + t * p.z_token, m), gate = sigmoid(zt);
        const vf g = load(gy + t * p.grad_y_token, m) * (float)p.scale;
        store(grad_z + t * p.channels, g * sum_y[t] * (gate * (1.0f + zt * (1.0f - gate))), m);
    }
}

// Adds `copies` arrays of n floats that lie `stride` floats apart.
INLINE void add_up(float* out, const float* in, int64_t n, int64_t copies, int64_t stride) {
    for (int64_t i = 0; i < n; i++) {
        float total = 0;
        for (int64_t c = 0; c < copies; c++) total += in[c * stride + i];
        out[i] = total;
    }
}

template <typename T, int NS>
int scan_backward(const ScanArgs& p) {
    const int64_t blocks = (p.channels + W - 1) / W, length = p.length, n_states = p.states, dirs = p.directions;
    // up to 16 tasks of images, and of channels where the images are few: a matter of shape, not of threads. Few groups of
    // channels, because each sums its dB and dC over lanes
    const int64_t chunks = smaller(p.batch, 16), groups = chunks < 8 ? smaller(blocks, 8 / chunks) : 1;
    const int64_t per_chunk = dirs * blocks * (n_states + 2), rows = length * n_states, all_rows = p.batch * rows;
    Scratch packed_memory(dirs * blocks * (n_states + p.rank + 2)), parameters(chunks * per_chunk);
    Scratch rows_memory(groups * dirs * 2 * all_rows / W + 1);  // dB and dC of every group of channels
    if (!packed_memory || !parameters || !rows_memory) return 1;
    float* partial = (float*)rows_memory.data;
    Packed packed[4];
    place(p, packed_memory, packed);
    for (int64_t i = 0; i < chunks * per_chunk; i++) parameters[i] = vf{};
    int failed = 0;
#pragma omp parallel num_threads((int)p.threads) if (p.threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) pack(p, packed, block);
        BackwardScratch w(length, n_states, (blocks + groups - 1) / groups);
        const bool ready = !w.failed();
        if (!ready) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < chunks * groups; task++) {
            if (!ready) continue;  // every thread has to meet the loop
            const int64_t chunk = task / groups, group = task % groups;
            const int64_t block0 = group * blocks / groups, block1 = (group + 1) * blocks / groups;
            for (int64_t b = chunk * p.batch / chunks; b < (chunk + 1) * p.batch / chunks; b++) {
                for (int64_t block = block0; block < block1; block++)
                    before_gate<T>(p, b, block, w.incoming + (block - block0) * length);
                for (int64_t s = 0; s < dirs; s++) {
                    float* out_b = partial + (group * dirs + s) * 2 * all_rows + b * rows;
                    vf* own = parameters + chunk * per_chunk + (s * blocks + block0) * (n_states + 2);
                    backward_direction<T, NS>(p, s, packed[s], b, block0, block1, w, own, out_b, out_b + all_rows);
                }
                if (p.z)
                    for (int64_t block = block0; block < block1; block++)
                        backward_gate<T>(p, b, block, w.sum_y + (block - block0) * length);
            }
        }
    }
    if (failed) return 1;
    for (int64_t s = 0; s < dirs; s++) {
        const ScanDirection& dir = p.direction[s];
        const int64_t stride = dirs * 2 * all_rows;
        add_up((float*)dir.grad_b, partial + s * 2 * all_rows, all_rows, groups, stride);
        add_up((float*)dir.grad_c, partial + (s * 2 + 1) * all_rows, all_rows, groups, stride);
        for (int64_t block = 0; block < blocks; block++) {
            const vf* first = parameters + (s * blocks + block) * (n_states + 2);
            for (int64_t i = 0; i < n_states + 2; i++) {
                vf total{};
                for (int64_t c = 0; c < chunks; c++) total += first[c * per_chunk + i];
                for (int e = 0; e < lanes(p.channels, block); e++) {
                    const int64_t channel = block * W + e;
                    if (i < n_states) ((float*)dir.grad_a)[channel * n_states + i] = total[e];
                    else ((float*)(i == n_states ? dir.grad_d : dir.grad_bias))[channel] = total[e];
                }
            }
        }
    }
    return 0;
}

}  // namespace
