// dico_kernels._C: pointers, sizes and a stream in, nothing of torch. dico_kernels/native.py and what it is made of
// are its only callers and check every argument; nothing here can.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "dico/cpu.h"
#include "recording.h"
#ifdef DICO_WITH_CUDA
#include "dico/cuda.h"
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

// How a member of an argument struct comes from Python: pointers as integers.
template <class Member>
struct Wire;
template <class Owner>
struct Wire<int64_t Owner::*> {
    using type = int64_t;
};
template <class Owner>
struct Wire<double Owner::*> {
    using type = double;
};
template <class Owner>
struct Wire<void* Owner::*> {
    using type = uintptr_t;
};
template <class Owner>
struct Wire<const void* Owner::*> {
    using type = uintptr_t;
};

template <class Value>
void assign(Value& member, Value value) {
    member = value;
}
void assign(void*& member, uintptr_t value) { member = reinterpret_cast<void*>(value); }
void assign(const void*& member, uintptr_t value) { member = reinterpret_cast<const void*>(value); }

template <class Member, class Owner>
size_t offset_of(Member Owner::* member) {
    if constexpr (!std::is_pointer_v<Member>) throw std::invalid_argument("a base for what is not a pointer");
    static const Owner owner{};
    return reinterpret_cast<const char*>(&(owner.*member)) - reinterpret_cast<const char*>(&owner);
}

using MakeStep = std::function<std::unique_ptr<dico::Step>(dico::Dtype, int threads, const py::tuple& values,
                                                           const std::vector<int>& bases)>;

// By a kernel's name.
std::map<std::string, MakeStep>& step_makers() {
    static std::map<std::string, MakeStep> makers;
    return makers;
}

// A call of a kernel as a step; values as the call takes them, but distances for the pointers that have a base,
// which is otherwise negative.
template <class Args, class... Members, size_t... I>
std::unique_ptr<dico::Step> make_step(dico::cpu::Kernel<Args> dico::cpu::Kernels::* kernel, dico::Dtype dtype,
                                      int threads, const py::tuple& values, const std::vector<int>& bases,
                                      std::index_sequence<I...>, Members... members) {
    if (values.size() != sizeof...(members) || bases.size() != sizeof...(members))
        throw std::invalid_argument(std::to_string(values.size()) + " values: expected " +
                                    std::to_string(sizeof...(members)));
    Args args{};
    (assign(args.*members, values[I].template cast<typename Wire<Members>::type>()), ...);
    std::vector<dico::Place> places;
    const auto place = [&](auto member, int base) {
        if (base >= 0) places.push_back({offset_of(member), static_cast<size_t>(base)});
    };
    (place(members, bases[I]), ...);
    return std::make_unique<dico::KernelStep<Args>>(dico::cpu::kernels().*kernel, dtype, threads, args,
                                                    std::move(places));
}

// A kernel as a function of dtype, number of threads, and the named members in that order.
template <class Args, class... Members>
void bind(py::module_& m, const char* name, dico::cpu::Kernel<Args> dico::cpu::Kernels::* kernel,
          Members... members) {
    m.def(name, [=](int dtype, int threads, typename Wire<Members>::type... values) {
        py::gil_scoped_release nogil;
        Args args{};
        (assign(args.*members, values), ...);
        (dico::cpu::kernels().*kernel)(static_cast<dico::Dtype>(dtype), args, threads);
    });
    step_makers()[name] = [=](dico::Dtype dtype, int threads, const py::tuple& values,
                              const std::vector<int>& bases) {
        return make_step<Args>(kernel, dtype, threads, values, bases, std::index_sequence_for<Members...>{},
                               members...);
    };
}

// Images are (images, rows, channels) and divided into blocks of rows.
template <class Args, class... Members>
void bind_rows(py::module_& m, const char* name, dico::cpu::Kernel<Args> dico::cpu::Kernels::* kernel,
               Members... members) {
    using I = dico::Image;
    bind(m, name, kernel, &I::images, &I::rows, &I::channels, &I::block_rows, members...);
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
    m.def("grain", [] { return dico::cpu::grain; });
    m.def("set_grain", [](int64_t elements) { dico::cpu::grain = elements; });

    using dico::cpu::Kernels;
    using A = dico::AdalnArgs;
    bind_rows(m, "adaln_modulate", &Kernels::adaln_modulate, &A::x, &A::shift, &A::scale, &A::y, &A::mean, &A::rstd,
              &A::shift_stride, &A::scale_stride, &A::eps, &A::wide_stream);
    using AB = dico::AdalnBackwardArgs;
    bind_rows(m, "adaln_modulate_backward", &Kernels::adaln_modulate_backward, &AB::dh, &AB::x, &AB::scale,
              &AB::mean, &AB::rstd, &AB::dx, &AB::dshift, &AB::dscale, &AB::partial, &AB::scale_stride);
    bind_rows(m, "adaln_modulate_backward_residual", &Kernels::adaln_modulate_backward_residual, &AB::dh, &AB::dy,
              &AB::x, &AB::shift, &AB::scale, &AB::mean, &AB::rstd, &AB::dx, &AB::h, &AB::dshift, &AB::dscale,
              &AB::partial, &AB::shift_stride, &AB::scale_stride, &AB::wide_stream);
    using GG = dico::GateGradientArgs;
    bind_rows(m, "gate_gradient", &Kernels::gate_gradient, &GG::dy, &GG::gate, &GG::dbranch, &GG::narrow, &GG::sums,
              &GG::gated, &GG::partial, &GG::gate_stride, &GG::wide_stream);
    using G = dico::GatedArgs;
    bind_rows(m, "gated_residual", &Kernels::gated_residual, &G::x, &G::branch, &G::gate, &G::y, &G::gate_stride,
              &G::wide_stream);
    using GB = dico::GatedBackwardArgs;
    bind_rows(m, "gated_residual_backward", &Kernels::gated_residual_backward, &GB::dy, &GB::branch, &GB::gate,
              &GB::dbranch, &GB::dgate, &GB::partial, &GB::gate_stride);
    using GA = dico::GatedAdalnArgs;
    bind_rows(m, "gated_residual_adaln", &Kernels::gated_residual_adaln, &GA::x, &GA::branch, &GA::gate, &GA::shift,
              &GA::scale, &GA::y, &GA::h, &GA::mean, &GA::rstd, &GA::gate_stride, &GA::shift_stride,
              &GA::scale_stride, &GA::eps);
    bind_rows(m, "gated_residual_adaln_backward", &Kernels::gated_residual_adaln_backward, &AB::dy, &AB::dh, &AB::x,
              &AB::branch, &AB::gate, &AB::scale, &AB::mean, &AB::rstd, &AB::dx, &AB::dbranch, &AB::dgate,
              &AB::dshift, &AB::dscale, &AB::partial, &AB::gate_stride, &AB::scale_stride);

    using C = dico::ChannelSumArgs;
    bind_rows(m, "channel_sums", &Kernels::channel_sums, &C::a, &C::out, &C::partial);
    bind_rows(m, "channel_dots", &Kernels::channel_dots, &C::a, &C::b, &C::out, &C::partial);
    using CA = dico::ChannelAffineArgs;
    bind_rows(m, "channel_affine", &Kernels::channel_affine, &CA::x, &CA::s, &CA::shift, &CA::z, &CA::r, &CA::y,
              &CA::s_stride, &CA::shift_stride, &CA::r_stride);

    using PT = dico::PatchesArgs;
    bind(m, "patches", &Kernels::patches, &PT::x, &PT::patches, &PT::images, &PT::height, &PT::width, &PT::channels,
         &PT::k);
    bind(m, "patches_backward", &Kernels::patches_backward, &PT::x, &PT::patches, &PT::images, &PT::height,
         &PT::width, &PT::channels, &PT::k);

    m.def("depthwise_scratch",
          [](int dtype, int threads, int64_t channels, int64_t width, int64_t k, bool backward) {
              return dico::cpu::kernels().depthwise_scratch(static_cast<dico::Dtype>(dtype), channels, width, k,
                                                            backward, threads);
          });
    using D = dico::DepthwiseArgs;
    bind(m, "depthwise", &Kernels::depthwise, &D::x, &D::weight, &D::bias, &D::y, &D::sums, &D::partial,
         &D::scratch, &D::images, &D::height, &D::width, &D::channels, &D::k, &D::gelu, &D::block_height);
    using DB = dico::DepthwiseBackwardArgs;
    bind(m, "depthwise_backward", &Kernels::depthwise_backward, &DB::dy, &DB::x, &DB::weight, &DB::bias, &DB::dx,
         &DB::dweight, &DB::dbias, &DB::partial, &DB::scratch, &DB::images, &DB::height, &DB::width, &DB::channels,
         &DB::k, &DB::gelu, &DB::block_height, &DB::partitions);

    using P = dico::PixelShuffleArgs;
    bind(m, "shuffle_gather", &Kernels::shuffle_gather, &P::up, &P::skip, &P::cat, &P::rows, &P::width,
         &P::channels, &P::skip_channels);
    bind(m, "shuffle_scatter", &Kernels::shuffle_scatter, &P::up, &P::skip, &P::cat, &P::rows, &P::width,
         &P::channels, &P::skip_channels);

    using GS = dico::GrnScaleArgs;
    bind(m, "grn_scale", &Kernels::grn_scale, &GS::squares, &GS::gamma, &GS::norm, &GS::s, &GS::images,
         &GS::channels, &GS::eps);

    using GSB = dico::GrnScaleBackwardArgs;
    bind(m, "grn_scale_backward", &Kernels::grn_scale_backward, &GSB::ds, &GSB::norm, &GSB::gamma, &GSB::dgamma,
         &GSB::through, &GSB::images, &GSB::channels, &GSB::eps);

    using E = dico::GeluArgs;
    bind_rows(m, "gelu", &Kernels::gelu, &E::x, &E::y, &E::sums, &E::partial);
    using EB = dico::GeluBackwardArgs;
    bind_rows(m, "gelu_backward", &Kernels::gelu_backward, &EB::dy, &EB::x, &EB::s, &EB::r, &EB::dx, &EB::y,
              &EB::sums, &EB::partial);

    using GP = dico::GatedProductsArgs;
    bind(m, "gated_products", &Kernels::gated_products, &GP::products, &GP::weight, &GP::gate, &GP::s, &GP::sums,
         &GP::bias, &GP::dweight, &GP::dgate, &GP::dscale, &GP::partial, &GP::samples, &GP::outputs, &GP::inputs,
         &GP::block_rows, &GP::gate_stride, &GP::add);

    m.def("weight_gradient_scratch",
          [](int dtype, int64_t samples, int64_t pixels, int64_t outputs, int64_t inputs) {
              return dico::cpu::kernels().weight_gradient_scratch(static_cast<dico::Dtype>(dtype), samples, pixels,
                                                                  outputs, inputs);
          });
    using WG = dico::WeightGradientArgs;
    bind(m, "weight_gradient", &Kernels::weight_gradient, &WG::dy, &WG::x, &WG::weight, &WG::gate, &WG::s,
         &WG::shift, &WG::gated, &WG::sums, &WG::bias, &WG::dweight, &WG::dgate, &WG::dscale, &WG::scratch,
         &WG::samples, &WG::pixels, &WG::outputs, &WG::inputs, &WG::gate_stride, &WG::wide);

    using CT = dico::AttentionArgs;
    bind(m, "channel_attention", &Kernels::channel_attention, &CT::sums, &CT::weight, &CT::bias, &CT::mean,
         &CT::attention, &CT::images, &CT::channels, &CT::pixels);
    using CB = dico::AttentionBackwardArgs;
    bind(m, "channel_attention_backward", &Kernels::channel_attention_backward, &CB::dattention, &CB::attention,
         &CB::mean, &CB::weight, &CB::dsums, &CB::dweight, &CB::dbias, &CB::images, &CB::channels, &CB::pixels);
    using CG = dico::CcaGateArgs;
    bind_rows(m, "cca_gate", &Kernels::cca_gate, &CG::x, &CG::weight, &CG::bias, &CG::partial, &CG::mean,
              &CG::attention, &CG::y);
    using CO = dico::ConditioningArgs;
    bind(m, "conditioning", &Kernels::conditioning, &CO::c, &CO::weights, &CO::biases, &CO::activated, &CO::y,
         &CO::heads, &CO::images, &CO::inputs, &CO::outputs);

    using AU = dico::AddUpArgs;
    bind(m, "add_up", &Kernels::add_up, &AU::sums, &AU::out, &AU::groups, &AU::parts, &AU::channels);

    m.def("packed_size", [](int dtype, int64_t outputs, int64_t inputs) {
        return dico::cpu::kernels().packed_size(static_cast<dico::Dtype>(dtype), outputs, inputs);
    });
    using PA = dico::PackArgs;
    bind(m, "pack", &Kernels::pack, &PA::weight, &PA::packed, &PA::outputs, &PA::inputs, &PA::output_stride,
         &PA::input_stride);
    m.def("pointwise_scratch", [](int dtype, int threads, int64_t inputs, int64_t hidden, int64_t block_rows) {
        return dico::cpu::kernels().pointwise_scratch(static_cast<dico::Dtype>(dtype), inputs, hidden, block_rows,
                                                      threads);
    });
    using PW = dico::PointwiseArgs;
    bind_rows(m, "pointwise", &Kernels::pointwise, &PW::x, &PW::skip, &PW::packed, &PW::bias, &PW::shift,
              &PW::scale, &PW::mean, &PW::rstd, &PW::s, &PW::plus, &PW::then, &PW::then_bias, &PW::gate,
              &PW::residual, &PW::before, &PW::y, &PW::squares, &PW::partial, &PW::scratch, &PW::outputs,
              &PW::then_outputs, &PW::parts, &PW::skip_channels, &PW::gelu, &PW::shift_stride, &PW::scale_stride,
              &PW::gate_stride, &PW::eps, &PW::wide_stream);

    m.def("winograd_packed_size", [](int dtype, int64_t outputs, int64_t inputs) {
        return dico::cpu::kernels().winograd_packed_size(static_cast<dico::Dtype>(dtype), outputs, inputs);
    });
    using WP = dico::WinogradPackArgs;
    bind(m, "winograd_pack", &Kernels::winograd_pack, &WP::weight, &WP::packed, &WP::outputs, &WP::inputs,
         &WP::output_stride, &WP::input_stride, &WP::tap_stride);
    m.def("winograd_scratch", [](int dtype, int threads, int64_t inputs, int64_t block_tiles) {
        return dico::cpu::kernels().winograd_scratch(static_cast<dico::Dtype>(dtype), inputs, block_tiles, threads);
    });
    using WN = dico::WinogradArgs;
    bind(m, "winograd", &Kernels::winograd, &WN::x, &WN::packed, &WN::bias, &WN::y, &WN::scratch, &WN::images,
         &WN::height, &WN::width, &WN::channels, &WN::outputs, &WN::block_tiles, &WN::parts);
    m.def("winograd_gradient_scratch", [](int dtype, int64_t channels, int64_t outputs, int64_t block_tiles) {
        return dico::cpu::kernels().winograd_gradient_scratch(static_cast<dico::Dtype>(dtype), channels, outputs,
                                                              block_tiles);
    });
    using WNG = dico::WinogradGradientArgs;
    bind(m, "winograd_gradient", &Kernels::winograd_gradient, &WNG::dy, &WNG::x, &WNG::dweight, &WNG::scratch,
         &WNG::images, &WNG::height, &WNG::width, &WNG::channels, &WNG::outputs, &WNG::block_tiles);

    py::class_<dico::Recording>(m, "Recording")
        .def(py::init<size_t>())
        .def("add",
             [](dico::Recording& self, const std::string& kernel, int dtype, int threads, const py::tuple& values,
                const std::vector<int>& bases) {
                 for (const int base : bases)
                     if (base >= static_cast<int>(self.bases())) throw std::invalid_argument("no such base");
                 self.add(step_makers().at(kernel)(static_cast<dico::Dtype>(dtype), threads, values, bases));
             })
        .def("run", &dico::Recording::run, py::call_guard<py::gil_scoped_release>())
        .def("__len__", &dico::Recording::size);

#ifdef DICO_WITH_CUDA
    m.def("adaln_modulate_cuda",
          [](int dtype, int64_t images, int64_t rows, int64_t channels, uintptr_t x, uintptr_t shift,
             uintptr_t scale, uintptr_t y, uintptr_t mean, uintptr_t rstd, int64_t shift_stride,
             int64_t scale_stride, double eps, int device, uintptr_t stream) {
              py::gil_scoped_release nogil;
              const auto pointer = [](uintptr_t p) { return reinterpret_cast<void*>(p); };
              dico::AdalnArgs args{};
              args.images = images, args.rows = rows, args.channels = channels;
              args.x = pointer(x), args.shift = pointer(shift), args.scale = pointer(scale);
              args.y = pointer(y), args.mean = pointer(mean), args.rstd = pointer(rstd);
              args.shift_stride = shift_stride, args.scale_stride = scale_stride, args.eps = eps;
              raise_if(dico::cuda::adaln_modulate(static_cast<dico::Dtype>(dtype), args, device, pointer(stream)),
                       "adaln_modulate");
          });
#endif
}
