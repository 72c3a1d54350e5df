// dico_kernels._C: pointers, sizes and a stream in, nothing of torch. dico_kernels/native.py is its only caller and
// checks every argument; nothing here can.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>

#include "dico/cpu.h"
#ifdef DICO_WITH_CUDA
#include "dico/cuda.h"
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

using Address = uintptr_t;

void* at(Address address) { return reinterpret_cast<void*>(address); }

int64_t element_size(int dtype) { return dtype == static_cast<int>(dico::Dtype::float64) ? 8 : 4; }

// Partial sums of the accumulation type; not initialised.
struct Workspace {
    explicit Workspace(int64_t bytes) : memory(new char[static_cast<size_t>(bytes)]) {}
    std::unique_ptr<char[]> memory;
};

#ifdef DICO_WITH_CUDA
void raise_if(const char* error, const char* op) {
    if (error) throw std::runtime_error(std::string("CUDA ") + op + ": " + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of dico_kernels; use dico_kernels.native.";

    m.def("build", [] {
        py::dict out;
        out["version"] = DICO_VERSION;
        out["compiler"] =
#if defined(__clang__)
            "clang " __clang_version__;
#elif defined(__GNUC__)
            "gcc " __VERSION__;
#else
            "unknown";
#endif
#ifdef _OPENMP
        out["openmp"] = _OPENMP;
#else
        out["openmp"] = 0;
#endif
        out["cuda"] = DICO_CUDA_STATE;
#ifdef DICO_WITH_CUDA
        out["with_cuda"] = true;
#else
        out["with_cuda"] = false;
#endif
        return out;
    });

    m.def("compiled_isas", &dico::cpu::compiled_isas);
    m.def("available_isas", &dico::cpu::available_isas);
    m.def("selected_isa", [] { return std::string(dico::cpu::kernels().isa); });
    m.def("select_isa", &dico::cpu::select_isa);

    using dico::Dtype;
    using dico::cpu::kernels;

    m.def("adaln_forward",
          [](int dtype, int64_t images, int64_t rows, int64_t channels, Address x, Address branch, Address gate,
             int64_t gate_stride, Address shift, int64_t shift_stride, Address scale, int64_t scale_stride,
             double eps, Address y, Address h, Address mean, Address rstd, int threads) {
              py::gil_scoped_release nogil;
              dico::AdalnArgs a{};
              a.images = images, a.rows = rows, a.channels = channels;
              a.x = at(x), a.branch = at(branch), a.gate = at(gate), a.shift = at(shift), a.scale = at(scale);
              a.gate_stride = gate_stride, a.shift_stride = shift_stride, a.scale_stride = scale_stride;
              a.eps = eps, a.y = at(y), a.h = at(h), a.mean = at(mean), a.rstd = at(rstd);
              kernels().adaln_forward(static_cast<Dtype>(dtype), a, threads);
          });

    m.def("adaln_backward", [](int dtype, int64_t images, int64_t rows, int64_t channels, Address dy, Address dh,
                               Address x, Address branch, Address gate, int64_t gate_stride, Address scale,
                               int64_t scale_stride, Address mean, Address rstd, Address dx, Address dbranch,
                               Address sums, int threads) {
        py::gil_scoped_release nogil;
        dico::AdalnArgs a{};
        a.images = images, a.rows = rows, a.channels = channels;
        a.dy = at(dy), a.dh = at(dh), a.x = at(x), a.branch = at(branch), a.gate = at(gate), a.scale = at(scale);
        a.gate_stride = gate_stride, a.scale_stride = scale_stride;
        a.mean = at(mean), a.rstd = at(rstd), a.y = at(dx), a.h = at(dbranch), a.sums = at(sums);
        const Workspace space(images * dico::row_blocks(rows) * dico::kSums * channels * element_size(dtype));
        a.workspace = space.memory.get();
        kernels().adaln_backward(static_cast<Dtype>(dtype), a, threads);
    });

    m.def("channel_sums", [](int dtype, int64_t images, int64_t rows, int64_t channels, Address x, Address z,
                             Address y, int threads) {
        py::gil_scoped_release nogil;
        dico::ChannelArgs a{};
        a.images = images, a.rows = rows, a.channels = channels, a.x = at(x), a.z = at(z), a.y = at(y);
        const Workspace space(images * dico::row_blocks(rows) * channels * element_size(dtype));
        a.workspace = space.memory.get();
        kernels().channel_sums(static_cast<Dtype>(dtype), a, threads);
    });

    m.def("channel_affine",
          [](int dtype, int64_t images, int64_t rows, int64_t channels, Address x, Address s, int64_t s_stride,
             Address shift, int64_t shift_stride, Address z, Address r, int64_t r_stride, Address y, int threads) {
              py::gil_scoped_release nogil;
              dico::ChannelArgs a{};
              a.images = images, a.rows = rows, a.channels = channels;
              a.x = at(x), a.z = at(z), a.s = at(s), a.r = at(r), a.shift = at(shift), a.y = at(y);
              a.s_stride = s_stride, a.r_stride = r_stride, a.shift_stride = shift_stride;
              kernels().channel_affine(static_cast<Dtype>(dtype), a, threads);
          });

    m.def("depthwise_forward", [](int dtype, int64_t images, int64_t height, int64_t width, int64_t channels, int k,
                                  bool gelu, Address x, Address weight, Address bias, Address y, int threads) {
        py::gil_scoped_release nogil;
        dico::DepthwiseArgs a{};
        a.images = images, a.height = height, a.width = width, a.channels = channels, a.k = k, a.gelu = gelu;
        a.x = at(x), a.weight = at(weight), a.bias = at(bias), a.y = at(y);
        kernels().depthwise_forward(static_cast<Dtype>(dtype), a, threads);
    });

    m.def("depthwise_backward", [](int dtype, int64_t images, int64_t height, int64_t width, int64_t channels,
                                   int k, bool gelu, Address dy, Address x, Address weight, Address bias,
                                   Address dx, Address dweight, Address dbias, int threads) {
        py::gil_scoped_release nogil;
        dico::DepthwiseArgs a{};
        a.images = images, a.height = height, a.width = width, a.channels = channels, a.k = k, a.gelu = gelu;
        a.dy = at(dy), a.x = at(x), a.weight = at(weight), a.bias = at(bias);
        a.y = at(dx), a.dweight = at(dweight), a.dbias = at(dbias);
        const Workspace space(kernels().depthwise_workspace(static_cast<Dtype>(dtype), a));
        a.workspace = space.memory.get();
        kernels().depthwise_backward(static_cast<Dtype>(dtype), a, threads);
    });

    m.def("shuffle", [](bool gather, int dtype, int64_t height, int64_t width, int64_t shuffled, int64_t skipped,
                        int64_t first, int64_t count, Address up, Address skip, Address joined, int threads) {
        py::gil_scoped_release nogil;
        dico::ShuffleArgs a{};
        a.height = height, a.width = width, a.shuffled = shuffled, a.skipped = skipped;
        a.first = first, a.count = count, a.joined = at(joined);
        a.up = a.dup = at(up), a.skip = a.dskip = at(skip);
        const dico::cpu::Kernels& k = kernels();
        (gather ? k.shuffle_gather : k.shuffle_scatter)(static_cast<Dtype>(dtype), a, threads);
    });

#ifdef DICO_WITH_CUDA
    m.def("adaln_modulate_cuda", [](int dtype, int64_t images, int64_t rows, int64_t channels, Address x,
                                    Address shift, int64_t shift_stride, Address scale, int64_t scale_stride,
                                    double eps, Address h, Address mean, Address rstd, int device, Address stream) {
        py::gil_scoped_release nogil;
        dico::AdalnArgs a{};
        a.images = images, a.rows = rows, a.channels = channels, a.x = at(x), a.shift = at(shift),
        a.scale = at(scale);
        a.shift_stride = shift_stride, a.scale_stride = scale_stride;
        a.eps = eps, a.h = at(h), a.mean = at(mean), a.rstd = at(rstd);
        const char* error = dico::cuda::adaln_modulate(static_cast<Dtype>(dtype), a, device, at(stream));
        raise_if(error, "adaln_modulate");
    });
#endif
}
