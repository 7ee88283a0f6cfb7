// The threads of one read or write of many chunks, and the first thing that goes wrong in them.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <mutex>

namespace osf {

// What the threads of one call share: the next job to take, and whether to go on.
class JobQueue {
  public:
    explicit JobQueue(size_t jobs) : jobs_(jobs) {}

    // False when there is none left, or when the call has failed or is to stop.
    bool take(size_t& job) {
        if (stopped_.load(std::memory_order_relaxed)) return false;
        job = next_.fetch_add(1, std::memory_order_relaxed);
        return job < jobs_;
    }
    // Of several failures the one with the lowest `rank` is kept: what a caller is told does not depend on timing.
    void fail(size_t rank, std::exception_ptr error);
    void stop() { stopped_.store(true, std::memory_order_relaxed); }
    void rethrow();  // the failure, if there is one; call it when the threads are gone

  private:
    const size_t jobs_;
    std::atomic<size_t> next_{0};
    std::atomic<bool> stopped_{false};
    std::mutex mutex_;
    size_t rank_ = 0;
    std::exception_ptr error_;
};

// Runs body(0) to body(threads - 1) in new threads and waits for them. Signals stay with the threads that are there
// already, and what the kernel starts for a thread's io_uring goes with the thread. An exception of body() is a failure
// of the queue, of the highest rank; so is a thread that cannot start. poll(), if there is one, is called meanwhile,
// at once and then 20 times a second: what it throws stops the queue, and is thrown when the threads are gone.
void run_threads(size_t threads, JobQueue& queue, const std::function<void(size_t)>& body,
                 const std::function<void()>& poll);

}  // namespace osf
