// Large blocks of host memory that live as long as somebody refers to them: the arenas of checkpoints, the slots of
// decoding workers, the pool of batches.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

namespace osf {

// One mapping, aligned to 2 MiB, zero, and in memory from the start: no page fault is left for the step that uses it.
//
// Private memory is not there in a forked child (a copy on write would tear pages away from direct I/O that is under
// way). Shared memory is a sealed memfd that another process can map by its descriptor. A forked child that drops its
// copy of the object leaves the memory as it is.
class HostMemory {
  public:
    // Throws std::system_error when the system does not give the memory, std::invalid_argument for 0 bytes.
    HostMemory(size_t bytes, bool shared, int threads);

    // Maps the first `bytes` of another process's shared memory. The descriptor stays the caller's.
    // Throws std::system_error, or std::invalid_argument when there are fewer bytes.
    HostMemory(int descriptor, size_t bytes);

    ~HostMemory();

    HostMemory(const HostMemory&) = delete;
    HostMemory& operator=(const HostMemory&) = delete;

    void* address() const { return address_; }
    size_t bytes() const { return bytes_; }
    int descriptor() const { return descriptor_; }  // -1 when private

    // Called once before the memory goes, in the process that made it: takes back what a device driver knows of it.
    void before_release(std::function<void()> call) { before_release_ = std::move(call); }

  private:
    int map(bool shared);
    void unmap();

    void* address_ = nullptr;
    size_t bytes_, mapped_ = 0;
    int descriptor_ = -1;
    pid_t owner_;
    std::function<void()> before_release_;
};

}  // namespace osf
