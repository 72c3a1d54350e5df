// The CPU kernels as the rest of the library sees them: one table of functions an instruction set.
#pragma once

#include <string>
#include <vector>

#include "dico/types.h"

namespace dico::cpu {

// One entry a kernel; csrc/cpu/ has them under the same names.
struct Kernels {
    const char* isa;
    void (*adaln_forward)(Dtype, const AdalnArgs&, int threads);
    void (*adaln_backward)(Dtype, const AdalnArgs&, int threads);
    void (*channel_sums)(Dtype, const ChannelArgs&, int threads);
    void (*channel_affine)(Dtype, const ChannelArgs&, int threads);
    void (*depthwise_forward)(Dtype, const DepthwiseArgs&, int threads);
    void (*depthwise_backward)(Dtype, const DepthwiseArgs&, int threads);
    int64_t (*depthwise_workspace)(Dtype, const DepthwiseArgs&);  // bytes that backward needs
    void (*shuffle_gather)(Dtype, const ShuffleArgs&, int threads);
    void (*shuffle_scatter)(Dtype, const ShuffleArgs&, int threads);
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
