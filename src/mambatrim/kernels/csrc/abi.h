// The plain C interface between Python and the kernels: every field is 8 bytes wide, so that Python packs a record with
// struct.pack and no header of Python or torch is needed. Pointers travel as integers; strides count elements.
//
// Letters as in kernels/reference.py: B batch, L tokens, E channels (d_inner), N states, R dt_rank, S directions.
#pragma once
#include <cstdint>

struct ScanDirection {
    int64_t u, u_batch, u_token;     // (B, L, E) input, dtype T
    int64_t dt, dt_batch, dt_token;  // (B, L, R) fp32 if rank > 0, else (B, L, E)
    int64_t b, b_batch, b_token;     // (B, L, N) fp32
    int64_t c, c_batch, c_token;     // (B, L, N) fp32
    int64_t a;                       // (E, N) fp32, contiguous
    int64_t d;                       // (E) fp32 or null
    int64_t weight;                  // (E, R) fp32, contiguous, or null
    int64_t bias;                    // (E) fp32 or null
    int64_t reverse;                 // 1: from the last token to the first
    int64_t dt_mean, dt_mean_batch;  // out (B, L) fp32: mean over E of the step size, before `repeats`; all directions or none
    int64_t state;                   // out (B, E, N) fp32 or null: the state after the last step
    // written by the backward pass only
    int64_t grad_u;     // (B, L, E) T, contiguous
    int64_t grad_dt;    // (B, L, E) T, contiguous: gradient of the raw step size, before bias and softplus
    int64_t grad_b;     // (B, L, N) fp32, contiguous
    int64_t grad_c;     // (B, L, N) fp32, contiguous
    int64_t grad_a;     // (E, N) fp32
    int64_t grad_d;     // (E) fp32
    int64_t grad_bias;  // (E) fp32
};

struct ScanArgs {
    int64_t batch, length, channels, states, rank;
    int64_t directions, softplus, bfloat16, threads;
    int64_t z, z_batch, z_token;     // (B, L, E) T gate or null
    int64_t repeats;                 // (B, L) fp32 factor on the step size, contiguous, or null
    int64_t y;                       // out (B, L, E) T, contiguous
    int64_t grad_y, grad_y_batch, grad_y_token;  // (B, L, E) T
    int64_t grad_z;                  // out (B, L, E) T, contiguous, or null
    int64_t steps, source, share;    // of a virtual sequence: T, (B, T) int64 row of each position, (B, L) fp32
    int64_t log_a;                   // 1: `a` holds log(-A), as checkpoints do
    int64_t packed;                  // parameters as `pack` leaves them, or null; forward only
    double scale;                    // factor on the sum of the directions
    ScanDirection direction[4];
};

struct ConvDirection {
    int64_t weight;     // (E, K) fp32, contiguous
    int64_t bias;       // (E) fp32 or null
    int64_t reverse;
    int64_t grad_weight, grad_bias;  // out, fp32
};

struct ConvArgs {
    int64_t batch, length, channels, width;
    int64_t directions, silu, bfloat16, threads;
    int64_t x, x_batch, x_token;  // (B, L, E) T
    int64_t y;                    // out (S, B, L, E) T, contiguous
    int64_t grad_y;               // (S, B, L, E) T, contiguous
    int64_t grad_x;               // out (B, L, E) T, contiguous
    int64_t steps, source, share;  // of a virtual sequence: T, (B, T) int64 row of each position, (B, L) fp32
    int64_t packed;                // parameters as `pack_conv` leaves them, or null; forward only
    ConvDirection direction[4];
};

struct NormArgs {
    int64_t rows, columns, bfloat16_out, threads;
    int64_t x, weight, y;                      // x (rows, D) fp32, weight (D) fp32, y (rows, D) T; contiguous
    int64_t grad_y, grad_x, grad_weight;       // (rows, D) T, (rows, D) fp32, (D) fp32
    double eps;
};

struct ProductArgs {
    int64_t directions, rows, inputs, outputs, bfloat16, threads;
    int64_t x, x_direction;  // (S, rows, I) T, rows contiguous; elements between directions, 0 where they share x
    int64_t y;               // out (S, rows, O), contiguous
    int64_t base, base_row;  // what is added to it, or null; elements from row to row, 0 for a bias
    int64_t packed;          // the weights as `pack_weights` leaves them, or null
    int64_t weight[4];       // (O, I) T, contiguous
};

// Behind the record follow the ascending places of the special tokens.
struct EmbedArgs {
    int64_t batch, channels, frames, height, width;      // of the images, cut from the first corner on; one frame in a picture
    int64_t patch_frames, patch_height, patch_width;
    int64_t length, columns, special, bfloat16, threads;  // L0, D, n
    int64_t images, weight, bias;                        // (B, C, T, H, W) fp32, (D, C patch) T, (D) T; contiguous
    int64_t special_rows, positions, y;                  // (n, D) T, (L0, D) T, out (B, L0, D) fp32
};

struct MixerDirection {
    int64_t conv_weight, conv_bias;       // (E, K) fp32; (E) fp32 or null
    int64_t x_weight, dt_weight;          // (R + 2 N, E), (E, R) T
    int64_t dt_bias, a_log, d;            // (E) fp32 or null, (E, N) fp32, (E) fp32 or null
};

struct MixerArgs {
    int64_t batch, length, columns, channels, states, rank, taps;  // columns: D (d_model)
    int64_t directions, bfloat16, threads;
    int64_t x, y;                              // (B, L, D) fp32, contiguous
    int64_t dt_mean;                           // out (B, S, L) fp32, or null
    int64_t repeats;                           // (B, L) fp32 or null
    int64_t conv_steps, conv_source;           // of virtual sequences: T, (B, T) int64, or null
    int64_t scan_steps, scan_source, share;    // and (B, L) fp32
    int64_t reverse[4];                        // of each direction
    double eps, scale;
    int64_t norm, in_weight, out_weight;       // (D) fp32, (2 E, D) T, (D, E) T; contiguous
    MixerDirection direction[4];
    int64_t packed;                            // all parameters as `pack_mixer` leaves them, or null
};

// A run of mixers, each of which reads what the one before it wrote. Their MixerArgs follow the record, or one for all of
// them where they are packed, one after the other: with the first x and the last y.
struct MixersArgs {
    int64_t count;
    int64_t packed, spare;  // or null; (B, L, D) fp32, what lies between two mixers
};

struct ClusterArgs {
    int64_t batch, rows, width, axes, r, threads;
    int64_t length, x;            // (B, L, F) fp32, contiguous
    int64_t positions;            // (B, M) int64 of the rows in x, or null: the first ones
    int64_t weight, coordinates;  // (B, M), (B, M, P) fp32; contiguous
    int64_t keep, dest;              // out (B, M - r), (B, M) int64, contiguous
    double exponent;
};

// The step between two blocks (merge.h). Positions are int64; rows of one image lie side by side, and `*_batch` is the
// distance between images where a tensor may be a part of a wider one.
struct RowsArgs {
    int64_t batch, directions, length, count, bytes, threads;  // bytes of a row
    int64_t or_zeros;                                          // 1: position L is a row of zeros
    int64_t x;                                                 // (B, S, L, .), contiguous
    int64_t positions, positions_batch;                        // (B, n)
    int64_t y;                                                 // out (B, S, n, .)
};

struct InverseArgs {
    int64_t count, x, y;  // y = 1 / x, fp32
};

struct NearestArgs {
    int64_t batch, length, columns, sources, targets, threads;
    int64_t x;                     // (B, L, F) fp32, contiguous
    int64_t source, source_batch;  // (B, n)
    int64_t target, target_batch;  // (B, m)
    int64_t nearest, similarity;   // out (B, n) int64, (B, n) fp32
};

struct LinksArgs {
    int64_t batch, length, sources;
    int64_t source, source_batch;  // (B, r)
    int64_t target, target_batch;  // (B, r), or null: the sources are gone
    int64_t keep, dest;            // out (B, L - r), (B, L)
};

struct LiftArgs {
    int64_t batch, length, special, kept, patches;  // L, n, K, M = L - n
    int64_t positions;                              // (B, M): the patches in the full sequence
    int64_t fixed, fixed_batch;                     // (B, n): the special tokens in it
    int64_t plan_keep, plan_dest;                   // (B, K), (B, M)
    int64_t keep, dest;                             // out (B, K + n), (B, L)
};

struct MergeArgs {
    int64_t batch, first, length, kept, columns, threads;   // L0, L, K, D
    int64_t keep, dest;                                     // (B, K), (B, L): the step
    int64_t origin_keep, origin_dest;                       // (B, L), (B, L0): all steps before
    int64_t weight, size, x;                                // (B, L) fp32 twice, (B, L, D) fp32
    int64_t out_size, out_x, out_keep, out_dest;            // (B, K), (B, K, D), (B, K), (B, L0)
};

// A whole step: the r least important patches join the most similar of the `targets` next in rank. Behind the record
// follow the places that the special tokens had in the stem.
struct RankedArgs {
    int64_t batch, first, length, columns, directions, special, r, targets, threads;  // L0, L, D, S
    int64_t score;                                    // (B, S, L) fp32, contiguous; summed over S
    int64_t size, x;                                  // (B, L), (B, L, D) fp32
    int64_t origin_keep, origin_dest;                 // (B, L), (B, L0)
    int64_t out_size, out_x, out_keep, out_dest;      // as of MergeArgs
};

// A whole step: r pairs of patches are joined as by ClusterArgs. Behind the record follow the sides of the grid and the
// places that the special tokens had in the stem.
struct ClusteredArgs {
    int64_t batch, first, length, columns, special, r, sides, threads;  // L0, L, D
    int64_t size, x;                                  // (B, L), (B, L, D) fp32
    int64_t origin_keep, origin_dest;                 // (B, L), (B, L0)
    int64_t out_size, out_x, out_keep, out_dest;      // as of MergeArgs
    double exponent, distance, apart;                 // what a step in the sequence, and along a side, costs; 0: none
};
