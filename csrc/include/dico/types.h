// Element types of the kernels. Shared with CUDA code, so only what every compiler here understands.
#pragma once

#include <cstdint>

namespace dico {

// Numbered as dico_kernels/native.py numbers torch's dtypes.
enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Rows of one LayerNorm over channels: x is (images, rows, channels), contiguous, which is channels_last memory.
struct AdalnArgs {
    const void* x;
    const void* shift;  // (images or 1, channels), contiguous
    const void* scale;  // (images or 1, channels), contiguous
    void* y;            // as x
    int64_t images;
    int64_t rows;  // H*W of one image
    int64_t channels;
    int64_t shift_stride;  // elements from one image's shift to the next; 0 broadcasts
    int64_t scale_stride;
    double eps;
};

}  // namespace dico
