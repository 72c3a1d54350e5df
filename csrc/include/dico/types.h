// Element types and arguments of the kernels. Shared with CUDA code, so only what every compiler here understands.
// Images are (images, rows, channels) or (images, height, width, channels), contiguous: channels_last memory. A
// null pointer is an argument that is absent. Accumulation is in float, for double in double.
#pragma once

#include <cstdint>

namespace dico {

// Numbered as dico_kernels/native.py numbers torch's dtypes.
enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Pixels that share one partial sum. Fixed, so that results do not depend on the number of threads.
constexpr int64_t kRowBlock = 16;
constexpr int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }
// Sums that adaLN's backward keeps for each channel: of gate, shift and scale.
constexpr int64_t kSums = 3;

// adaLN, gated residual, or both: see csrc/cpu/adaln.h. Strides are elements from one image's vector to the next; 0
// broadcasts.
struct AdalnArgs {
    int64_t images, rows, channels;
    const void *x, *branch, *gate, *shift, *scale;
    int64_t gate_stride, shift_stride, scale_stride;
    double eps;
    const void *dy, *dh;  // backward: gradients of the residual stream and of adaLN's output
    void *y, *h;          // forward: residual stream, adaLN's output; backward: gradients of x and branch
    void *mean, *rstd;    // (images, rows), accumulation type; written forward, read backward
    void* sums;           // backward: (images, kSums, channels), accumulation type
    void* workspace;      // backward: (images, row_blocks(rows), kSums, channels), accumulation type
};

// Sums over pixels (y: (images, channels), accumulation type), or y = x * s + z * r + shift.
struct ChannelArgs {
    int64_t images, rows, channels;
    const void *x, *z;
    const void *s, *r, *shift;  // accumulation type
    int64_t s_stride, r_stride, shift_stride;
    void* y;
    void* workspace;  // sums: (images, row_blocks(rows), channels), accumulation type
};

struct DepthwiseArgs {
    int64_t images, height, width, channels;
    int k;
    bool gelu;
    const void *x, *weight, *bias;  // weight (channels, k, k)
    const void* dy;
    void* y;                // output, or the gradient of x
    void *dweight, *dbias;  // accumulation type
    void* workspace;
};

// Rows [first, first + count) of the (images * 2 height) rows of an output 2 width wide.
struct ShuffleArgs {
    int64_t height, width, shuffled, skipped, first, count;
    const void *up, *skip;
    void *dup, *dskip;
    void* joined;  // (count * 2 width, shuffled + skipped)
};

}  // namespace dico
