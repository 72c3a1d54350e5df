// dico_kernels._C: pointers, sizes and a stream in, nothing of torch. dico_kernels/native.py is its only caller and
// checks every argument; nothing here can.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
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

dico::AdalnArgs adaln_args(uintptr_t x, uintptr_t shift, uintptr_t scale, uintptr_t y, int64_t images, int64_t rows,
                           int64_t channels, int64_t shift_stride, int64_t scale_stride, double eps) {
    return {reinterpret_cast<const void*>(x),
            reinterpret_cast<const void*>(shift),
            reinterpret_cast<const void*>(scale),
            reinterpret_cast<void*>(y),
            images,
            rows,
            channels,
            shift_stride,
            scale_stride,
            eps};
}

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

    m.def("adaln_modulate_cpu",
          [](int dtype, uintptr_t x, uintptr_t shift, uintptr_t scale, uintptr_t y, int64_t images, int64_t rows,
             int64_t channels, int64_t shift_stride, int64_t scale_stride, double eps, int threads) {
              py::gil_scoped_release nogil;
              dico::cpu::kernels().adaln_modulate(
                  static_cast<dico::Dtype>(dtype),
                  adaln_args(x, shift, scale, y, images, rows, channels, shift_stride, scale_stride, eps), threads);
          });

#ifdef DICO_WITH_CUDA
    m.def("adaln_modulate_cuda", [](int dtype, uintptr_t x, uintptr_t shift, uintptr_t scale, uintptr_t y,
                                    int64_t images, int64_t rows, int64_t channels, int64_t shift_stride,
                                    int64_t scale_stride, double eps, int device, uintptr_t stream) {
        py::gil_scoped_release nogil;
        const char* error = dico::cuda::adaln_modulate(
            static_cast<dico::Dtype>(dtype),
            adaln_args(x, shift, scale, y, images, rows, channels, shift_stride, scale_stride, eps), device,
            reinterpret_cast<void*>(stream));
        raise_if(error, "adaln_modulate");
    });
#endif
}
