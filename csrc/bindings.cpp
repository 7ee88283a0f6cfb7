// The Python face of the native code, and the only file that includes pybind11. Functions take addresses as integers;
// the caller (opensora_fast/kernels) owns the memory, its layout and its lifetime. They run without the interpreter
// lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <thread>
#include <vector>

#include "adamw.h"
#include "pixel_shuffle.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

// One signature for both maps and both devices; Where is the number of threads (int) or the CUDA stream (uintptr_t).
template <class Where>
void bind_pixel_shuffle(py::module_& m, const char* name,
                        void (*function)(osf::PixelShuffle, const osf::Buffers&, const std::string&, Where),
                        const char* where_name) {
    const auto call = [function](uintptr_t out, uintptr_t base, uintptr_t source, const std::string& dtype,
                                 bool channels_last, int64_t batch, int small_channels, int large_channels,
                                 std::array<int, 3> small_thw, int spatial_factor, int temporal_factor, float scale,
                                 Where where) {
        osf::PixelShuffle op{};
        op.batch = batch;
        op.small_channels = small_channels;
        op.large_channels = large_channels;
        op.time = small_thw[0];
        op.height = small_thw[1];
        op.width = small_thw[2];
        op.spatial_factor = spatial_factor;
        op.temporal_factor = temporal_factor;
        op.channels_last = channels_last;
        op.scale = scale;
        const osf::Buffers buffers{reinterpret_cast<const void*>(base), reinterpret_cast<const void*>(source),
                                   reinterpret_cast<void*>(out)};
        function(op, buffers, dtype, where);
    };
    m.def(name, call, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "out"_a, "base"_a, "source"_a, "dtype"_a,
          "channels_last"_a, "batch"_a, "small_channels"_a, "large_channels"_a, "small_thw"_a, "spatial_factor"_a,
          "temporal_factor"_a, "scale"_a, py::arg(where_name));
}

// Both devices: Where is the number of threads, or the addresses of room for the scalars and of the CUDA stream. Lists
// hold an address per tensor: 0 for a weight that is its master, an average not kept, a count that `step` stands for.
template <class... Where, class... WhereName>
void bind_adamw(py::module_& m, const char* name,
                void (*function)(const std::vector<osf::AdamWTensor>&, const osf::AdamWOptions&, const std::string&,
                                 const std::string&, Where...),
                WhereName... where_name) {
    using Addresses = std::vector<uintptr_t>;
    const auto call = [function](const Addresses& masters, const Addresses& weights, const Addresses& gradients,
                                 const Addresses& first_moments, const Addresses& second_moments, const Addresses& ema,
                                 const Addresses& counts, const std::vector<int64_t>& sizes,
                                 const std::string& gradient_dtype, const std::string& weight_dtype, double lr,
                                 double beta1, double beta2, double eps, double weight_decay, double ema_decay,
                                 double max_norm, double step, uintptr_t gradient_norm, uintptr_t gradient_scale,
                                 Where... where) {
        for (const Addresses* list : {&weights, &gradients, &first_moments, &second_moments, &ema, &counts}) {
            osf::require(list->size() == masters.size(), "every list needs an address per tensor");
        }
        osf::require(sizes.size() == masters.size(), "sizes needs a number per tensor");
        std::vector<osf::AdamWTensor> tensors;
        tensors.reserve(masters.size());
        const auto floats = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
        for (size_t i = 0; i < masters.size(); ++i) {
            tensors.push_back({floats(masters[i]), reinterpret_cast<void*>(weights[i]),
                               reinterpret_cast<const void*>(gradients[i]), floats(first_moments[i]),
                               floats(second_moments[i]), floats(ema[i]), floats(counts[i]), sizes[i]});
        }
        osf::AdamWOptions options{};
        options.lr = lr;
        options.beta1 = beta1;
        options.beta2 = beta2;
        options.eps = eps;
        options.weight_decay = weight_decay;
        options.ema_decay = ema_decay;
        options.max_norm = max_norm;
        options.step = step;
        options.gradient_norm = floats(gradient_norm);
        options.gradient_scale = floats(gradient_scale);
        function(tensors, options, gradient_dtype, weight_dtype, where...);
    };
    m.def(name, call, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "masters"_a, "weights"_a, "gradients"_a,
          "first_moments"_a, "second_moments"_a, "ema"_a, "counts"_a, "sizes"_a, "gradient_dtype"_a, "weight_dtype"_a,
          "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "ema_decay"_a, "max_norm"_a, "step"_a,
          "gradient_norm"_a, "gradient_scale"_a, py::arg(where_name)...);
}

py::dict build_info() {
    return py::dict("version"_a = OSF_VERSION, "compiler"_a = OSF_COMPILER, "simd"_a = OSF_SIMD,
                    "cpu_threads"_a = std::thread::hardware_concurrency(), "cuda"_a = OSF_CUDA != 0,
                    "cuda_missing"_a = OSF_CUDA_MISSING, "cuda_version"_a = OSF_CUDA_VERSION,
                    "cuda_architectures"_a = OSF_CUDA_ARCHITECTURES);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native code of opensora-fast: C++ for the CPU and, where it was built, CUDA.";
    m.def("build_info", &build_info, "What was built, by what, and why the CUDA part is missing if it is.");
    bind_pixel_shuffle(m, "space_to_channel_cpu", osf::space_to_channel_cpu, "threads");
    bind_pixel_shuffle(m, "channel_to_space_cpu", osf::channel_to_space_cpu, "threads");
    bind_adamw(m, "adamw_cpu", osf::adamw_cpu, "threads");
#if OSF_CUDA
    bind_pixel_shuffle(m, "space_to_channel_cuda", osf::space_to_channel_cuda, "stream");
    bind_pixel_shuffle(m, "channel_to_space_cuda", osf::channel_to_space_cuda, "stream");
    bind_adamw(m, "adamw_cuda", osf::adamw_cuda, "scalars", "stream");
#endif
}
