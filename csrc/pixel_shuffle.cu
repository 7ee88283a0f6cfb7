// Device code of the two pixel-shuffle maps; pixel_shuffle.h has the equations, the shapes and the index arithmetic.
//
// Memory bound: a thread does one unit of kPeriods periods, so that every access is 16 bytes and a warp covers whole
// lines of the cache. Rows that 16 bytes do not divide, unaligned pointers and odd groups go element by element.
// Grid-stride, no shared memory, no atomics. sm_80 and up.
#include <algorithm>

#include "pixel_shuffle.h"

namespace osf {
namespace {

constexpr int kThreads = 256;
constexpr int kMinBlocks = 2;  // at most 128 registers a thread: a tighter bound spills on sm_80
constexpr int kBlocksPerProcessor = 32;

struct VectorAccess {
    template <int N, class T>
    struct Run {
        static constexpr int kVectors = N * sizeof(T) / sizeof(uint4);
        static_assert(kVectors * sizeof(uint4) == N * sizeof(T), "a run must be whole 16-byte vectors");

        alignas(uint4) T values[N];
        T* to;

        __device__ __forceinline__ float operator[](int i) const { return to_float(values[i]); }
        __device__ __forceinline__ void set(int i, T value) { values[i] = value; }

        template <int L>
        __device__ __forceinline__ void repeat(int i, T value) {
            for (int j = 0; j < L; ++j) values[i + j] = value;
        }

        __device__ __forceinline__ void load(const T* from) {
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                reinterpret_cast<uint4*>(values)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
            }
        }

        __device__ __forceinline__ void flush() const {
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                // The intrinsic keeps the 16 bytes together; a plain assignment is taken apart into elements.
                __stwb(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(values)[i]);
            }
        }
    };

    template <int N, class T>
    static __device__ __forceinline__ Run<N, T> read(const T* from) {
        Run<N, T> run;
        run.load(from);
        return run;
    }

    template <int N, class T>
    static __device__ __forceinline__ Run<N, T> write(T* to) {
        Run<N, T> run;
        run.to = to;
        return run;
    }
};

template <class T>
constexpr int kPeriods = sizeof(uint4) / sizeof(T);

// Typed pointers, and how far apart samples are, in elements.
template <class Direction, class T>
struct Sample {
    const T *base, *source;
    T* out;

    __device__ Sample(const PixelShuffle& op, const Buffers& buffers, int64_t index) {
        const bool gathers = std::is_same_v<Direction, Gather>;
        const int64_t source_sample = gathers ? op.large_sample : op.small_sample;
        const int64_t out_sample = gathers ? op.small_sample : op.large_sample;
        base = buffers.base ? static_cast<const T*>(buffers.base) + index * out_sample : nullptr;
        source = static_cast<const T*>(buffers.source) + index * source_sample;
        out = static_cast<T*>(buffers.out) + index * out_sample;
    }
};

// S, L: elements of a period in a small line and in a large run.
template <class Direction, class T, int S, int L>
__global__ __launch_bounds__(kThreads, kMinBlocks) void unit_kernel(const __grid_constant__ PixelShuffle op,
                                                                    Buffers buffers) {
    const uint32_t units_per_line = op.periods / kPeriods<T>;
    const uint64_t units = uint64_t{op.lines} * units_per_line;
    for (int64_t index = blockIdx.y; index < op.batch; index += gridDim.y) {
        const Sample<Direction, T> sample(op, buffers, index);
        for (uint64_t unit = blockIdx.x * kThreads + threadIdx.x; unit < units; unit += gridDim.x * kThreads) {
            const uint32_t line = static_cast<uint32_t>(unit) / units_per_line;
            const int first = (static_cast<uint32_t>(unit) % units_per_line) * kPeriods<T>;
            Direction::template unit<VectorAccess, S, L, kPeriods<T>>(op, op.line(line), first, kPeriods<T>,
                                                                      sample.base, sample.source, sample.out);
        }
    }
}

template <class Direction, class T>
__global__ __launch_bounds__(kThreads, kMinBlocks) void element_kernel(const __grid_constant__ PixelShuffle op,
                                                                       Buffers buffers) {
    const uint32_t line_elements = op.channels_last ? op.small_channels : op.width;
    for (int64_t index = blockIdx.y; index < op.batch; index += gridDim.y) {
        const Sample<Direction, T> sample(op, buffers, index);
        const uint64_t elements = op.small_sample;
        for (uint64_t i = blockIdx.x * kThreads + threadIdx.x; i < elements; i += gridDim.x * kThreads) {
            const Position at = op.line(static_cast<uint32_t>(i) / line_elements);
            Direction::element(op, op.element(at, static_cast<uint32_t>(i) % line_elements), sample.base, sample.source,
                               sample.out);
        }
    }
}

void check(cudaError_t status) {
    if (status == cudaSuccess) return;
    const char* remedy = status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice
                             ? "; this machine has no usable NVIDIA GPU and driver, so call the op on CPU tensors"
                             : "";
    throw std::runtime_error(std::string("CUDA error ") + cudaGetErrorName(status) + ": " + cudaGetErrorString(status) +
                             remedy);
}

dim3 grid_for(uint64_t threads, int64_t batch) {
    int device = 0, processors = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    const uint64_t blocks = std::min<uint64_t>((threads + kThreads - 1) / kThreads, processors * kBlocksPerProcessor);
    return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min<int64_t>(batch, 65535)));
}

bool aligned(const Buffers& buffers) {
    const auto bits = reinterpret_cast<uintptr_t>(buffers.base) | reinterpret_cast<uintptr_t>(buffers.source) |
                      reinterpret_cast<uintptr_t>(buffers.out);
    return bits % sizeof(uint4) == 0;
}

template <class Direction>
void run(PixelShuffle& op, const Buffers& buffers, const std::string& dtype, uintptr_t stream) {
    op.prepare();
    with_element_type(dtype, [&](auto element) {
        using T = decltype(element);
        const auto on = reinterpret_cast<cudaStream_t>(stream);
        if (op.taps == 0 || op.periods % kPeriods<T> != 0 || !aligned(buffers)) {
            element_kernel<Direction, T><<<grid_for(op.small_sample, op.batch), kThreads, 0, on>>>(op, buffers);
        } else {
            const dim3 grid = grid_for(uint64_t{op.lines} * (op.periods / kPeriods<T>), op.batch);
            with_unit(op.small_period, op.large_period,
                      [&](auto S, auto L) { unit_kernel<Direction, T, S, L><<<grid, kThreads, 0, on>>>(op, buffers); });
        }
        check(cudaGetLastError());
    });
}

}  // namespace

void space_to_channel_cuda(PixelShuffle op, const Buffers& buffers, const std::string& dtype, uintptr_t stream) {
    run<Gather>(op, buffers, dtype, stream);
}

void channel_to_space_cuda(PixelShuffle op, const Buffers& buffers, const std::string& dtype, uintptr_t stream) {
    run<Scatter>(op, buffers, dtype, stream);
}

}  // namespace osf
