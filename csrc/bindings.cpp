// The Python face of the native code, and the only file that includes pybind11. Functions take addresses as integers;
// the caller (opensora_fast/kernels) owns the memory, its layout and its lifetime. They run without the interpreter
// lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <thread>

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
#if OSF_CUDA
    bind_pixel_shuffle(m, "space_to_channel_cuda", osf::space_to_channel_cuda, "stream");
    bind_pixel_shuffle(m, "channel_to_space_cuda", osf::channel_to_space_cuda, "stream");
#endif
}
