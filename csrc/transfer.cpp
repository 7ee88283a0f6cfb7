#include "transfer.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace osf {

TransferEngine::Attempt TransferEngine::start(Transfer& transfer) {
    const auto verdict = calls_.next(transfer.write ? CallScript::Kind::kWrite : CallScript::Kind::kRead);
    Attempt attempt{transfer.data + transfer.done, transfer.bytes - transfer.done, transfer.offset + transfer.done,
                    verdict.error};
    transfer.direct = transfer.file->direct();
    transfer.limit = attempt.bytes;
    if (verdict.shorten) {
        transfer.limit = std::min(attempt.bytes, attempt.bytes / 2 | 1);
        attempt.bytes = transfer.direct ? page_up(transfer.limit) : transfer.limit;
    }
    if (verdict.kill_inside) {
        (void)!pwrite(transfer.file->descriptor(), attempt.data, attempt.bytes, static_cast<off_t>(attempt.offset));
        kill_own_process();
    }
    return attempt;
}

bool TransferEngine::settle(Transfer& transfer, int64_t result) {
    OpenFile& file = *transfer.file;
    if (result == -EINVAL && transfer.direct) {  // some file systems refuse the first transfer and not the flag
        file.drop_direct(kRefused);
        return false;
    }
    if (result < 0) {
        if (transfer.back_off.again(static_cast<int>(-result))) return false;
        throw SystemError(static_cast<int>(-result), file.path);
    }

    const size_t moved = std::min(static_cast<size_t>(result), transfer.limit);
    if (transfer.write && moved > 0)
        calls_.record_write(file.path, transfer.offset + transfer.done, transfer.data + transfer.done, moved);
    transfer.done += moved;
    if (transfer.done >= transfer.needed) return true;
    if (moved == 0) {
        if (transfer.write) throw SystemError(EIO, file.path);
        return true;  // the file ends here
    }
    if (file.direct() && transfer.done % kPage != 0) {
        if (moved < kPage) {
            file.drop_direct("a direct transfer stopped inside of a page");
        } else {
            transfer.done = page_down(transfer.done);
        }
    }
    return false;
}

void SerialEngine::submit(Transfer* transfer) {
    int64_t result;
    do {
        const Attempt attempt = start(*transfer);
        const int descriptor = transfer->file->descriptor();
        const auto offset = static_cast<off_t>(attempt.offset);
        if (attempt.error != 0) {
            result = -attempt.error;
        } else {
            result = transfer->write ? pwrite(descriptor, attempt.data, attempt.bytes, offset)
                                     : pread(descriptor, attempt.data, attempt.bytes, offset);
            if (result < 0) result = -errno;
        }
    } while (!settle(*transfer, result));
    complete_.push_back(transfer);
}

Transfer* SerialEngine::wait() {
    Transfer* const transfer = complete_.front();
    complete_.pop_front();
    return transfer;
}

namespace {

// Keeps many transfers in an io_uring.
class RingEngine : public TransferEngine {
  public:
    RingEngine(SystemCalls& calls, IoRing& ring, Span reused) : TransferEngine(calls), ring_(ring), reused_(reused) {
        if (reused.bytes > 0) registered_ = ring_.register_buffer(reused).empty();
    }
    ~RingEngine() override {
        while (in_flight_ > 0) {
            ring_.wait();
            --in_flight_;
        }
        if (registered_) ring_.unregister_buffer();
    }

    void submit(Transfer* transfer) override {
        const Attempt attempt = start(*transfer);
        if (attempt.error != 0) {
            not_made_.push_back({transfer, -attempt.error});
            return;
        }
        const bool registered =
            registered_ && attempt.data >= reused_.data && attempt.data < reused_.data + reused_.bytes;
        ring_.submit({transfer->write, registered, transfer->file->descriptor(), attempt.data, attempt.bytes,
                      attempt.offset, transfer});
        ++in_flight_;
    }

    Transfer* wait() override {
        while (true) {
            IoRing::Completion completion;
            if (not_made_.empty()) {
                completion = ring_.wait();
                --in_flight_;
            } else {
                completion = not_made_.front();
                not_made_.pop_front();
            }
            Transfer* const transfer = static_cast<Transfer*>(completion.owner);
            if (settle(*transfer, completion.result)) return transfer;
            submit(transfer);
        }
    }

  private:
    IoRing& ring_;
    const Span reused_;
    bool registered_ = false;
    std::deque<IoRing::Completion> not_made_;
    size_t in_flight_ = 0;
};

}  // namespace

std::unique_ptr<TransferEngine> make_engine(SystemCalls& calls, IoRing* ring, Span reused) {
    if (ring == nullptr) return std::make_unique<SerialEngine>(calls);
    return std::make_unique<RingEngine>(calls, *ring, reused);
}

}  // namespace osf
