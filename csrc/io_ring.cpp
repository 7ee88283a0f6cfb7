#include "io_ring.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "back_off.h"
#include "page_memory.h"
#include "system_calls.h"

#if defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif
#endif
// Linux 5.6: the first header, and the first kernel, with reads and writes that need no vector.
#if defined(IORING_FEAT_RW_CUR_POS) && defined(__NR_io_uring_setup)
#define OSF_IO_URING 1
#else
#define OSF_IO_URING 0
#endif

namespace osf {

#if OSF_IO_URING
namespace {

int enter(int ring, unsigned submitted, unsigned wanted, unsigned flags) {
    return static_cast<int>(syscall(__NR_io_uring_enter, ring, submitted, wanted, flags, nullptr, 0));
}

// Why io_uring_setup says no.
std::string reason_of(int error) {
    if (error == ENOSYS) return "the kernel is built without it";
    if (error != EPERM && error != EACCES) return strerror(error);
    int disabled = 0;
    if (FILE* const file = fopen("/proc/sys/kernel/io_uring_disabled", "r")) {
        if (fscanf(file, "%d", &disabled) != 1) disabled = 0;
        fclose(file);
    }
    if (disabled != 0) return "kernel.io_uring_disabled is " + std::to_string(disabled);
    return "a security policy of this process (such as seccomp) forbids it";
}

}  // namespace

IoRing::IoRing(unsigned operations) {
    io_uring_params params{};
    descriptor_ = static_cast<int>(syscall(__NR_io_uring_setup, operations, &params));
    if (descriptor_ < 0) throw RingRefused(reason_of(errno));
    try {
        if (!(params.features & IORING_FEAT_RW_CUR_POS)) throw RingRefused("the kernel is older than Linux 5.6");
        const auto& in = params.sq_off;
        const auto& out = params.cq_off;
        submissions_ = map(IORING_OFF_SQ_RING, in.array + params.sq_entries * sizeof(unsigned));
        completions_ = map(IORING_OFF_CQ_RING, out.cqes + params.cq_entries * sizeof(io_uring_cqe));
        entries_ = map(IORING_OFF_SQES, params.sq_entries * sizeof(io_uring_sqe));
        const auto number = [](const Mapping& mapping, unsigned offset) {
            return reinterpret_cast<unsigned*>(static_cast<char*>(mapping.address) + offset);
        };
        submission_tail_ = number(submissions_, in.tail);
        submission_slots_ = number(submissions_, in.array);
        submission_mask_ = *number(submissions_, in.ring_mask);
        completion_head_ = number(completions_, out.head);
        completion_tail_ = number(completions_, out.tail);
        completion_mask_ = *number(completions_, out.ring_mask);
        completion_entries_ = number(completions_, out.cqes);
    } catch (...) {
        release();
        throw;
    }
}

IoRing::~IoRing() {
    release();
}

void IoRing::release() {
    for (const Mapping& mapping : {submissions_, completions_, entries_})
        if (mapping.address != nullptr) munmap(mapping.address, mapping.bytes);
    close(descriptor_);
}

IoRing::Mapping IoRing::map(uint64_t offset, size_t bytes) const {
    void* const address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor_,
                               static_cast<off_t>(offset));
    if (address == MAP_FAILED) throw RingRefused(std::string("its memory: ") + strerror(errno));
    return {address, bytes};
}

std::string IoRing::register_buffer(Span buffer) {
    const iovec vector{buffer.data, buffer.bytes};
    if (syscall(__NR_io_uring_register, descriptor_, IORING_REGISTER_BUFFERS, &vector, 1) == 0) return "";
    if (errno == ENOMEM) return "the limit of locked memory (ulimit -l) is too low";
    return strerror(errno);
}

void IoRing::unregister_buffer() {
    syscall(__NR_io_uring_register, descriptor_, IORING_UNREGISTER_BUFFERS, nullptr, 0);
}

void IoRing::submit(const Operation& operation) {
    const unsigned tail = *submission_tail_;
    const unsigned slot = tail & submission_mask_;
    io_uring_sqe& entry = static_cast<io_uring_sqe*>(entries_.address)[slot];
    memset(&entry, 0, sizeof entry);
    if (operation.registered) {
        entry.opcode = operation.write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;  // buffer number 0
    } else {
        entry.opcode = operation.write ? IORING_OP_WRITE : IORING_OP_READ;
    }
    entry.fd = operation.descriptor;
    entry.off = operation.offset;
    entry.addr = reinterpret_cast<uintptr_t>(operation.data);
    entry.len = static_cast<uint32_t>(operation.bytes);
    entry.user_data = reinterpret_cast<uintptr_t>(operation.owner);
    submission_slots_[slot] = slot;
    __atomic_store_n(submission_tail_, tail + 1, __ATOMIC_RELEASE);
    BackOff back_off;
    while (true) {
        const int taken = enter(descriptor_, 1, 0, 0);
        if (taken > 0) return;
        const int error = taken < 0 ? errno : EAGAIN;
        if (!back_off.again(error)) throw SystemError(error, "io_uring_enter");
    }
}

IoRing::Completion IoRing::wait() {
    const unsigned head = *completion_head_;
    BackOff back_off;
    while (__atomic_load_n(completion_tail_, __ATOMIC_ACQUIRE) == head) {
        if (enter(descriptor_, 0, 1, IORING_ENTER_GETEVENTS) >= 0) continue;
        const int error = errno;
        if (!back_off.again(error)) throw SystemError(error, "io_uring_enter");
    }
    const io_uring_cqe& entry = static_cast<io_uring_cqe*>(completion_entries_)[head & completion_mask_];
    const Completion completion{reinterpret_cast<void*>(static_cast<uintptr_t>(entry.user_data)), entry.res};
    __atomic_store_n(completion_head_, head + 1, __ATOMIC_RELEASE);
    return completion;
}

std::string io_uring_missing() {
    try {
        IoRing ring(1);
        return "";
    } catch (const RingRefused& refused) {
        return refused.what();
    }
}

std::string registered_buffers_missing() {
    try {
        const PageMemory memory(size_t{16} << 20);
        return IoRing(1).register_buffer({memory.data(), memory.bytes()});
    } catch (const RingRefused& refused) {
        return refused.what();
    }
}
#else
namespace {

constexpr const char* kMissing = "it was built without <linux/io_uring.h> of Linux 5.6 or later";

}  // namespace

IoRing::IoRing(unsigned) {
    throw RingRefused(kMissing);
}
IoRing::~IoRing() = default;
std::string IoRing::register_buffer(Span) {
    return kMissing;
}
void IoRing::unregister_buffer() {}
void IoRing::submit(const Operation&) {}
IoRing::Completion IoRing::wait() {
    return {};
}
std::string io_uring_missing() {
    return kMissing;
}
std::string registered_buffers_missing() {
    return kMissing;
}
#endif

}  // namespace osf
