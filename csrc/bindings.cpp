// The Python face of the native code, and the only file that includes pybind11. Functions take addresses as integers;
// the caller (opensora_fast/kernels) owns the memory, its layout and its lifetime. They run without the interpreter
// lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "adamw.h"
#include "collate.h"
#include "copy_pieces.h"
#include "crc32c.h"
#include "file_reader.h"
#include "file_writer.h"
#include "host_memory.h"
#include "io_ring.h"
#include "pinned_pool.h"
#include "pixel_shuffle.h"
#include "system_calls.h"

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

uintptr_t uintptr_of(const void* address) {
    return reinterpret_cast<uintptr_t>(address);
}

// What memoryview and torch.frombuffer see: writable bytes that keep their owner alive.
py::buffer_info bytes_at(void* address, size_t bytes) {
    return {static_cast<uint8_t*>(address), static_cast<py::ssize_t>(bytes)};
}

// A call into Python that may come from any thread, without the interpreter lock, and from a destructor.
std::function<void()> python_call(py::function function) {
    return [holder = std::shared_ptr<py::function>(new py::function(std::move(function)), [](py::function* kept) {
                py::gil_scoped_acquire lock;
                delete kept;
            })] {
        py::gil_scoped_acquire lock;
        try {
            (*holder)();
        } catch (py::error_already_set& error) {
            error.discard_as_unraisable("a call from native code");
        }
    };
}

void bind_host_memory(py::module_& m) {
    using osf::HostMemory;
    py::class_<HostMemory, std::shared_ptr<HostMemory>>(m, "HostMemory", py::buffer_protocol())
        .def(py::init([](size_t bytes, bool shared, int threads) {
                 py::gil_scoped_release unlocked;
                 return std::make_shared<HostMemory>(bytes, shared, threads);
             }),
             py::kw_only(), "bytes"_a, "shared"_a, "threads"_a)
        .def_static(
            "attach",
            [](int descriptor, size_t bytes) { return std::make_shared<HostMemory>(descriptor, bytes); },
            "descriptor"_a, "bytes"_a)
        .def_property_readonly("address", [](const HostMemory& memory) { return uintptr_of(memory.address()); })
        .def_property_readonly("bytes", &HostMemory::bytes)
        .def_property_readonly("descriptor", &HostMemory::descriptor)
        .def("before_release",
             [](HostMemory& memory, py::function call) { memory.before_release(python_call(std::move(call))); })
        .def_buffer([](HostMemory& memory) { return bytes_at(memory.address(), memory.bytes()); });
    m.def(
        "copy_pieces",
        [](const std::vector<std::array<uintptr_t, 3>>& pieces, int threads) {
            std::vector<osf::CopyPiece> copies;
            copies.reserve(pieces.size());
            for (const auto& [destination, source, bytes] : pieces) {
                copies.push_back({reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source), bytes});
            }
            py::gil_scoped_release unlocked;
            osf::copy_pieces(copies, threads);
        },
        "pieces"_a, py::kw_only(), "threads"_a, "Copies (destination, source, bytes) each, with several threads.");
}

using Deadline = std::chrono::steady_clock::time_point;

// Gives what step(deadline) gives as soon as that is true, at the latest after `timeout` seconds (none: never late).
// The interpreter goes on meanwhile, and Ctrl-C is answered.
template <class Step>
auto wait_in_slices(std::optional<double> timeout, Step&& step) {
    using Seconds = std::chrono::duration<double>;
    constexpr std::chrono::milliseconds kSlice{50};
    const Deadline begin = std::chrono::steady_clock::now();
    while (true) {
        Deadline deadline = std::chrono::steady_clock::now() + kSlice;
        const bool last = timeout && Seconds(deadline - begin).count() >= *timeout;
        if (last) deadline = begin + std::chrono::duration_cast<Deadline::duration>(Seconds(std::max(*timeout, 0.0)));
        auto result = [&] {
            py::gil_scoped_release unlocked;
            return step(deadline);
        }();
        if (result || last) return result;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
}

void bind_pinned_pool(py::module_& m) {
    using osf::PinnedPool, osf::PoolBlock;
    py::class_<PoolBlock>(m, "PoolBlock", py::buffer_protocol(), "Room in a PinnedPool; goes back when it is dropped.")
        .def_property_readonly("address", [](const PoolBlock& block) { return uintptr_of(block.address()); })
        .def_property_readonly("offset", &PoolBlock::offset)
        .def_property_readonly("bytes", &PoolBlock::bytes)
        .def_buffer([](PoolBlock& block) { return bytes_at(block.address(), block.bytes()); });
    py::class_<PinnedPool, std::shared_ptr<PinnedPool>>(m, "PinnedPool", "Blocks of one HostMemory; it never grows.")
        .def(py::init<std::shared_ptr<osf::HostMemory>>(), "memory"_a)
        .def_static("block_bytes", &PinnedPool::block_bytes, "bytes"_a, "What a block of `bytes` takes of the memory.")
        .def_property_readonly("capacity", &PinnedPool::capacity)
        .def(
            "take",
            [](const std::shared_ptr<PinnedPool>& pool, size_t bytes, std::optional<double> timeout) {
                osf::PoolRequest request(pool, bytes);
                return wait_in_slices(timeout, [&](Deadline deadline) { return request.wait_until(deadline); });
            },
            "bytes"_a, py::kw_only(), "timeout"_a, "A block, or None after `timeout` seconds (None: waits for ever).")
        .def("statistics", [](const PinnedPool& pool) {
            const osf::PoolStatistics now = pool.statistics();
            return py::dict("capacity"_a = now.capacity, "in_use"_a = now.in_use, "peak"_a = now.peak,
                            "taken"_a = now.taken, "returned"_a = now.returned, "waits"_a = now.waits,
                            "wait_seconds"_a = now.wait_seconds);
        });
}

void bind_collate(py::module_& m) {
    using osf::CollateTicket, osf::Collator;
    using Clip = std::tuple<uintptr_t, int, int, int, int, int>;
    py::class_<CollateTicket>(m, "CollateTicket", "A submitted batch; goes no earlier than the work is done.")
        .def(
            "wait",
            [](CollateTicket& ticket, std::optional<double> timeout) {
                return wait_in_slices(timeout, [&](Deadline deadline) { return ticket.wait_until(deadline); });
            },
            "timeout"_a, "Whether the batch is complete within `timeout` seconds (None: waits for ever).");
    py::class_<Collator>(m, "Collator", "Threads that make batches [B, 3, T, H, W] of clips uint8 [T, h, w, 3].")
        .def(py::init<int>(), py::kw_only(), "threads"_a)
        .def(
            "submit",
            [](Collator& collator, const std::vector<Clip>& clips, uintptr_t out, std::array<int, 3> thw,
               const std::string& dtype) {
                std::vector<osf::ClipPixels> pixels;
                pixels.reserve(clips.size());
                for (const auto& [address, height, width, frames, top, left] : clips) {
                    pixels.push_back({reinterpret_cast<const uint8_t*>(address), height, width, frames, top, left});
                }
                return collator.submit(std::move(pixels), reinterpret_cast<void*>(out), {thw[0], thw[1], thw[2]},
                                       dtype);
            },
            "clips"_a, py::kw_only(), "out"_a, "thw"_a, "dtype"_a,
            "clips: (address, height, width, frames, top, left) each.")
        .def("close", &Collator::close, py::call_guard<py::gil_scoped_release>());
}

using Path = std::filesystem::path;

py::str path_text(const std::string& path) {
    return py::reinterpret_steal<py::str>(
        PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<py::ssize_t>(path.size())));
}

PyObject* corruption_type = nullptr;  // set by bind_files, kept for good

// The system's refusals become OSError(errno, reason, path where there is one), of the subclass that belongs to the
// errno; damage becomes Corruption(message, path, offset).
void translate_errors(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const osf::SystemError& refused) {
        const py::str reason(py::module_::import("os").attr("strerror")(refused.error));
        const py::object second = refused.second_path.empty() ? py::none() : py::object(path_text(refused.second_path));
        const py::tuple arguments = py::make_tuple(refused.error, reason, path_text(refused.path), py::none(), second);
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    } catch (const osf::Corruption& damage) {
        const py::tuple arguments = py::make_tuple(damage.what(), path_text(damage.path), damage.offset);
        PyErr_SetObject(corruption_type, arguments.ptr());
    } catch (const std::system_error& refused) {
        errno = refused.code().value();
        PyErr_SetFromErrno(PyExc_OSError);
    }
}

py::list recorded_calls(const osf::CallScript& script) {
    py::list calls;
    for (const osf::RecordedCall& call : script.calls()) {
        const py::str path = path_text(call.path);
        if (call.name == "write") {
            calls.append(py::make_tuple(call.name, path, call.offset, py::bytes(call.content)));
        } else if (call.name == "rename") {
            calls.append(py::make_tuple(call.name, path, path_text(call.second_path)));
        } else if (call.name == "allocate" || call.name == "truncate") {
            calls.append(py::make_tuple(call.name, path, call.bytes));
        } else {
            calls.append(py::make_tuple(call.name, path));
        }
    }
    return calls;
}

osf::IoReport write_images(osf::SystemCalls& calls,
                           const std::vector<std::pair<Path, std::vector<std::pair<uintptr_t, uint64_t>>>>& images,
                           size_t chunk_bytes, int depth, int threads, const std::string& engine, bool direct) {
    std::vector<osf::Image> all;
    for (const auto& [path, extents] : images) {
        osf::Image image{path, {}};
        for (const auto& [address, bytes] : extents)
            image.extents.push_back({reinterpret_cast<const char*>(address), bytes});
        all.push_back(std::move(image));
    }
    return osf::write_images(calls, all, {chunk_bytes, depth, threads, engine, direct});
}

osf::IoReport read_pieces(osf::SystemCalls& calls,
                          const std::vector<std::tuple<Path, uint64_t, std::vector<uint32_t>>>& files,
                          const std::vector<std::tuple<size_t, uint64_t, size_t, uintptr_t>>& pieces,
                          size_t chunk_bytes, int depth, int threads, const std::string& engine, bool direct,
                          bool verify_all) {
    std::vector<osf::InputFile> inputs;
    for (const auto& [path, bytes, crc32c] : files) inputs.push_back({path, bytes, crc32c});
    std::vector<osf::ReadPiece> wanted;
    for (const auto& [file, offset, bytes, address] : pieces)
        wanted.push_back({file, offset, bytes, reinterpret_cast<char*>(address)});
    const auto answer_signals = [] {
        py::gil_scoped_acquire lock;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    };
    return osf::read_pieces(calls, inputs, wanted, {chunk_bytes, depth, threads, engine, direct}, verify_all,
                            answer_signals);
}

void write_file(osf::SystemCalls& calls, const Path& path, std::string_view content) {
    constexpr size_t kChunk = size_t{16} << 20;
    osf::write_images(calls, {{path, {{content.data(), content.size()}}}}, {kChunk, 1, 1, "pwrite", false});
}

void bind_files(py::module_& m) {
    using Call = py::call_guard<py::gil_scoped_release>;
    for (const auto& [name, function] : {std::pair{"crc32c", &osf::crc32c}, {"crc32c_software", &osf::crc32c_software}})
        m.def(
            name,
            [function = function](uintptr_t address, size_t bytes, uint32_t seed) {
                return function(reinterpret_cast<const void*>(address), bytes, seed);
            },
            Call(), "address"_a, "bytes"_a, py::kw_only(), "seed"_a = 0,
            "CRC-32C of memory, going on from the checksum `seed` of what comes before it.");
    m.def(
        "runtime_info",
        [] {
            return py::dict("crc32c"_a = osf::crc32c_implementation(), "io_uring"_a = osf::io_uring_missing(),
                            "registered_buffers"_a = osf::registered_buffers_missing());
        },
        "What the file code runs on here: the checksum's implementation, and why io_uring and its registered buffers "
        "cannot be used (an empty string: they can).");

    py::exception<osf::Corruption> corruption(m, "Corruption", PyExc_ValueError);
    corruption.attr("__doc__") =
        "A file that is not what it should be. args: a line for people, the path, the offset of the damage.";
    corruption_type = corruption.inc_ref().ptr();
    py::register_local_exception_translator(translate_errors);

    py::class_<osf::CallScript, std::shared_ptr<osf::CallScript>>(
        m, "CallScript",
        "A test's hold on the system calls of a FileSystem: records them, and makes the calls from number `at` on "
        "(from 0, `times` in a row) \"fail\" with `error`, be \"short\", or end the process (\"kill\": before the "
        "call; \"kill_inside\": with half of a write done).")
        .def(py::init<bool, int64_t, const std::string&, int, int64_t>(), py::kw_only(), "record"_a = false,
             "at"_a = -1, "action"_a = "", "error"_a = 0, "times"_a = 1)
        .def_property_readonly("count", &osf::CallScript::count, "Calls so far, failed ones and reads too.")
        .def("calls", &recorded_calls, "The recorded calls that succeeded, as tuples in order of completion.");

    py::class_<osf::IoReport>(m, "IoReport", "How a write_images or read_pieces was done.")
        .def_readonly("crc32c", &osf::IoReport::crc32c, "Of a write: the checksums of each image's chunks.")
        .def_readonly("engine", &osf::IoReport::engine)
        .def_readonly("direct", &osf::IoReport::direct)
        .def_readonly("fallback", &osf::IoReport::fallback, "Why it is not what was asked for, or an empty string.")
        .def_readonly("bytes", &osf::IoReport::bytes);

    py::class_<osf::SystemCalls>(m, "FileSystem",
                                 "Every durable operation of a checkpoint. Any thread may call; the interpreter goes "
                                 "on meanwhile. Refusals are OSError(errno, reason, path).")
        .def(py::init<std::shared_ptr<osf::CallScript>>(), "script"_a = nullptr)
        .def(
            "make_folder", [](osf::SystemCalls& calls, const Path& path) { calls.make_folder(path); }, Call(), "path"_a)
        .def("write_file", &write_file, Call(), "path"_a, "content"_a,
             "Creates a file (which must not exist), writes `content` and syncs it.")
        .def(
            "sync_folder", [](osf::SystemCalls& calls, const Path& path) { calls.sync_folder(path); }, Call(), "path"_a,
            "Makes the folder's entries durable.")
        .def(
            "rename", [](osf::SystemCalls& calls, const Path& from, const Path& to) { calls.rename(from, to); }, Call(),
            "old"_a, "new"_a)
        .def(
            "remove_file", [](osf::SystemCalls& calls, const Path& path) { calls.remove_file(path); }, Call(), "path"_a)
        .def(
            "remove_folder", [](osf::SystemCalls& calls, const Path& path) { calls.remove_folder(path); }, Call(),
            "path"_a)
        .def("write_images", &write_images, Call(), "images"_a, py::kw_only(), "chunk_bytes"_a, "depth"_a = 4,
             "threads"_a = 2, "engine"_a = "auto", "direct"_a = true,
             "Writes and syncs one new file per (path, [(address, bytes), ...]).")
        .def("read_pieces", &read_pieces, Call(), "files"_a, "pieces"_a, py::kw_only(), "chunk_bytes"_a, "depth"_a = 4,
             "threads"_a = 2, "engine"_a = "auto", "direct"_a = true, "verify_all"_a = false,
             "Fills memory with pieces (file index, offset, bytes, address) of files (path, size, checksums of the "
             "chunks or none) and verifies the chunks that they touch, or all; with the address 0 a piece's chunks are "
             "verified only. Raises Corruption. Ctrl-C ends it soon.");
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
    bind_host_memory(m);
    bind_pinned_pool(m);
    bind_collate(m);
    bind_files(m);
#if OSF_CUDA
    bind_pixel_shuffle(m, "space_to_channel_cuda", osf::space_to_channel_cuda, "stream");
    bind_pixel_shuffle(m, "channel_to_space_cuda", osf::channel_to_space_cuda, "stream");
    bind_adamw(m, "adamw_cuda", osf::adamw_cuda, "scalars", "stream");
#endif
}
