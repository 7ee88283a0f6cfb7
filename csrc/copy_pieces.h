// Many copies as one: what a snapshot of tensors costs.
#pragma once

#include <cstddef>
#include <vector>

namespace osf {

struct CopyPiece {
    void* destination;
    const void* source;
    size_t bytes;
};

// Copies every piece; none may overlap another's destination. The threads share the bytes evenly, however they are
// spread over the pieces. Long runs are written past the caches: the destination is as a rule read much later, by
// another core or a device.
void copy_pieces(const std::vector<CopyPiece>& pieces, int threads);

}  // namespace osf
