// The exported functions: each goes to the best instruction set of the processor that it runs on.
#include "abi.h"
#ifdef MAMBATRIM_HAVE_X86
#include <cpuid.h>
#endif

#define DECLARE(isa)                                   \
    extern "C" int scan_forward_##isa(const ScanArgs*);  \
    extern "C" int scan_backward_##isa(const ScanArgs*); \
    extern "C" int conv_forward_##isa(const ConvArgs*);  \
    extern "C" int conv_backward_##isa(const ConvArgs*); \
    extern "C" int virtual_scan_forward_##isa(const ScanArgs*); \
    extern "C" int virtual_conv_forward_##isa(const ConvArgs*); \
    extern "C" int norm_forward_##isa(const NormArgs*);  \
    extern "C" int norm_backward_##isa(const NormArgs*); \
    extern "C" int product_##isa(const ProductArgs*);    \
    extern "C" int embed_##isa(const EmbedArgs*);        \
    extern "C" int mixers_##isa(const MixersArgs*);      \
    extern "C" int packed_size_##isa(const MixersArgs*); \
    extern "C" int pack_mixers_##isa(const MixersArgs*); \
    extern "C" int take_rows_##isa(const RowsArgs*);     \
    extern "C" int inverse_##isa(const InverseArgs*);    \
    extern "C" int nearest_##isa(const NearestArgs*);    \
    extern "C" int links_##isa(const LinksArgs*);        \
    extern "C" int lift_##isa(const LiftArgs*);          \
    extern "C" int merge_##isa(const MergeArgs*); \
    extern "C" int ranked_step_##isa(const RankedArgs*); \
    extern "C" int clustered_step_##isa(const ClusteredArgs*); \
    extern "C" int agglomerate_##isa(const ClusterArgs*);

DECLARE(generic)
#ifdef MAMBATRIM_HAVE_X86
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512_bf16)
#endif

namespace {

enum Level { GENERIC, AVX2, AVX512, AVX512_BF16 };

#ifdef MAMBATRIM_HAVE_X86
bool multiplies_bf16() {  // AVX512_BF16, and AVX512_VNNI, which all that have it have too
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 11 & 1);
}
#endif

Level best() {
#ifdef MAMBATRIM_HAVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return multiplies_bf16() ? AVX512_BF16 : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return GENERIC;
}

const Level supported = best();
Level level = supported;

}  // namespace

// A change here without a change in kernels/cpu.py (or the other way round) must not load.
extern "C" int64_t mambatrim_abi() {
    return 1000000 + (int64_t)(sizeof(ScanArgs) + sizeof(ConvArgs) + sizeof(NormArgs) + sizeof(ClusterArgs) + sizeof(ProductArgs) + sizeof(MixerArgs) + sizeof(MixersArgs) +
                                sizeof(RowsArgs) + sizeof(NearestArgs) + sizeof(LinksArgs) + sizeof(LiftArgs) + sizeof(MergeArgs) + sizeof(RankedArgs) +
                                sizeof(ClusteredArgs) + sizeof(EmbedArgs) + sizeof(InverseArgs));
}

// 0 generic, 1 AVX2, 2 AVX-512, 3 with products in bf16. `wanted` < 0 asks only; more than the processor has is not taken. For tests and benchmarks.
extern "C" int64_t mambatrim_level(int64_t wanted) {
    if (wanted >= 0 && wanted <= supported) level = (Level)wanted;
    return level;
}

// Whether products of bf16 are best made here: one instruction makes two of them, and the processor has no tiles (AMX),
// which matrix libraries know to use.
extern "C" int64_t mambatrim_multiplies_bf16() {
#ifdef MAMBATRIM_HAVE_X86
    unsigned a, b, c, d;
    const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
    return level == AVX512_BF16 && !tiles;
#else
    return 0;
#endif
}

#ifdef MAMBATRIM_HAVE_X86
#define DISPATCH(name, Args)                           \
    extern "C" int mambatrim_##name(const Args* p) {   \
        if (level == AVX512_BF16) return name##_avx512_bf16(p); \
        if (level == AVX512) return name##_avx512(p);  \
        if (level == AVX2) return name##_avx2(p);      \
        return name##_generic(p);                      \
    }
#else
#define DISPATCH(name, Args) \
    extern "C" int mambatrim_##name(const Args* p) { return name##_generic(p); }
#endif

DISPATCH(scan_forward, ScanArgs)
DISPATCH(scan_backward, ScanArgs)
DISPATCH(conv_forward, ConvArgs)
DISPATCH(conv_backward, ConvArgs)
DISPATCH(virtual_scan_forward, ScanArgs)
DISPATCH(virtual_conv_forward, ConvArgs)
DISPATCH(norm_forward, NormArgs)
DISPATCH(norm_backward, NormArgs)
DISPATCH(product, ProductArgs)
DISPATCH(embed, EmbedArgs)
DISPATCH(mixers, MixersArgs)
DISPATCH(packed_size, MixersArgs)
DISPATCH(pack_mixers, MixersArgs)
DISPATCH(take_rows, RowsArgs)
DISPATCH(inverse, InverseArgs)
DISPATCH(nearest, NearestArgs)
DISPATCH(links, LinksArgs)
DISPATCH(lift, LiftArgs)
DISPATCH(merge, MergeArgs)
DISPATCH(ranked_step, RankedArgs)
DISPATCH(clustered_step, ClusteredArgs)
DISPATCH(agglomerate, ClusterArgs)
