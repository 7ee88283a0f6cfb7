#include "copy_pieces.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace osf {
namespace {

constexpr int64_t kGrain = int64_t{4} << 20;     // bytes that a thread draws at a time
constexpr size_t kStreamed = size_t{256} << 10;  // from here on a run is written past the caches

#if defined(__SSE2__)

// Four pages advance together: their loads are fetched ahead by as many streams, and each line is written whole.
constexpr size_t kPage = 4096, kLine = 64, kPages = 4;

void copy_line(char* to, const char* from) {
    for (size_t i = 0; i < kLine; i += sizeof(__m128i)) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
}

void copy_streamed(char* to, const char* from, size_t bytes) {
    const size_t head = (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine;
    memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= kPages * kPage; to += kPages * kPage, from += kPages * kPage, bytes -= kPages * kPage) {
        for (size_t at = 0; at < kPage; at += kLine) {
            for (size_t page = 0; page < kPages; ++page) copy_line(to + page * kPage + at, from + page * kPage + at);
        }
    }
    _mm_sfence();
    memcpy(to, from, bytes);
}

#else

void copy_streamed(char* to, const char* from, size_t bytes) {
    memcpy(to, from, bytes);
}

#endif

}  // namespace

void copy_pieces(const std::vector<CopyPiece>& pieces, int threads) {
    std::vector<int64_t> ends;  // of each piece, in the bytes of all
    ends.reserve(pieces.size());
    int64_t total = 0;
    for (const CopyPiece& piece : pieces) ends.push_back(total += static_cast<int64_t>(piece.bytes));
    parallel_for(total, kGrain, threads, [&](int64_t begin, int64_t end) {
        size_t index = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
        while (begin < end) {
            const CopyPiece& piece = pieces[index];
            const int64_t offset = begin - (ends[index] - static_cast<int64_t>(piece.bytes));
            const size_t run = static_cast<size_t>(std::min(end, ends[index]) - begin);
            char* to = static_cast<char*>(piece.destination) + offset;
            const char* from = static_cast<const char*>(piece.source) + offset;
            if (run >= kStreamed) {
                copy_streamed(to, from, run);
            } else {
                memcpy(to, from, run);
            }
            begin += static_cast<int64_t>(run);
            ++index;
        }
    });
}

}  // namespace osf
