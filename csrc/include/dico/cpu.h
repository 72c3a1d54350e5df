// The CPU kernels as the rest of the library sees them: one table of functions an instruction set.
#pragma once

#include <string>
#include <vector>

#include "dico/types.h"

namespace dico::cpu {

// Cubics, term by term, that interpolate Phi(-m) and GELU's slope at -m: segment i is m of (i +- 1/2) / kPerUnit,
// its variable m * kPerUnit - i.
struct GeluTable {
    static constexpr int kSegments = 32, kTerms = 4;
    static constexpr float kPerUnit = 5.25f, kEnd = 5.999f;  // the last segment ends at 6
    float tail[kTerms][kSegments];
    float slope[kTerms][kSegments];
};
extern const GeluTable gelu_table;

// The work, in elements of a pass over an image, up to which a kernel keeps to the thread that called it: 32768, as
// PyTorch has it, and less in tests of threads, which set it while no kernel runs.
extern int64_t grain;

template <class Args>
using Kernel = void (*)(Dtype, const Args&, int threads);

struct Kernels {
    const char* isa;
    Kernel<AdalnArgs> adaln_modulate;
    Kernel<AdalnBackwardArgs> adaln_modulate_backward;
    Kernel<AdalnBackwardArgs> adaln_modulate_backward_residual;
    Kernel<GateGradientArgs> gate_gradient;
    Kernel<GatedArgs> gated_residual;
    Kernel<GatedBackwardArgs> gated_residual_backward;
    Kernel<GatedAdalnArgs> gated_residual_adaln;
    Kernel<AdalnBackwardArgs> gated_residual_adaln_backward;
    Kernel<ChannelSumArgs> channel_sums;
    Kernel<ChannelSumArgs> channel_dots;
    Kernel<ChannelAffineArgs> channel_affine;
    Kernel<PatchesArgs> patches;
    Kernel<PatchesArgs> patches_backward;
    // Bytes of scratch that depthwise or depthwise_backward wants, aligned to 64.
    int64_t (*depthwise_scratch)(Dtype, int64_t channels, int64_t width, int64_t k, bool backward, int threads);
    Kernel<DepthwiseArgs> depthwise;
    Kernel<DepthwiseBackwardArgs> depthwise_backward;
    Kernel<PixelShuffleArgs> shuffle_gather;
    Kernel<PixelShuffleArgs> shuffle_scatter;
    Kernel<GrnScaleArgs> grn_scale;
    Kernel<GrnScaleBackwardArgs> grn_scale_backward;
    Kernel<GeluArgs> gelu;
    Kernel<GeluBackwardArgs> gelu_backward;
    Kernel<GatedProductsArgs> gated_products;
    // Bytes of scratch that weight_gradient wants.
    int64_t (*weight_gradient_scratch)(Dtype, int64_t samples, int64_t pixels, int64_t outputs, int64_t inputs);
    Kernel<WeightGradientArgs> weight_gradient;
    Kernel<AttentionArgs> channel_attention;
    Kernel<AttentionBackwardArgs> channel_attention_backward;
    Kernel<CcaGateArgs> cca_gate;
    Kernel<ConditioningArgs> conditioning;
    Kernel<AddUpArgs> add_up;
    // Bytes of a packed weight.
    int64_t (*packed_size)(Dtype, int64_t outputs, int64_t inputs);
    Kernel<PackArgs> pack;
    // Bytes of scratch that pointwise wants.
    int64_t (*pointwise_scratch)(Dtype, int64_t inputs, int64_t hidden, int64_t block_rows, int threads);
    Kernel<PointwiseArgs> pointwise;
    // Bytes of a 3x3 weight packed for winograd, and of scratch that winograd wants, aligned to 64.
    int64_t (*winograd_packed_size)(Dtype, int64_t outputs, int64_t inputs);
    Kernel<WinogradPackArgs> winograd_pack;
    int64_t (*winograd_scratch)(Dtype, int64_t inputs, int64_t block_tiles, int threads);
    Kernel<WinogradArgs> winograd;
    // Bytes of scratch that winograd_gradient wants, aligned to 64.
    int64_t (*winograd_gradient_scratch)(Dtype, int64_t channels, int64_t outputs, int64_t block_tiles);
    Kernel<WinogradGradientArgs> winograd_gradient;
};

// Names compiled in that this processor can run, best first.
std::vector<std::string> available_isas();
// Names compiled in, best first.
std::vector<std::string> compiled_isas();
// The table in use: the best available one until select_isa names another.
const Kernels& kernels();
// Throws std::invalid_argument when the name was not compiled in or cannot run here.
void select_isa(const std::string& name);

}  // namespace dico::cpu
