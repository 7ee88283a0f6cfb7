// Writes images: files whose bytes are extents of memory, one behind the other.
#pragma once

#include <string>
#include <vector>

#include "io_options.h"

namespace osf {

struct Extent {
    const char* data;
    uint64_t bytes;
};

struct Image {
    std::string path;
    std::vector<Extent> extents;
};

// Creates every file (none may exist), sets its space aside, writes it, gives it the exact length and syncs it. Chunks
// are drawn in order by all threads. Pages of the memory are written from where they are; chunks that are made of
// many pieces, or of pieces that are not whole pages, go through buffers of this call. Those are registered with
// io_uring, as many chunks pass through them; memory that is written once is not, as that would only pin all of it
// before the first write begins. With the engine "pwrite" there is a thread for each chunk in flight. The threads run
// at a low priority. Throws SystemError and then leaves the files as far as they came.
IoReport write_images(SystemCalls& calls, const std::vector<Image>& images, const IoOptions& options);

}  // namespace osf
