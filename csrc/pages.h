// Advice to the kernel about memory that is about to be written.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace osf {

// Asks for 2 MiB pages behind [address, address + bytes), where the system offers them on request. A fresh output of
// tens of megabytes otherwise costs a fault every 4 KiB, several times the work of a memory-bound loop. Small blocks
// are left alone. Only advice: a refusal changes nothing but the speed.
inline void prefer_huge_pages(void* address, size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr size_t kPage = 4096, kWorthIt = size_t{4} << 20;
    if (bytes < kWorthIt) return;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address) / kPage * kPage;
    const uintptr_t end = reinterpret_cast<uintptr_t>(address) + bytes;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace osf
