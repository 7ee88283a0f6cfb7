// The kernel's io_uring with system calls of our own: reads and writes that are handed in one at a time and complete in
// any order. One thread at a time uses a ring.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace osf {

struct Span {
    char* data;
    size_t bytes;
};

// Why io_uring, or the registration of buffers with it, cannot be used here; "" when it can.
std::string io_uring_missing();
std::string registered_buffers_missing();

// Why there is no ring: the system's limits, its settings or its age.
class RingRefused : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

class IoRing {
  public:
    struct Operation {
        bool write;
        bool registered;  // the memory is in the registered buffer
        int descriptor;
        char* data;
        size_t bytes;
        uint64_t offset;
        void* owner;
    };
    struct Completion {
        void* owner;
        int64_t result;  // bytes or a negative errno
    };

    // Up to `operations` may be on their way at a time. Throws RingRefused.
    explicit IoRing(unsigned operations);
    ~IoRing();  // nothing may be on its way
    IoRing(const IoRing&) = delete;
    IoRing& operator=(const IoRing&) = delete;

    // Pins the memory until it is taken back, which saves that for each operation in it. "" or why not.
    std::string register_buffer(Span buffer);
    void unregister_buffer();

    // Both throw SystemError.
    void submit(const Operation& operation);
    Completion wait();  // sleeps until one is complete

  private:
    struct Mapping {
        void* address = nullptr;
        size_t bytes = 0;
    };
    Mapping map(uint64_t offset, size_t bytes) const;
    void release();

    int descriptor_ = -1;
    Mapping submissions_, completions_, entries_;
    // In the mapped memory, shared with the kernel.
    unsigned *submission_tail_ = nullptr, *submission_slots_ = nullptr;
    unsigned *completion_head_ = nullptr, *completion_tail_ = nullptr;
    void* completion_entries_ = nullptr;
    unsigned submission_mask_ = 0, completion_mask_ = 0;
};

}  // namespace osf
