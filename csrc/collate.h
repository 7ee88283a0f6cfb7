// Decoded clips become a batch, in threads of their own.
//
//     source, per clip   uint8   [T, height, width, 3]
//     out                        [B, 3, T, H, W]    the window of H x W at (top, left), p / 127.5 - 1
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace osf {

struct ClipPixels {
    const uint8_t* pixels;
    int height, width, frames;
    int top, left;
};

struct BatchShape {
    int frames, height, width;
};

// One submitted batch.
class CollateTicket {
  public:
    // Waits for the work: nobody writes to memory that its owner has let go.
    ~CollateTicket();

    CollateTicket(const CollateTicket&) = delete;
    CollateTicket& operator=(const CollateTicket&) = delete;

    // Whether the batch is complete; returns no later than at `deadline`. Throws std::runtime_error in a forked child.
    bool wait_until(std::chrono::steady_clock::time_point deadline);

  private:
    friend class Collator;
    struct Work;

    explicit CollateTicket(std::shared_ptr<Work> work) : work_(std::move(work)) {}

    std::shared_ptr<Work> work_;
};

// Batches are worked on in the order of submission, frame by frame, by all threads. In a forked child there are no such
// threads: tickets and collators are destroyed there without waiting.
class Collator {
  public:
    explicit Collator(int threads);
    ~Collator();  // close()

    Collator(const Collator&) = delete;
    Collator& operator=(const Collator&) = delete;

    // dtype: of `out`, as torch names it. Throws std::invalid_argument when a clip does not cover the window or has
    // another number of frames, and std::runtime_error after close() and in a forked child.
    std::unique_ptr<CollateTicket> submit(std::vector<ClipPixels> clips, void* out, const BatchShape& shape,
                                          const std::string& dtype);

    // Completes what was submitted and ends the threads. May be called again.
    void close();

  private:
    struct Queue;

    static void serve(Queue& queue);

    std::unique_ptr<Queue> queue_;
    std::vector<std::thread> threads_;
    pid_t owner_;
};

}  // namespace osf
