#include <algorithm>

#include "pages.h"
#include "parallel.h"
#include "pixel_shuffle.h"

namespace osf {
namespace {

constexpr int kUnitPeriods = 128;        // the float sums of a unit stay in the first-level cache
constexpr int64_t kPiecesPerThread = 8;  // big enough that two threads seldom fault in the same huge page
constexpr int64_t kMinPieceElements = 16384;

struct DirectAccess {
    template <class T>
    struct Reader {
        const T* from;
        float operator[](int i) const { return to_float(from[i]); }
    };

    template <class T>
    struct Writer {
        T* to;
        void set(int i, T value) const { to[i] = value; }
        void flush() const {}

        // L copies of one value. Pairs of 16 bits go as 32: compilers interleave equal halves far more slowly.
        template <int L>
        void repeat(int i, T value) const {
            if constexpr (L == 2 && sizeof(T) == 2) {
                const uint32_t pair = value.bits * 0x10001u;
                memcpy(to + i, &pair, sizeof pair);
            } else {
                for (int j = 0; j < L; ++j) to[i + j] = value;
            }
        }
    };

    template <int N, class T>
    static Reader<T> read(const T* from) {
        return {from};
    }

    template <int N, class T>
    static Writer<T> write(T* to) {
        return {to};
    }
};

// Lines [begin, end) of the whole batch.
template <class Direction, class T>
OSF_SIMD_CLONES void run_lines(const PixelShuffle& op, const Buffers& buffers, int64_t begin, int64_t end) {
    const bool gathers = std::is_same_v<Direction, Gather>;
    const int64_t source_sample = gathers ? op.large_sample : op.small_sample;
    const int64_t out_sample = gathers ? op.small_sample : op.large_sample;
    for (int64_t index = begin; index < end; ++index) {
        const int64_t sample = index / op.lines;
        const Position at = op.line(static_cast<uint32_t>(index % op.lines));
        const T* base = buffers.base ? static_cast<const T*>(buffers.base) + sample * out_sample : nullptr;
        const T* source = static_cast<const T*>(buffers.source) + sample * source_sample;
        T* out = static_cast<T*>(buffers.out) + sample * out_sample;
        if (op.taps == 0) {
            for (int i = 0; i < op.periods; ++i) Direction::element(op, op.element(at, i), base, source, out);
            continue;
        }
        with_unit(op.small_period, op.large_period, [&](auto S, auto L) {
            for (int first = 0; first < op.periods; first += kUnitPeriods) {
                const int count = std::min(kUnitPeriods, op.periods - first);
                Direction::template unit<DirectAccess, S, L, kUnitPeriods>(op, at, first, count, base, source, out);
            }
        });
    }
}

template <class Direction>
void run(PixelShuffle& op, const Buffers& buffers, const std::string& dtype, int threads) {
    op.prepare();
    const int64_t lines = op.batch * op.lines;
    const int64_t min_grain = std::max<int64_t>(1, kMinPieceElements / (op.large_sample / op.lines));
    const int64_t grain = std::max(min_grain, lines / (std::max(threads, 1) * kPiecesPerThread));
    with_element_type(dtype, [&](auto element) {
        const int64_t out_sample = std::is_same_v<Direction, Gather> ? op.small_sample : op.large_sample;
        prefer_huge_pages(buffers.out, op.batch * out_sample * sizeof element);
        parallel_for(lines, grain, threads, [&](int64_t begin, int64_t end) {
            run_lines<Direction, decltype(element)>(op, buffers, begin, end);
        });
    });
}

}  // namespace

void space_to_channel_cpu(PixelShuffle op, const Buffers& buffers, const std::string& dtype, int threads) {
    run<Gather>(op, buffers, dtype, threads);
}

void channel_to_space_cpu(PixelShuffle op, const Buffers& buffers, const std::string& dtype, int threads) {
    run<Scatter>(op, buffers, dtype, threads);
}

}  // namespace osf
