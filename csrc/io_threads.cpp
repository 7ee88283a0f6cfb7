#include "io_threads.h"

#include <signal.h>

#include <cstdint>
#include <thread>
#include <vector>

namespace osf {

void JobQueue::fail(size_t rank, std::exception_ptr error) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_ || rank < rank_) {
        rank_ = rank;
        error_ = std::move(error);
    }
    failed_.store(true, std::memory_order_relaxed);
}

void JobQueue::rethrow() {
    if (error_) std::rethrow_exception(error_);
}

void run_threads(size_t threads, JobQueue& queue, const std::function<void()>& body) {
    const auto guarded = [&] {
        try {
            body();
        } catch (...) {
            queue.fail(SIZE_MAX, std::current_exception());
        }
    };
    std::vector<std::thread> running;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        while (running.size() < threads) running.emplace_back(guarded);
    } catch (...) {
        queue.fail(SIZE_MAX, std::current_exception());
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    for (std::thread& thread : running) thread.join();
}

}  // namespace osf
