// Device code of AdamW; adamw.h has the equations and the arithmetic.
//
// Memory bound: a thread does units of kUnit elements, so that every access is 16 bytes; nothing is reused, so all of
// it passes through the caches as streaming. The tensors travel in the kernel's parameters, up to kTensors a launch,
// and a block does one chunk of one tensor. A small kernel first turns norm, scale and counts into AdamWScalars in
// memory, so that the host waits for nothing. The last elements of a tensor, and tensors that are not aligned, go one
// by one. sm_80 and up.
#include <algorithm>

#include "adamw.h"
#include "cuda_status.h"

namespace osf {
namespace {

constexpr int kThreads = 256;
constexpr int kMinBlocks = 4;       // at most 64 registers a thread: 32 warps, each lane with 112 bytes in flight
constexpr int kUnit = 8;            // elements: 16 bytes of bf16, twice 16 of fp32
constexpr int kUnitsPerThread = 8;  // a chunk is 16384 elements: enough to pay for finding it
constexpr int kElementsPerThread = 8;
constexpr int kTensors = 56;  // as many as leave the parameters under 4096 bytes
constexpr int kCounts = 480;

struct Table {
    AdamWTensor tensors[kTensors];
    uint32_t first_block[kTensors];  // ascending; a tensor's blocks end where the next one's begin
    uint16_t scalars_index[kTensors];
    int count;
    const AdamWScalars* scalars;
    AdamWUpdate update;

    __device__ __forceinline__ int tensor_of(uint32_t block) const {
        int low = 0, high = count;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (first_block[middle] <= block ? low : high) = middle;
        }
        return low;
    }
};
static_assert(sizeof(Table) <= 4096, "kernel parameters are limited to 4096 bytes");

struct Counts {
    float* counts[kCounts];
    int count;
};

__global__ void prepare_kernel(const __grid_constant__ Counts counts, const AdamWStep step, AdamWScalars* scalars) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < counts.count) scalars[i] = step.prepare(counts.counts[i]);
}

template <class T>
struct Unit {
    static constexpr int kVectors = kUnit * sizeof(T) / sizeof(uint4);

    alignas(uint4) T values[kUnit];

    __device__ __forceinline__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            reinterpret_cast<uint4*>(values)[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
        }
    }

    __device__ __forceinline__ void store(T* to) const {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            __stcs(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(values)[i]);
        }
    }
};

__device__ __forceinline__ AdamWScalars load_scalars(const AdamWScalars* from) {
    const float4 values = __ldg(reinterpret_cast<const float4*>(from));
    return {values.x, values.y, values.z, values.w};
}

// AdamWTensor::size counts elements, a multiple of kUnit here.
template <class Gradient, class Weight>
__global__ __launch_bounds__(kThreads, kMinBlocks) void unit_kernel(const __grid_constant__ Table table) {
    const int index = table.tensor_of(blockIdx.x);
    const AdamWScalars scalars = load_scalars(table.scalars + table.scalars_index[index]);
    if (scalars.proceeds == 0.0f) return;
    const AdamWTensor& tensor = table.tensors[index];
    constexpr int kChunk = kThreads * kUnitsPerThread;
    const int64_t begin = int64_t{blockIdx.x - table.first_block[index]} * kChunk;
    const int64_t end = min(begin + kChunk, tensor.size / kUnit);
    for (int64_t unit = begin + threadIdx.x; unit < end; unit += kThreads) {
        const int64_t offset = unit * kUnit;
        Unit<Gradient> gradient;
        Unit<float> master, first, second, ema;
        gradient.load(static_cast<const Gradient*>(tensor.gradient) + offset);
        master.load(tensor.master + offset);
        first.load(tensor.first + offset);
        second.load(tensor.second + offset);
        if (tensor.ema) ema.load(tensor.ema + offset);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
            table.update.element(scalars, to_float(gradient.values[i]), master.values[i], first.values[i],
                                 second.values[i]);
        }
        master.store(tensor.master + offset);
        first.store(tensor.first + offset);
        second.store(tensor.second + offset);
        if (tensor.weight) {
            Unit<Weight> weight;
#pragma unroll
            for (int i = 0; i < kUnit; ++i) weight.values[i] = from_float<Weight>(master.values[i]);
            weight.store(static_cast<Weight*>(tensor.weight) + offset);
        }
        if (tensor.ema) {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) ema.values[i] = table.update.average(ema.values[i], master.values[i]);
            ema.store(tensor.ema + offset);
        }
    }
}

template <class Gradient, class Weight>
__global__ __launch_bounds__(kThreads) void element_kernel(const __grid_constant__ Table table) {
    const int index = table.tensor_of(blockIdx.x);
    const AdamWScalars scalars = load_scalars(table.scalars + table.scalars_index[index]);
    if (scalars.proceeds == 0.0f) return;
    const AdamWTensor& tensor = table.tensors[index];
    constexpr int kChunk = kThreads * kElementsPerThread;
    const int64_t begin = int64_t{blockIdx.x - table.first_block[index]} * kChunk;
    const int64_t end = min(begin + kChunk, tensor.size);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        float master = tensor.master[i], first = tensor.first[i], second = tensor.second[i];
        const float gradient = to_float(static_cast<const Gradient*>(tensor.gradient)[i]);
        table.update.element(scalars, gradient, master, first, second);
        tensor.master[i] = master;
        tensor.first[i] = first;
        tensor.second[i] = second;
        if (tensor.weight) static_cast<Weight*>(tensor.weight)[i] = from_float<Weight>(master);
        if (tensor.ema) tensor.ema[i] = table.update.average(tensor.ema[i], master);
    }
}

// Collects tensors until a launch is full.
class Batch {
  public:
    Batch(void (*kernel)(Table), int64_t chunk, const AdamWUpdate& update, cudaStream_t stream)
        : table_{{}, {}, {}, 0, nullptr, update}, kernel_(kernel), chunk_(chunk), stream_(stream) {}

    // `scalars`: of all tensors; the offset to a tensor's own has to fit the table.
    void add(const AdamWTensor& tensor, const AdamWScalars* scalars) {
        constexpr uint64_t kMaxBlocks = (uint64_t{1} << 31) - 1;
        const uint64_t blocks = (tensor.size + chunk_ - 1) / chunk_;
        require(blocks <= kMaxBlocks, "a tensor has too many elements for one launch");
        if (table_.count == kTensors || blocks_ + blocks > kMaxBlocks) launch();
        if (table_.count > 0 && scalars - table_.scalars > UINT16_MAX) launch();
        if (table_.count == 0) table_.scalars = scalars;
        table_.tensors[table_.count] = tensor;
        table_.first_block[table_.count] = static_cast<uint32_t>(blocks_);
        table_.scalars_index[table_.count] = static_cast<uint16_t>(scalars - table_.scalars);
        ++table_.count;
        blocks_ += blocks;
    }

    void launch() {
        if (table_.count == 0) return;
        kernel_<<<static_cast<unsigned>(blocks_), kThreads, 0, stream_>>>(table_);
        check(cudaGetLastError());
        table_.count = 0;
        blocks_ = 0;
    }

  private:
    Table table_;
    void (*kernel_)(Table);
    int64_t chunk_;
    uint64_t blocks_ = 0;
    cudaStream_t stream_;
};

template <class T>
T* advanced(T* pointer, int64_t elements) {
    return pointer ? pointer + elements : nullptr;
}

template <class Gradient, class Weight>
AdamWTensor from_element(AdamWTensor tensor, int64_t begin) {
    tensor.master += begin;
    tensor.weight = advanced(static_cast<Weight*>(tensor.weight), begin);
    tensor.gradient = static_cast<const Gradient*>(tensor.gradient) + begin;
    tensor.first += begin;
    tensor.second += begin;
    tensor.ema = advanced(tensor.ema, begin);
    tensor.size -= begin;
    return tensor;
}

bool aligned(const AdamWTensor& tensor) {
    uintptr_t bits = 0;
    for (const void* pointer : {static_cast<const void*>(tensor.master), static_cast<const void*>(tensor.weight),
                                tensor.gradient, static_cast<const void*>(tensor.first),
                                static_cast<const void*>(tensor.second), static_cast<const void*>(tensor.ema)}) {
        bits |= reinterpret_cast<uintptr_t>(pointer);
    }
    return bits % sizeof(uint4) == 0;
}

void prepare(const std::vector<AdamWTensor>& tensors, const AdamWStep& step, AdamWScalars* scalars,
             cudaStream_t stream) {
    for (size_t begin = 0; begin < tensors.size(); begin += kCounts) {
        Counts counts{};
        counts.count = static_cast<int>(std::min<size_t>(kCounts, tensors.size() - begin));
        for (int i = 0; i < counts.count; ++i) counts.counts[i] = tensors[begin + i].count;
        constexpr int kPrepareThreads = 64;
        const int blocks = (counts.count + kPrepareThreads - 1) / kPrepareThreads;
        prepare_kernel<<<blocks, kPrepareThreads, 0, stream>>>(counts, step, scalars + begin);
        check(cudaGetLastError());
    }
}

}  // namespace

void adamw_cuda(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options, const std::string& gradient_dtype,
                const std::string& weight_dtype, uintptr_t scalars, uintptr_t stream) {
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    const auto room = reinterpret_cast<AdamWScalars*>(scalars);
    with_adamw_types(gradient_dtype, weight_dtype, [&](auto gradient, auto weight) {
        using Gradient = decltype(gradient);
        using Weight = decltype(weight);
        prepare(tensors, AdamWStep(options), room, on);
        const AdamWUpdate update(options);
        Batch units(unit_kernel<Gradient, Weight>, kThreads * kUnitsPerThread * kUnit, update, on);
        Batch elements(element_kernel<Gradient, Weight>, kThreads * kElementsPerThread, update, on);
        for (size_t i = 0; i < tensors.size(); ++i) {
            AdamWTensor whole = tensors[i];
            whole.size = aligned(whole) ? whole.size / kUnit * kUnit : 0;
            const auto rest = from_element<Gradient, Weight>(tensors[i], whole.size);
            if (whole.size > 0) units.add(whole, room + i);
            if (rest.size > 0) elements.add(rest, room + i);
        }
        units.launch();
        elements.launch();
    });
}

}  // namespace osf
