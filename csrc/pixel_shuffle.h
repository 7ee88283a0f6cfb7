// The two pixel-shuffle maps between a small tensor [B, M, T, H, W] and a large one [B, C, T * rt, H * rs, W * rs]:
//
//     gather   small[m, t, h, w]  = base + scale * sum_{g < G} large[pixel of k = m * G + g]     space_to_channel
//     scatter  large[pixel of k]  = base + scale * small[k // G, t, h, w]                        channel_to_space
//
// with k = ((c * rt + it) * rs + ih) * rs + iw, R = rt * rs * rs and G = C * R / M. Each is the other's transpose: both
// walk the same taps, and PixelShuffle::pixel() is all the index arithmetic there is, compiled for the host and for the
// device.
//
// A line is one row of the small tensor (contiguous) or one pixel of it (channels last). It is made of equal periods: S
// elements of the line, and L elements of every run, a contiguous piece of the large tensor that the line exchanges
// values with:
//
//     contiguous      a period is one column; S = 1, L = rs; a run is a row of a large channel
//     channels last   a period is lcm(G, R) expanded channels; S = R / G or 1, L = 1 or G / R; a run is a large pixel
//
// A tap is a run all of whose elements in a period belong to one element of the small period. There are such only where
// rs divides G (contiguous), or one of R and G divides the other (channels last); all else goes element by element.
#pragma once

#include <type_traits>

#include "common.h"

namespace osf {

template <int N>
using Int = std::integral_constant<int, N>;

// A line, or one element of it: channel is 0 for a line of channels, width is 0 for a line of columns.
struct Position {
    int channel, time, height, width;
};

// Distances in elements within one sample.
struct Strides {
    int64_t channel, time, height, width;

    OSF_HD int64_t at(int64_t c, int64_t t, int64_t h, int64_t w) const {
        return c * channel + t * time + h * height + w * width;
    }
};

// Calls body(S, L), as compile-time integers, for the periods that have units of their own; does nothing for others.
template <class Body>
void with_unit(int small_period, int large_period, Body&& body) {
    const auto offer = [&](auto S, auto L) {
        if (small_period == S && large_period == L) body(S, L);
    };
    offer(Int<1>{}, Int<1>{});
    offer(Int<1>{}, Int<2>{});
    offer(Int<1>{}, Int<4>{});
    offer(Int<1>{}, Int<8>{});
    offer(Int<2>{}, Int<1>{});
    offer(Int<4>{}, Int<1>{});
}

struct PixelShuffle {
    int64_t batch;
    int small_channels, large_channels, time, height, width;  // M, C and the small tensor's T, H, W
    int spatial_factor, temporal_factor;                      // rs, rt
    bool channels_last;
    float scale;

    // Set by prepare().
    int group;                       // G
    int small_period, large_period;  // S and L
    int periods;                     // in a line
    int siblings;                    // lines in a row that touch one and the same piece of the large tensor
    int taps;                        // of each small element of a period; 0 means element by element
    uint32_t lines;                  // in a sample
    int64_t small_sample, large_sample;
    Strides small, large;

    // Checks the extents and derives the rest; throws std::invalid_argument.
    void prepare() {
        require(spatial_factor == 1 || spatial_factor == 2, "spatial_factor must be 1 or 2");
        require(temporal_factor == 1 || temporal_factor == 2, "temporal_factor must be 1 or 2");
        require(batch > 0 && small_channels > 0 && large_channels > 0 && time > 0 && height > 0 && width > 0,
                "every extent must be positive");
        const int positions = temporal_factor * spatial_factor * spatial_factor;
        require(large_channels <= INT32_MAX / positions && large_channels * positions % small_channels == 0,
                "small_channels must divide large_channels * temporal_factor * spatial_factor^2");
        group = large_channels * positions / small_channels;

        small_sample = int64_t{small_channels} * time * height * width;
        large_sample = small_sample * group;
        require(small_sample <= UINT32_MAX, "a sample of the smaller tensor must have fewer than 2^32 elements");
        small = strides(small_channels, time, height, width);
        large = strides(large_channels, time * temporal_factor, height * spatial_factor, width * spatial_factor);

        siblings = !channels_last && positions % group == 0 ? positions / group : 1;
        const int line = channels_last ? small_channels : width;
        if (!channels_last && group % spatial_factor == 0) {
            set_periods(1, spatial_factor, line, group / spatial_factor);
        } else if (channels_last && group % positions == 0 && has_unit(1, group / positions)) {
            set_periods(1, group / positions, line, positions);
        } else if (channels_last && positions % group == 0 && has_unit(positions / group, 1)) {
            set_periods(positions / group, 1, line / (positions / group), group);
        } else {
            set_periods(1, 1, line, 0);
        }
    }

    // Contiguous lines go by row, then frame, with the channels that share a large channel next to each other: one of
    // them alone would leave every other row of it behind in the cache, to be fetched again.
    OSF_HD Position line(uint32_t index) const {
        Position at{};
        if (channels_last) {
            at.width = static_cast<int>(index % width);
            index /= width;
        }
        const uint32_t sibling = index % siblings;
        index /= siblings;
        at.height = static_cast<int>(index % height);
        index /= height;
        at.time = static_cast<int>(index % time);
        at.channel = static_cast<int>(index / time * siblings + sibling);
        return at;
    }

    // Element `index` of a line that goes element by element.
    OSF_HD Position element(Position at, int index) const {
        (channels_last ? at.channel : at.width) = index;
        return at;
    }

    OSF_HD int64_t small_offset(const Position& at) const { return small.at(at.channel, at.time, at.height, at.width); }

    // Offset in the large sample of expanded channel at.channel * G + e at that place. The factors are 1 or 2.
    OSF_HD int64_t pixel(const Position& at, int e) const {
        int k = at.channel * group + e;
        const int iw = k & (spatial_factor - 1);
        k >>= spatial_factor - 1;
        const int ih = k & (spatial_factor - 1);
        k >>= spatial_factor - 1;
        const int it = k & (temporal_factor - 1);
        k >>= temporal_factor - 1;
        return large.at(k, int64_t{at.time} * temporal_factor + it, int64_t{at.height} * spatial_factor + ih,
                        int64_t{at.width} * spatial_factor + iw);
    }

    // Offset of the run of tap i of small element s of a period.
    OSF_HD int64_t run(const Position& at, int s, int i) const {
        return pixel(at, (s * taps + i) * (channels_last ? 1 : spatial_factor));
    }

  private:
    Strides strides(int64_t channels, int64_t T, int64_t H, int64_t W) const {
        if (channels_last) return {1, H * W * channels, W * channels, channels};
        return {T * H * W, H * W, W, 1};
    }

    static bool has_unit(int S, int L) {
        bool found = false;
        with_unit(S, L, [&](auto, auto) { found = true; });
        return found;
    }

    void set_periods(int small_elements, int large_elements, int in_line, int taps_of_element) {
        small_period = small_elements;
        large_period = large_elements;
        periods = in_line;
        taps = taps_of_element;
        lines = static_cast<uint32_t>(small_sample / (int64_t{periods} * small_period));
    }
};

// unit() does `count` <= V periods of a line, from period `first` on; element() does one small element and its G large
// ones, in any layout. Access says how runs are read and written: the host indexes memory, the device moves 16 bytes at
// a time and needs count == V. Pointers are those of the sample.

struct Gather {
    template <class Access, int S, int L, int V, class T>
    static OSF_HD void unit(const PixelShuffle& op, const Position& at, int first, int count, const T* base,
                            const T* large, T* small) {
        float sum[S][V];
        for (int s = 0; s < S; ++s) {
            for (int v = 0; v < count; ++v) sum[s][v] = 0.0f;
            for (int i = 0; i < op.taps; ++i) {
                const auto run = Access::template read<V * L>(large + op.run(at, s, i) + int64_t{first} * L);
                for (int v = 0; v < count; ++v) {
                    for (int j = 0; j < L; ++j) sum[s][v] += run[v * L + j];
                }
            }
        }
        const int64_t offset = op.small_offset(at) + int64_t{first} * S;
        auto out = Access::template write<V * S>(small + offset);
        if (base) {
            const auto added = Access::template read<V * S>(base + offset);
            for (int v = 0; v < count; ++v) {
                for (int s = 0; s < S; ++s) out.set(v * S + s, from_float<T>(added[v * S + s] + op.scale * sum[s][v]));
            }
        } else {
            for (int v = 0; v < count; ++v) {
                for (int s = 0; s < S; ++s) out.set(v * S + s, from_float<T>(op.scale * sum[s][v]));
            }
        }
        out.flush();
    }

    template <class T>
    static OSF_HD void element(const PixelShuffle& op, const Position& at, const T* base, const T* large, T* small) {
        float sum = 0.0f;
        for (int g = 0; g < op.group; ++g) sum += to_float(large[op.pixel(at, g)]);
        const int64_t offset = op.small_offset(at);
        small[offset] = from_float<T>((base ? to_float(base[offset]) : 0.0f) + op.scale * sum);
    }
};

struct Scatter {
    template <class Access, int S, int L, int V, class T>
    static OSF_HD void unit(const PixelShuffle& op, const Position& at, int first, int count, const T* base,
                            const T* small, T* large) {
        const auto line = Access::template read<V * S>(small + op.small_offset(at) + int64_t{first} * S);
        for (int s = 0; s < S; ++s) {
            float value[V];
            for (int v = 0; v < count; ++v) value[v] = op.scale * line[v * S + s];
            for (int i = 0; i < op.taps; ++i) {
                const int64_t offset = op.run(at, s, i) + int64_t{first} * L;
                auto out = Access::template write<V * L>(large + offset);
                if (base) {
                    const auto added = Access::template read<V * L>(base + offset);
                    for (int v = 0; v < count; ++v) {
                        for (int j = 0; j < L; ++j) out.set(v * L + j, from_float<T>(added[v * L + j] + value[v]));
                    }
                } else {
                    for (int v = 0; v < count; ++v) {
                        out.template repeat<L>(v * L, from_float<T>(value[v]));
                    }
                }
                out.flush();
            }
        }
    }

    template <class T>
    static OSF_HD void element(const PixelShuffle& op, const Position& at, const T* base, const T* small, T* large) {
        const float value = op.scale * to_float(small[op.small_offset(at)]);
        for (int g = 0; g < op.group; ++g) {
            const int64_t offset = op.pixel(at, g);
            large[offset] = from_float<T>((base ? to_float(base[offset]) : 0.0f) + value);
        }
    }
};

// Entry points, one per device. base may be null; out must not overlap base or source.

struct Buffers {
    const void* base;
    const void* source;
    void* out;
};

void space_to_channel_cpu(PixelShuffle op, const Buffers& buffers, const std::string& dtype, int threads);
void channel_to_space_cpu(PixelShuffle op, const Buffers& buffers, const std::string& dtype, int threads);
void space_to_channel_cuda(PixelShuffle op, const Buffers& buffers, const std::string& dtype, uintptr_t stream);
void channel_to_space_cuda(PixelShuffle op, const Buffers& buffers, const std::string& dtype, uintptr_t stream);

}  // namespace osf
