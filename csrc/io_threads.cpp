#include "io_threads.h"

#include <signal.h>

#include <chrono>
#include <condition_variable>
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
    stop();
}

void JobQueue::rethrow() {
    if (error_) std::rethrow_exception(error_);
}

void run_threads(size_t threads, JobQueue& queue, const std::function<void(size_t)>& body,
                 const std::function<void()>& poll) {
    constexpr std::chrono::milliseconds kPollEvery{50};
    std::mutex mutex;
    std::condition_variable ended;
    size_t count = 0;  // of those that have ended
    const auto guarded = [&](size_t thread) {
        try {
            body(thread);
        } catch (...) {
            queue.fail(SIZE_MAX, std::current_exception());
        }
        std::lock_guard<std::mutex> lock(mutex);
        ++count;
        ended.notify_one();
    };
    std::vector<std::thread> running;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        while (running.size() < threads) running.emplace_back(guarded, running.size());
    } catch (...) {
        queue.fail(SIZE_MAX, std::current_exception());
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    std::exception_ptr interruption;
    try {
        for (bool done = !poll; !done;) {
            poll();
            std::unique_lock<std::mutex> lock(mutex);
            done = ended.wait_for(lock, kPollEvery, [&] { return count == running.size(); });
        }
    } catch (...) {
        queue.stop();
        interruption = std::current_exception();
    }
    for (std::thread& thread : running) thread.join();
    if (interruption) std::rethrow_exception(interruption);
}

}  // namespace osf
