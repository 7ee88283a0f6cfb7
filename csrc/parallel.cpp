#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace osf {
namespace {

// Workers are started when first asked for and then sleep between loops. The pieces of a loop are drawn from one
// counter, so a core that is busy elsewhere delays its own piece and no more.
class ThreadPool {
  public:
    void run(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn || threads <= 1 || count <= grain) return body(0, count);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(workers_.size()) < threads - 1) workers_.emplace_back([this] { work(); });
            body_ = &body;
            count_ = count;
            grain_ = grain;
            next_ = 0;
            free_seats_ = threads - 1;
            ++loop_;
        }
        wake_.notify_all();
        draw_pieces();
        std::unique_lock<std::mutex> lock(mutex_);
        free_seats_ = 0;  // a worker that wakes only now finds the loop closed
        done_.wait(lock, [this] { return seated_ == 0; });
    }

  private:
    void work() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [&] { return loop_ != seen; });
            seen = loop_;
            if (free_seats_ == 0) continue;
            --free_seats_;
            ++seated_;
            lock.unlock();
            draw_pieces();
            lock.lock();
            if (--seated_ == 0) done_.notify_one();
        }
    }

    void draw_pieces() {
        for (int64_t begin; (begin = next_.fetch_add(grain_)) < count_;)
            (*body_)(begin, std::min(begin + grain_, count_));
    }

    std::mutex turn_;   // held by the one caller whose loop the workers help with
    std::mutex mutex_;  // guards all below but next_
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    const std::function<void(int64_t, int64_t)>* body_ = nullptr;
    int64_t count_ = 0, grain_ = 1;
    std::atomic<int64_t> next_{0};
    int free_seats_ = 0, seated_ = 0;
    uint64_t loop_ = 0;
};

// Never destroyed: sleeping workers hold on to it until the process ends. A fork copies no threads, so the child gets a
// new one.
ThreadPool* pool = [] {
    pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });
    return new ThreadPool;
}();

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
    if (count > 0) pool->run(count, grain, threads, body);
}

}  // namespace osf
