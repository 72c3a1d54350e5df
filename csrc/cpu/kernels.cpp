// Every CPU kernel, compiled once per instruction set: CMake gives each copy its -march and DICO_ISA, the name of
// the namespace all of it lives in. No standard library templates here: they would be shared across the copies.
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "dico/cpu.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef DICO_ISA
#error "DICO_ISA must name the instruction set this copy is compiled for"
#endif
#define DICO_STRING_(x) #x
#define DICO_STRING(x) DICO_STRING_(x)

namespace dico::cpu::DICO_ISA {

static inline float sqrt_of(float v) { return __builtin_sqrtf(v); }
static inline double sqrt_of(double v) { return __builtin_sqrt(v); }

#ifdef _OPENMP
static inline int thread_number() { return omp_get_thread_num(); }
#else
static inline int thread_number() { return 0; }
#endif

#include "convert.h"
#include "rows.h"
#include "gelu.h"
// In the order of their files' names.
#include "adaln.h"
#include "attention.h"
#include "channel.h"
#include "convolution.h"
#include "depthwise.h"
#include "gemm.h"
#include "pixel_shuffle.h"
#include "pointwise.h"
#include "sums.h"
#include "weight_gradient.h"
#include "winograd.h"
#include "winograd_gradient.h"

extern const Kernels table;
const Kernels table = {DICO_STRING(DICO_ISA),
                       adaln_modulate,
                       adaln_modulate_backward,
                       adaln_modulate_backward_residual,
                       gate_gradient,
                       gated_residual,
                       gated_residual_backward,
                       gated_residual_adaln,
                       gated_residual_adaln_backward,
                       channel_sums,
                       channel_dots,
                       channel_affine,
                       patches,
                       patches_backward,
                       depthwise_scratch,
                       depthwise,
                       depthwise_backward,
                       shuffle_gather,
                       shuffle_scatter,
                       grn_scale,
                       grn_scale_backward,
                       gelu_forward,
                       gelu_backward,
                       gated_products,
                       weight_gradient_scratch,
                       weight_gradient,
                       channel_attention,
                       channel_attention_backward,
                       cca_gate,
                       conditioning,
                       add_up,
                       packed_size,
                       pack,
                       pointwise_scratch,
                       pointwise,
                       winograd_packed_size,
                       winograd_pack,
                       winograd_scratch,
                       winograd,
                       winograd_gradient_scratch,
                       winograd_gradient};

}  // namespace dico::cpu::DICO_ISA
