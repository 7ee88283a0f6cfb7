// What reading and writing of many chunks have in common: how a caller wants it done, and how it was.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "transfer.h"

namespace osf {

// How many bytes a chunk has, how many chunks are in flight together, in how many threads, and through which calls.
struct IoOptions {
    size_t chunk_bytes;
    int depth;
    int threads;
    std::string engine;  // "auto", "io_uring" or "pwrite"
    bool direct;         // bypass the page cache where the file system allows it

    void check() const;  // throws std::invalid_argument
};

struct IoReport {
    std::vector<std::vector<uint32_t>> crc32c;  // of a write: per image, per chunk
    std::string engine;                         // "io_uring" or "pwrite"
    bool direct = true;                         // all files, to the end
    std::string fallback;                       // why it is not what was asked for, or ""
    uint64_t bytes = 0;
};

// Takes into the report whether this file was direct, and if not why.
void note_direct(const OpenFile& file, IoReport& report);

// The threads that share `jobs` chunks of at most `transfers` transfers each, how many chunks each keeps in flight, and
// a ring for each. If one ring is refused there are none: "pwrite", with a thread for each chunk in flight.
struct Crew {
    std::string engine, fallback;  // as in the report
    size_t threads, slots;
    std::vector<std::unique_ptr<IoRing>> rings;

    IoRing* ring(size_t thread) const { return rings.empty() ? nullptr : rings[thread].get(); }
};
Crew crew_for(const IoOptions& options, size_t jobs, size_t transfers);

}  // namespace osf
