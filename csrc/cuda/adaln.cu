// adaln_modulate on the GPU: one warp a row of channels. The row is read three times (mean, variance, output), the
// last two times from cache, so memory moves it once in and once out.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "dico/cuda.h"

namespace dico::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

template <class T>
struct accumulate {
    using type = float;
};
template <>
struct accumulate<double> {
    using type = double;
};
template <class T>
using acc_t = typename accumulate<T>::type;

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }

template <class T>
__device__ inline T narrow(acc_t<T> v);
template <>
__device__ inline float narrow<float>(float v) {
    return v;
}
template <>
__device__ inline double narrow<double>(double v) {
    return v;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half narrow<__half>(float v) {
    return __float2half_rn(v);
}

__device__ inline float reciprocal_root(float v) { return rsqrtf(v); }
__device__ inline double reciprocal_root(double v) { return rsqrt(v); }

// V elements moved by one instruction; 16 bytes where the row allows it.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
    T element[V];
};

template <class A>
__device__ inline A warp_sum(A v) {
    for (int lane = kWarp / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

template <class T, int V>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) adaln_modulate_fwd_kernel(AdalnArgs a) {
    using A = acc_t<T>;
    using P = Pack<T, V>;
    const int lane = threadIdx.x % kWarp;
    const int64_t packs = a.channels / V;
    const int64_t total = a.images * a.rows;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; row < total;
         row += step) {
        const int64_t image = row / a.rows;
        const P* x = reinterpret_cast<const P*>(static_cast<const T*>(a.x) + row * a.channels);
        const P* shift = reinterpret_cast<const P*>(static_cast<const T*>(a.shift) + image * a.shift_stride);
        const P* scale = reinterpret_cast<const P*>(static_cast<const T*>(a.scale) + image * a.scale_stride);
        P* y = reinterpret_cast<P*>(static_cast<T*>(a.y) + row * a.channels);

        A sum = 0;
        for (int64_t p = lane; p < packs; p += kWarp) {
            const P in = x[p];
#pragma unroll
            for (int i = 0; i < V; ++i) sum += widen(in.element[i]);
        }
        const A mean = warp_sum(sum) / static_cast<A>(a.channels);

        A squares = 0, left = 0;
        for (int64_t p = lane; p < packs; p += kWarp) {
            const P in = x[p];
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const A centred = widen(in.element[i]) - mean;
                squares += centred * centred;
                left += centred;
            }
        }
        // What rounding left of the mean, as large as the deviation where the mean is 1e6 of it.
        left = warp_sum(left) / static_cast<A>(a.channels);
        const A variance = warp_sum(squares) / static_cast<A>(a.channels) - left * left;
        const A rstd = reciprocal_root(variance + static_cast<A>(a.eps));
        if (lane == 0) {
            static_cast<A*>(a.mean)[row] = mean + left;
            static_cast<A*>(a.rstd)[row] = rstd;
        }

        for (int64_t p = lane; p < packs; p += kWarp) {
            const P in = x[p], by = scale[p], plus = shift[p];
            P out;
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const A normalised = ((widen(in.element[i]) - mean) - left) * rstd;
                out.element[i] = narrow<T>(normalised * (A(1) + widen(by.element[i])) + widen(plus.element[i]));
            }
            y[p] = out;
        }
    }
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <class T>
cudaError_t launch(const AdalnArgs& a, int device, cudaStream_t stream) {
    const int64_t total = a.images * a.rows;
    if (total == 0) return cudaSuccess;
    int processors = 0;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const int64_t needed = (total + kWarpsPerBlock - 1) / kWarpsPerBlock;
    const int64_t limit = static_cast<int64_t>(processors) * 32;
    const dim3 grid(static_cast<unsigned>(needed < limit ? needed : limit));
    const dim3 block(kWarp * kWarpsPerBlock);
    constexpr int V = 16 / sizeof(T);
    const bool wide = a.channels % V == 0 && a.shift_stride % V == 0 && a.scale_stride % V == 0 &&
                      aligned(a.x, 16) && aligned(a.y, 16) && aligned(a.shift, 16) && aligned(a.scale, 16);
    if (wide)
        adaln_modulate_fwd_kernel<T, V><<<grid, block, 0, stream>>>(a);
    else
        adaln_modulate_fwd_kernel<T, 1><<<grid, block, 0, stream>>>(a);
    return cudaGetLastError();
}

}  // namespace

const char* adaln_modulate(Dtype dtype, const AdalnArgs& a, int device, void* stream) {
    // torch's caching allocator and this library hold separate copies of the runtime; each has a current device.
    cudaError_t error = cudaSetDevice(device);
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    if (error == cudaSuccess) switch (dtype) {
            case Dtype::float32: error = launch<float>(a, device, s); break;
            case Dtype::float64: error = launch<double>(a, device, s); break;
            case Dtype::bfloat16: error = launch<__nv_bfloat16>(a, device, s); break;
            case Dtype::float16: error = launch<__half>(a, device, s); break;
        }
    if (error == cudaSuccess) return nullptr;
    // The runtime remembers an error until it is asked: the next launch would be blamed for this one.
    cudaGetLastError();
    return cudaGetErrorString(error);
}

}  // namespace dico::cuda
