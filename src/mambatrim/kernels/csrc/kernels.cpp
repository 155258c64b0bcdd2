// Compiled once per instruction set: -DMAMBATRIM_ISA=generic, avx2, avx512 or avx512_bf16 names the exported functions.
#include "cluster.h"
#include "conv.h"
#include "embed.h"
#include "merge.h"
#include "mixer.h"
#include "nearest.h"
#include "norm.h"
#include "product.h"
#include "scan.h"
#include "step.h"
#include "virtual.h"

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define EXPORT(name) extern "C" __attribute__((visibility("hidden"))) int JOIN(name, MAMBATRIM_ISA)

// The usual state sizes get registers instead of an array; the rest share one loop.
#define BY_STATES(function, T)                          \
    switch (p->states) {                                \
        case 1: return function<T, 1>(*p);              \
        case 8: return function<T, 8>(*p);              \
        case 16: return function<T, 16>(*p);            \
        default: return function<T, 0>(*p);             \
    }
#define BY_WIDTH(function, T)                           \
    switch (p->width) {                                 \
        case 4: return function<T, 4>(*p);              \
        default: return function<T, 0>(*p);             \
    }

EXPORT(scan_forward)(const ScanArgs* p) {
    if (p->bfloat16) BY_STATES(scan_forward, bf16)
    BY_STATES(scan_forward, float)
}
EXPORT(scan_backward)(const ScanArgs* p) {
    if (p->bfloat16) BY_STATES(scan_backward, bf16)
    BY_STATES(scan_backward, float)
}
EXPORT(virtual_scan_forward)(const ScanArgs* p) {
    if (p->bfloat16) BY_STATES(virtual_scan_forward, bf16)
    BY_STATES(virtual_scan_forward, float)
}
EXPORT(conv_forward)(const ConvArgs* p) {
    if (p->bfloat16) BY_WIDTH(conv_forward, bf16)
    BY_WIDTH(conv_forward, float)
}
EXPORT(conv_backward)(const ConvArgs* p) {
    if (p->bfloat16) BY_WIDTH(conv_backward, bf16)
    BY_WIDTH(conv_backward, float)
}
EXPORT(virtual_conv_forward)(const ConvArgs* p) {
    if (p->bfloat16) BY_WIDTH(virtual_conv_forward, bf16)
    BY_WIDTH(virtual_conv_forward, float)
}
EXPORT(norm_forward)(const NormArgs* p) {
    return p->bfloat16_out ? norm_forward<bf16>(*p) : norm_forward<float>(*p);
}
EXPORT(norm_backward)(const NormArgs* p) {
    return p->bfloat16_out ? norm_backward<bf16>(*p) : norm_backward<float>(*p);
}
EXPORT(product)(const ProductArgs* p) {
    return p->bfloat16 ? product<bf16, float>(*p) : product<float, float>(*p);
}
EXPORT(embed)(const EmbedArgs* p) {
    const int64_t* at = (const int64_t*)(p + 1);
    return p->bfloat16 ? embed<bf16>(*p, at) : embed<float>(*p, at);
}
static int one_mixer(const MixerArgs* p) {
    if (p->bfloat16) BY_STATES(mixer, bf16)
    BY_STATES(mixer, float)
}
EXPORT(mixers)(const MixersArgs* p) {
    int failed = 0;
    const MixerArgs* mixers = (const MixerArgs*)(p + 1);
    if (!p->packed) {
        for (int64_t i = 0; i < p->count && !failed; i++) failed = one_mixer(mixers + i);
        return failed;
    }
    MixerArgs one = *mixers;
    for (int64_t i = 0; i < p->count && !failed; i++) {
        one.packed = (int64_t)((vf*)p->packed + i * packed_size(one));
        one.y = (p->count - 1 - i) % 2 ? p->spare : mixers->y;  // by turns, so that the last one writes y
        one.dt_mean = i == p->count - 1 ? mixers->dt_mean : 0;
        failed = one_mixer(&one);
        one.x = one.y;
    }
    return failed;
}
EXPORT(packed_size)(const MixersArgs* p) {  // in 64 bytes, of one mixer
    return (int)(packed_size(*(const MixerArgs*)(p + 1)) * (int64_t)sizeof(vf) / 64);
}
EXPORT(pack_mixers)(const MixersArgs* p) {
    int failed = 0;
    const MixerArgs* mixers = (const MixerArgs*)(p + 1);
    vf* at = (vf*)p->packed;
    for (int64_t i = 0; i < p->count && !failed; at += packed_size(mixers[i++]))
        failed = mixers[i].bfloat16 ? pack_mixer<bf16>(mixers[i], at) : pack_mixer<float>(mixers[i], at);
    return failed;
}
EXPORT(agglomerate)(const ClusterArgs* p) { return agglomerate(*p); }
EXPORT(take_rows)(const RowsArgs* p) { return take_rows(*p); }
EXPORT(inverse)(const InverseArgs* p) { return inverse(*p); }
EXPORT(nearest)(const NearestArgs* p) { return nearest(*p); }
EXPORT(links)(const LinksArgs* p) { return links(*p); }
EXPORT(lift)(const LiftArgs* p) { return lift(*p); }
EXPORT(merge)(const MergeArgs* p) { return merge(*p); }
EXPORT(ranked_step)(const RankedArgs* p) { return ranked_step(*p); }
EXPORT(clustered_step)(const ClusteredArgs* p) { return clustered_step(*p); }
