// Reads pieces of files into memory and verifies the chunks that they lie in.
#pragma once

#include <exception>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "io_options.h"

namespace osf {

struct InputFile {
    std::string path;
    uint64_t bytes;                // that it must have
    std::vector<uint32_t> crc32c;  // of its chunks; empty: unknown, nothing is verified
};

struct ReadPiece {
    size_t file;
    uint64_t offset;
    size_t bytes;
    char* data;  // to fill, with nothing of another piece in it; null: the piece's chunks are read and verified only
};

// A file that is not what it should be: its path and the offset of the first byte (of the chunk) that is wrong.
class Corruption : public std::exception {
  public:
    Corruption(std::string message, std::string path, uint64_t offset)
        : path(std::move(path)), offset(offset), message_(std::move(message)) {}
    const char* what() const noexcept override { return message_.c_str(); }

    const std::string path;
    const uint64_t offset;

  private:
    const std::string message_;
};

// Reads each chunk that a piece touches once (all chunks with `verify_all`), checks its CRC where it is known and
// copies the pieces out; a piece that is a whole chunk in page-aligned memory is read in place. Files without checksums
// are read as far as pieces reach. report.bytes counts what was read. Throws Corruption for a file of another size,
// else for the first damage in the order of files and offsets, and SystemError; memory to fill then holds anything.
// poll() is called now and then by the calling thread; what it throws ends the call soon and is thrown. Whatever is
// thrown, nothing is written to memory any more.
IoReport read_pieces(SystemCalls& calls, const std::vector<InputFile>& files, const std::vector<ReadPiece>& pieces,
                     const IoOptions& options, bool verify_all, const std::function<void()>& poll = {});

}  // namespace osf
