// The exported functions: each goes to the best instruction set of the processor that it runs on.
#include "abi.h"

#define DECLARE(isa)                                   \
    extern "C" int scan_forward_##isa(const ScanArgs*);  \
    extern "C" int scan_backward_##isa(const ScanArgs*); \
    extern "C" int conv_forward_##isa(const ConvArgs*);  \
    extern "C" int conv_backward_##isa(const ConvArgs*); \
    extern "C" int virtual_scan_forward_##isa(const ScanArgs*); \
    extern "C" int virtual_conv_forward_##isa(const ConvArgs*); \
    extern "C" int norm_forward_##isa(const NormArgs*);  \
    extern "C" int norm_backward_##isa(const NormArgs*); \
    extern "C" int project_##isa(const ProjectArgs*);    \
    extern "C" int take_rows_##isa(const RowsArgs*);     \
    extern "C" int nearest_##isa(const NearestArgs*);    \
    extern "C" int links_##isa(const LinksArgs*);        \
    extern "C" int lift_##isa(const LiftArgs*);          \
    extern "C" int merge_##isa(const MergeArgs*); \
    extern "C" int agglomerate_##isa(const ClusterArgs*);

DECLARE(generic)
#ifdef MAMBATRIM_HAVE_X86
DECLARE(avx2)
DECLARE(avx512)
#endif

namespace {

enum Level { GENERIC, AVX2, AVX512 };

Level best() {
#ifdef MAMBATRIM_HAVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return GENERIC;
}

const Level supported = best();
Level level = supported;

}  // namespace

// A change here without a change in kernels/cpu.py (or the other way round) must not load.
extern "C" int64_t mambatrim_abi() {
    return 1000000 + (int64_t)(sizeof(ScanArgs) + sizeof(ConvArgs) + sizeof(NormArgs) + sizeof(ClusterArgs) + sizeof(ProjectArgs) +
                                sizeof(RowsArgs) + sizeof(NearestArgs) + sizeof(LinksArgs) + sizeof(LiftArgs) + sizeof(MergeArgs));
}

// 0 generic, 1 AVX2, 2 AVX-512. `wanted` < 0 asks only; more than the processor has is not taken. For tests and benchmarks.
extern "C" int64_t mambatrim_level(int64_t wanted) {
    if (wanted >= 0 && wanted <= supported) level = (Level)wanted;
    return level;
}

#ifdef MAMBATRIM_HAVE_X86
#define DISPATCH(name, Args)                           \
    extern "C" int mambatrim_##name(const Args* p) {   \
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
DISPATCH(project, ProjectArgs)
DISPATCH(take_rows, RowsArgs)
DISPATCH(nearest, NearestArgs)
DISPATCH(links, LinksArgs)
DISPATCH(lift, LiftArgs)
DISPATCH(merge, MergeArgs)
DISPATCH(agglomerate, ClusterArgs)
