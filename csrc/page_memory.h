// Page-aligned memory of a loop's own, for transfers that cannot use the caller's.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <string>

#include "pages.h"
#include "system_calls.h"

namespace osf {

class PageMemory {
  public:
    explicit PageMemory(size_t bytes) : bytes_(page_up(bytes)) {
        if (bytes_ == 0) return;
        data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data_ == MAP_FAILED) throw SystemError(errno, "memory for " + std::to_string(bytes_) + " bytes of I/O");
        prefer_huge_pages(data_, bytes_);
    }
    ~PageMemory() {
        if (bytes_ > 0) munmap(data_, bytes_);
    }
    PageMemory(const PageMemory&) = delete;
    PageMemory& operator=(const PageMemory&) = delete;

    char* data() const { return static_cast<char*>(data_); }
    size_t bytes() const { return bytes_; }

  private:
    const size_t bytes_;
    void* data_ = nullptr;
};

}  // namespace osf
