// Element types and arguments of the kernels. Shared with CUDA code, so only what every compiler here understands.
// Images are channels_last memory: (images, rows, channels) contiguous, rows = H * W. Statistics, reduced gradients
// and `partial` are float (double for double). A stride is in elements, from one image's vector to the next; 0
// broadcasts.
#pragma once

#include <cstdint>

namespace dico {

// Numbered as dico_kernels/native.py numbers torch's dtypes.
enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

struct Image {
    int64_t images;
    int64_t rows;
    int64_t channels;
    int64_t block_rows;  // an image's rows are divided into blocks of so many; the CPU kernels' unit of work
};

struct AdalnArgs : Image {
    const void* x;
    const void* shift;
    const void* scale;
    void* y;
    void* mean;  // (images, rows), as rstd
    void* rstd;
    int64_t shift_stride;
    int64_t scale_stride;
    double eps;
    int64_t wide_stream;  // x is float32 though all else is a 16-bit type
};

struct GatedArgs : Image {
    const void* x;
    const void* branch;
    const void* gate;
    void* y;
    int64_t gate_stride;
    int64_t wide_stream;  // x and y are float32 though all else is a 16-bit type
};

struct GateGradientArgs : Image {
    const void* dy;
    const void* gate;
    void* dbranch;
    void* narrow;   // dy as the branch's type, where that is another
    void* sums;     // (images, channels), of dy
    void* gated;    // gate * sums
    void* partial;  // (blocks, channels)
    int64_t gate_stride;
    int64_t wide_stream;  // dy is float32 though all else is a 16-bit type
};

struct GatedBackwardArgs : Image {
    const void* dy;
    const void* branch;
    const void* gate;
    void* dbranch;
    void* dgate;
    void* partial;  // (blocks, channels)
    int64_t gate_stride;
};

struct GatedAdalnArgs : Image {
    const void* x;
    const void* branch;
    const void* gate;
    const void* shift;
    const void* scale;
    void* y;
    void* h;
    void* mean;
    void* rstd;
    int64_t gate_stride;
    int64_t shift_stride;
    int64_t scale_stride;
    double eps;
};

// Of adaLN alone, which leaves dy, branch, gate, dbranch and dgate null, of the gated residual with it, or of adaLN
// and the residual around its branch, which sets dy, shift and h instead of the gate's.
struct AdalnBackwardArgs : Image {
    const void* dy;
    const void* dh;  // the gradient of the normalised output
    const void* x;   // what was normalised
    const void* branch;
    const void* gate;
    const void* shift;
    const void* scale;
    const void* mean;
    const void* rstd;
    void* dx;
    void* h;  // the normalised output
    void* dbranch;
    void* dgate;
    void* dshift;
    void* dscale;
    void* partial;  // (blocks, 2, channels), or 3 with the gate
    int64_t gate_stride;
    int64_t shift_stride;
    int64_t scale_stride;
    int64_t wide_stream;  // x, dy and dx are float32 though all else is a 16-bit type
};

struct DepthwiseArgs {
    const void* x;
    const void* weight;  // (channels, k, k)
    const void* bias;    // or null
    void* y;
    void* sums;     // (images, channels), sums of y, with partial; or null
    void* partial;  // (images * blocks of rows, channels)
    void* scratch;
    int64_t images, height, width, channels;
    int64_t k;
    int64_t gelu;
    int64_t block_height;  // rows of an image that are one unit of work
};

struct DepthwiseBackwardArgs {
    const void* dy;
    const void* x;
    const void* weight;
    const void* bias;
    void* dx;
    void* dweight;
    void* dbias;
    void* partial;  // (partitions, k * k + 1, channels)
    void* scratch;
    int64_t images, height, width, channels;
    int64_t k;
    int64_t gelu;
    int64_t block_height;
    int64_t partitions;
};

struct ChannelSumArgs : Image {
    const void* a;
    const void* b;  // null for plain sums
    void* out;
    void* partial;  // (blocks, channels)
};

struct ChannelAffineArgs : Image {
    const void* x;
    const void* s;
    const void* shift;  // or null
    const void* z;      // or null, with r
    const void* r;
    void* y;
    int64_t s_stride;
    int64_t shift_stride;
    int64_t r_stride;
};

// norm = sqrt(squares), s = 1 + gamma * norm / (mean over channels of norm + eps); each (images, channels).
struct GrnScaleArgs {
    const void* squares;  // or null: norm is given
    const void* gamma;    // (channels)
    void* norm;
    void* s;
    int64_t images, channels;
    double eps;
};

// Of s as above by gamma, a sample, and through the norms: what multiplies x in its gradient. Each (images,
// channels).
struct GrnScaleBackwardArgs {
    const void* ds;
    const void* norm;
    const void* gamma;  // (channels)
    void* dgamma;
    void* through;
    int64_t images, channels;
    double eps;
};

struct GeluArgs : Image {
    const void* x;
    void* y;
    void* sums;     // (images, channels), sums of y squared, with partial; or null
    void* partial;  // (blocks, channels)
};

// Of gelu(x), or with s and r, (images, channels), of what multiplies dy by s and adds r * gelu(x).
struct GeluBackwardArgs : Image {
    const void* dy;
    const void* x;
    const void* s;  // or null, with r
    const void* r;
    void* dx;
    void* y;        // gelu(x) formed anew, or null
    void* sums;     // (images, channels), sums of dx
    void* partial;  // (blocks, channels)
};

// products: (samples, outputs, inputs), G_n = dy_n^T x_n of gate * W (s x).
struct GatedProductsArgs {
    const void* products;
    const void* weight;  // W, (outputs, inputs)
    const void* gate;
    const void* s;     // (samples, inputs), or null for 1
    const void* sums;  // (samples, outputs), with bias (outputs): their product is added to dgate; or null
    const void* bias;
    void* dweight;  // (outputs, inputs)
    void* dgate;    // (samples, outputs)
    void* dscale;   // (samples, inputs); null without s
    void* partial;  // (blocks of outputs, samples, inputs); null without s
    int64_t samples, outputs, inputs;
    int64_t block_rows;
    int64_t gate_stride;
    int64_t add;  // to what dweight holds
};

// The same of dy (samples, pixels, outputs) and x (samples, pixels, inputs), for gate * (W (s x + shift) + b); or
// without a gate, dW = sum_n G_n alone.
struct WeightGradientArgs {
    const void* dy;
    const void* x;
    const void* weight;
    const void* gate;  // or null, and then all but dweight
    const void* s;
    const void* shift;  // (inputs), with gated (outputs), the sums over samples and pixels of gate * dy; or null
    const void* gated;
    const void* sums;
    const void* bias;  // b and W shift
    void* dweight;     // of dy's type, or of the accumulation's: wide
    void* dgate;
    void* dscale;
    void* scratch;
    int64_t samples, pixels, outputs, inputs;
    int64_t gate_stride;
    int64_t wide;
    int64_t add;  // to what dweight, wide, holds
};

// attention = sigmoid(W mean + b), mean = sums / pixels; each (images, channels).
struct AttentionArgs {
    const void* sums;
    const void* weight;  // (channels, channels)
    const void* bias;    // or null
    void* mean;
    void* attention;
    int64_t images, channels, pixels;
};

// Of attention as above by sums, weight, and, a sample, bias; of at most 8 images.
struct AttentionBackwardArgs {
    const void* dattention;
    const void* attention;
    const void* mean;
    const void* weight;
    void* dsums;
    void* dweight;  // (channels, channels)
    void* dbias;
    int64_t images, channels, pixels;
};

// y = x * attention, the attention of x's own mean.
struct CcaGateArgs : Image {
    const void* x;
    const void* weight;  // (channels, channels)
    const void* bias;    // or null
    void* partial;       // (blocks, channels)
    void* mean;          // (images, channels)
    void* attention;
    void* y;
};

// y[head] = W silu(c) + b with the head's W (outputs, inputs) and b (outputs); y (heads, images, outputs).
struct ConditioningArgs {
    const void* c;        // (images, inputs)
    const void* weights;  // (heads) addresses, as int64_t
    const void* biases;
    void* activated;  // silu(c)
    void* y;
    int64_t heads, images, inputs, outputs;
};

// out (groups, channels) = the sums over the middle of sums (groups, parts, channels).
struct AddUpArgs {
    const void* sums;
    void* out;
    int64_t groups, parts, channels;
};

// W (outputs, inputs), in any strides, as pointwise takes it.
struct PackArgs {
    const void* weight;
    void* packed;
    int64_t outputs, inputs;
    int64_t output_stride, input_stride;
};

// y = W prologue(x) + b, through GELU or into the gated residual; or both, one product after the other, with
// `then`. x is (images, rows, channels).
struct PointwiseArgs : Image {
    const void* x;
    const void* skip;  // x is up, see PixelShuffleArgs, and an image one of its rows: (images, rows,
                       // skip_channels), which of the channels are the last; or null
    const void* packed;
    const void* bias;   // (outputs), or null
    const void* shift;  // of adaLN, with scale; or null
    const void* scale;
    void* mean;  // with rstd; or null
    void* rstd;
    const void* s;          // instead: what x is multiplied by, (images, channels); or null
    const void* plus;       // added to that, (channels); or null
    const void* then;       // a second weight, (then_outputs, outputs), whose product is gated; or null
    const void* then_bias;  // (then_outputs), or null
    const void* gate;       // y = residual + gate * product, of the last product; or null
    const void* residual;
    void* before;  // what GELU is applied to, (images, rows, outputs); or null
    void* y;
    void* squares;  // (images, outputs), sums of y squared, with partial; or null
    void* partial;  // (blocks, outputs)
    void* scratch;
    int64_t outputs;
    int64_t then_outputs;
    int64_t parts;  // of the outputs, each a unit of work: 1 with `then`
    int64_t skip_channels;
    int64_t gelu;
    int64_t shift_stride;
    int64_t scale_stride;
    int64_t gate_stride;
    double eps;
    int64_t wide_stream;  // with adaLN x, and residual and its y, are float32 though all else is a 16-bit type
};

// x is (images, height, width, channels); patches (images, height, width, channels * k * k), k odd.
struct PatchesArgs {
    void* x;
    void* patches;
    int64_t images, height, width;
    int64_t channels;
    int64_t k;
};

// W (outputs, inputs, 9), in any strides, as winograd takes it.
struct WinogradPackArgs {
    const void* weight;
    void* packed;
    int64_t outputs, inputs;
    int64_t output_stride, input_stride, tap_stride;  // may be negative
};

// y (images, height, width, outputs) = the 3x3 convolution of x (images, height, width, channels), with zeros
// around.
struct WinogradArgs {
    const void* x;
    const void* packed;
    const void* bias;  // (outputs), or null
    void* y;
    void* scratch;
    int64_t images, height, width, channels;
    int64_t outputs;
    int64_t block_tiles;  // of 2x2 outputs, that are one unit of work
    int64_t parts;        // of the outputs, too
};

// dweight (outputs, channels, 3, 3) of that convolution; x as there, dy as y.
struct WinogradGradientArgs {
    const void* dy;
    const void* x;
    void* dweight;
    void* scratch;
    int64_t images, height, width, channels;
    int64_t outputs;
    int64_t block_tiles;  // of which the transformed exist at a time
};

// rows: rows of small images, (rows, width, 4 * channels) in up; two rows of twice the width in skip and cat for
// each.
struct PixelShuffleArgs {
    void* up;
    void* skip;
    void* cat;  // (4 * rows * width, channels + skip_channels)
    int64_t rows, width;
    int64_t channels;
    int64_t skip_channels;
};

}  // namespace dico
