// Every CPU kernel, compiled once per instruction set: CMake gives each copy its -march and DICO_ISA, the name of
// the namespace all of it lives in. No standard library templates here: they would be shared across the copies.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "dico/cpu.h"

#ifndef DICO_ISA
#error "DICO_ISA must name the instruction set this copy is compiled for"
#endif
#define DICO_STRING_(x) #x
#define DICO_STRING(x) DICO_STRING_(x)

namespace dico::cpu::DICO_ISA {

static inline float sqrt_of(float v) { return __builtin_sqrtf(v); }
static inline double sqrt_of(double v) { return __builtin_sqrt(v); }

// A unit's scratch, aligned to a vector. Out of memory ends the process: inside a parallel region nothing can be
// thrown.
template <class A>
static inline A* allocate(int64_t elements) {
    const size_t bytes = (static_cast<size_t>(elements) * sizeof(A) + 63) / 64 * 64;
    void* memory = aligned_alloc(64, bytes);
    if (!memory) abort();
    return static_cast<A*>(memory);
}
static inline void release(void* memory) { free(memory); }

#include "simd.h"
#include "gelu.h"
#include "adaln.h"
#include "channel.h"
#include "depthwise.h"
#include "pixel_shuffle.h"

template <template <class> class Kernel, class... Arguments>
static auto by_dtype(Dtype dtype, Arguments&&... arguments) {
    switch (dtype) {
        case Dtype::float64: return Kernel<double>::run(arguments...);
        case Dtype::bfloat16: return Kernel<bf16>::run(arguments...);
        case Dtype::float16: return Kernel<fp16>::run(arguments...);
        case Dtype::float32: break;
    }
    return Kernel<float>::run(arguments...);
}

// A template function as a type, so that by_dtype can be handed it.
#define DICO_KERNEL(Name, call)                                                 \
    template <class T>                                                          \
    struct Name {                                                               \
        template <class Arguments>                                              \
        static auto run(const Arguments& a, [[maybe_unused]] int threads = 1) { \
            return call;                                                        \
        }                                                                       \
    };

DICO_KERNEL(AdalnForward, adaln_forward<T>(a, threads))
DICO_KERNEL(AdalnBackward, adaln_backward<T>(a, threads))
DICO_KERNEL(ChannelSums, channel_sums<T>(a, threads))
DICO_KERNEL(ChannelAffine, channel_affine<T>(a, threads))
DICO_KERNEL(DepthwiseForward, (a.k == 3   ? depthwise_forward<T, 3>(a, threads)
                               : a.k == 7 ? depthwise_forward<T, 7>(a, threads)
                                          : depthwise_forward<T, 0>(a, threads)))
DICO_KERNEL(DepthwiseBackward, (a.k == 3   ? depthwise_backward<T, 3>(a, threads)
                                : a.k == 7 ? depthwise_backward<T, 7>(a, threads)
                                           : depthwise_backward<T, 0>(a, threads)))
DICO_KERNEL(DepthwiseWorkspace, depthwise_workspace<T>(a))
DICO_KERNEL(ShuffleGather, pixel_shuffle_gather<T>(a, threads))
DICO_KERNEL(ShuffleScatter, pixel_shuffle_scatter<T>(a, threads))

extern const Kernels table;
const Kernels table = {
    DICO_STRING(DICO_ISA),
    [](Dtype d, const AdalnArgs& a, int threads) { by_dtype<AdalnForward>(d, a, threads); },
    [](Dtype d, const AdalnArgs& a, int threads) { by_dtype<AdalnBackward>(d, a, threads); },
    [](Dtype d, const ChannelArgs& a, int threads) { by_dtype<ChannelSums>(d, a, threads); },
    [](Dtype d, const ChannelArgs& a, int threads) { by_dtype<ChannelAffine>(d, a, threads); },
    [](Dtype d, const DepthwiseArgs& a, int threads) { by_dtype<DepthwiseForward>(d, a, threads); },
    [](Dtype d, const DepthwiseArgs& a, int threads) { by_dtype<DepthwiseBackward>(d, a, threads); },
    [](Dtype d, const DepthwiseArgs& a) { return by_dtype<DepthwiseWorkspace>(d, a); },
    [](Dtype d, const ShuffleArgs& a, int threads) { by_dtype<ShuffleGather>(d, a, threads); },
    [](Dtype d, const ShuffleArgs& a, int threads) { by_dtype<ShuffleScatter>(d, a, threads); },
};

}  // namespace dico::cpu::DICO_ISA
