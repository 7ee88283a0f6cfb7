#include "host_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>

#include "common.h"
#include "parallel.h"

namespace osf {
namespace {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;
constexpr size_t kPiece = 16 * kHugePage;  // what one thread brings into memory at a time

size_t round_up(size_t value, size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

[[noreturn]] void fail(int error, const char* what) {
    throw std::system_error(error, std::generic_category(), what);
}

// Brings every page of fresh, zero memory in. Returns an errno, 0 when all is there.
int bring_in(char* begin, size_t bytes) {
#ifdef MADV_POPULATE_WRITE
    int result;
    do result = madvise(begin, bytes, MADV_POPULATE_WRITE);
    while (result != 0 && (errno == EINTR || errno == EAGAIN));
    if (result == 0) return 0;
    if (errno != EINVAL) return errno;  // EINVAL: a kernel before 5.14, which does not know the advice
#endif
    for (size_t at = 0; at < bytes; at += kPage) *static_cast<volatile char*>(begin + at) = 0;
    return 0;
}

}  // namespace

HostMemory::HostMemory(size_t bytes, bool shared, int threads) : bytes_(bytes), owner_(getpid()) {
    require(bytes > 0, "bytes must be positive");
    require(bytes <= SIZE_MAX / 4, "bytes is larger than any address space");
    mapped_ = round_up(bytes, kPage);
    if (shared) {
        descriptor_ = memfd_create("opensora-fast", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (descriptor_ < 0) fail(errno, "memfd_create");
    }
    int error = 0;
    // Another process that shortened the file would make every access here fail with SIGBUS.
    if (shared && (ftruncate(descriptor_, static_cast<off_t>(mapped_)) != 0 ||
                   fcntl(descriptor_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)) {
        error = errno;
    }
    if (error == 0) error = map(shared);
    if (error == 0) {
        std::atomic<int> failed{0};
        parallel_for(static_cast<int64_t>(mapped_), kPiece, threads, [&](int64_t begin, int64_t end) {
            const int status = bring_in(static_cast<char*>(address_) + begin, static_cast<size_t>(end - begin));
            if (status != 0) failed = status;
        });
        error = failed;
    }
    if (error != 0) {
        unmap();
        fail(error, "mmap");
    }
}

HostMemory::HostMemory(int descriptor, size_t bytes) : bytes_(bytes), owner_(getpid()) {
    require(bytes > 0, "bytes must be positive");
    struct stat status;
    if (fstat(descriptor, &status) != 0) fail(errno, "fstat");
    require(static_cast<size_t>(status.st_size) >= bytes, "the descriptor's memory has fewer bytes");
    mapped_ = round_up(bytes, kPage);
    descriptor_ = fcntl(descriptor, F_DUPFD_CLOEXEC, 3);
    if (descriptor_ < 0) fail(errno, "fcntl");
    if (const int error = map(true)) {
        unmap();
        fail(error, "mmap");
    }
}

HostMemory::~HostMemory() {
    if (getpid() != owner_) return;
    if (before_release_) before_release_();
    unmap();
}

// Returns an errno. Maps more than is needed and gives back what lies around the aligned part: only whole, aligned
// 2 MiB can become one page.
int HostMemory::map(bool shared) {
    const size_t reserved = mapped_ + kHugePage;
    void* around = mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (around == MAP_FAILED) return errno;
    char* begin = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(around), kHugePage));
    const int flags = MAP_FIXED | (shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS);
    if (mmap(begin, mapped_, PROT_READ | PROT_WRITE, flags, descriptor_, 0) == MAP_FAILED) {
        const int error = errno;
        munmap(around, reserved);
        return error;
    }
    const size_t before = static_cast<size_t>(begin - static_cast<char*>(around));
    if (before > 0) munmap(around, before);
    if (before < kHugePage) munmap(begin + mapped_, kHugePage - before);
    address_ = begin;
#ifdef MADV_HUGEPAGE
    madvise(begin, mapped_, MADV_HUGEPAGE);  // only advice: a refusal changes nothing but the speed
#endif
    if (!shared && madvise(begin, mapped_, MADV_DONTFORK) != 0) return errno;
    return 0;
}

void HostMemory::unmap() {
    if (address_ != nullptr) munmap(address_, mapped_);
    if (descriptor_ >= 0) close(descriptor_);
    address_ = nullptr;
    descriptor_ = -1;
}

}  // namespace osf
