#include <algorithm>

#include "adamw.h"
#include "parallel.h"

namespace osf {
namespace {

constexpr int64_t kPieceElements = 32768;  // under a megabyte of state: many pieces for every thread, few calls
constexpr int64_t kDrawsPerThread = 8;

struct Piece {
    int tensor;
    int64_t begin, end;
};

// What is fixed for the loop is a template parameter, and nothing overlaps: it vectorises without checks at run time.
template <bool kCopies, bool kAverages, class Gradient, class Weight>
inline void run_loop(const AdamWUpdate update, const AdamWScalars scalars, float* __restrict__ master,
                     Weight* __restrict__ weight, const Gradient* __restrict__ gradient, float* __restrict__ first,
                     float* __restrict__ second, float* __restrict__ ema, int64_t size) {
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) {
        float value = master[i], mean = first[i], square = second[i];
        update.element(scalars, to_float(gradient[i]), value, mean, square);
        master[i] = value;
        first[i] = mean;
        second[i] = square;
        if constexpr (kCopies) weight[i] = from_float<Weight>(value);
        if constexpr (kAverages) ema[i] = update.average(ema[i], value);
    }
}

// Elements [begin, end) of a tensor.
template <class Gradient, class Weight, bool kCopies, bool kAverages>
OSF_SIMD_CLONES void run_piece(const AdamWUpdate& update, const AdamWScalars& scalars, const AdamWTensor& tensor,
                               int64_t begin, int64_t end) {
    run_loop<kCopies, kAverages>(update, scalars, tensor.master + begin,
                                 kCopies ? static_cast<Weight*>(tensor.weight) + begin : nullptr,
                                 static_cast<const Gradient*>(tensor.gradient) + begin, tensor.first + begin,
                                 tensor.second + begin, kAverages ? tensor.ema + begin : nullptr, end - begin);
}

template <class Gradient, class Weight>
void run(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options, int threads) {
    const AdamWStep step(options);
    const AdamWUpdate update(options);
    std::vector<AdamWScalars> scalars;
    std::vector<Piece> pieces;
    for (size_t i = 0; i < tensors.size(); ++i) {
        scalars.push_back(step.prepare(tensors[i].count));
        if (scalars[i].proceeds == 0.0f) continue;
        for (int64_t begin = 0; begin < tensors[i].size; begin += kPieceElements) {
            pieces.push_back({static_cast<int>(i), begin, std::min(begin + kPieceElements, tensors[i].size)});
        }
    }
    const auto count = static_cast<int64_t>(pieces.size());
    const int64_t grain = std::max<int64_t>(1, count / (std::max(threads, 1) * kDrawsPerThread));
    parallel_for(count, grain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const Piece& piece = pieces[p];
            const AdamWTensor& tensor = tensors[piece.tensor];
            const auto run_one = tensor.weight ? (tensor.ema ? run_piece<Gradient, Weight, true, true>
                                                             : run_piece<Gradient, Weight, true, false>)
                                               : (tensor.ema ? run_piece<Gradient, Weight, false, true>
                                                             : run_piece<Gradient, Weight, false, false>);
            run_one(update, scalars[piece.tensor], tensor, piece.begin, piece.end);
        }
    });
}

}  // namespace

void adamw_cpu(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options, const std::string& gradient_dtype,
               const std::string& weight_dtype, int threads) {
    with_adamw_types(gradient_dtype, weight_dtype, [&](auto gradient, auto weight) {
        run<decltype(gradient), decltype(weight)>(tensors, options, threads);
    });
}

}  // namespace osf
