// One read or write of a piece of a file, continued until all of it is through: after a short count, EINTR, EAGAIN, or
// a file system that refuses direct I/O. Two engines run them: one call after the other, or many at a time in an
// io_uring. An engine belongs to one thread.
#pragma once

#include <deque>
#include <memory>

#include "back_off.h"
#include "io_ring.h"
#include "system_calls.h"

namespace osf {

struct Transfer {
    OpenFile* file = nullptr;
    bool write = false;
    uint64_t offset = 0;
    char* data = nullptr;
    size_t bytes = 0;   // asked for; for a direct file `offset`, `data` and this are multiples of a page
    size_t needed = 0;  // complete with so many (a direct read of a file's end asks for more)
    void* owner = nullptr;

    size_t done = 0;  // after it: less than `needed` means that the file ended, which only a read lets pass

    // Of the attempt under way.
    bool direct = false;
    size_t limit = 0;
    BackOff back_off;
};

class TransferEngine {
  public:
    explicit TransferEngine(SystemCalls& calls) : calls_(calls) {}
    virtual ~TransferEngine() = default;

    // The transfer and its memory stay where they are until wait() has returned it or the engine is gone.
    virtual void submit(Transfer* transfer) = 0;
    // One that is complete. Throws SystemError.
    virtual Transfer* wait() = 0;

  protected:
    // An attempt's buffer, or the result that it has without being made.
    struct Attempt {
        char* data;
        size_t bytes;
        uint64_t offset;
        int error;
    };
    Attempt start(Transfer& transfer);
    // Takes the attempt's result (a count or a negative errno) into account. False: it wants another attempt.
    bool settle(Transfer& transfer, int64_t result);

    SystemCalls& calls_;
};

// One pread or pwrite at a time, inside submit().
class SerialEngine : public TransferEngine {
  public:
    using TransferEngine::TransferEngine;
    void submit(Transfer* transfer) override;
    Transfer* wait() override;

  private:
    std::deque<Transfer*> complete_;
};

// With the ring, which has room for all transfers that are submitted at a time; without one, a call after the other.
// `reused` is memory of many transfers: it is registered with the ring while the engine lives.
std::unique_ptr<TransferEngine> make_engine(SystemCalls& calls, IoRing* ring, Span reused);

}  // namespace osf
