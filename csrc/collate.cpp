#include "collate.h"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>

#include "common.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace osf {
namespace {

constexpr const char* kNoThreads = "a collator's threads are not there in a forked process";

constexpr int kRun = 256;  // pixels of a row that are in the first-level cache at a time

// 2 / 255 in two parts. A pixel times the first is exact, so that the sum is rounded once: the bits of the division,
// for all 256 values, at a fraction of its cost.
constexpr float kScaleHigh = 0x1.01p-7f, kScaleLow = 0x1.010102p-23f;

template <class T>
inline T normalized(uint8_t pixel) {
    const float value = static_cast<float>(pixel);
    return from_float<T>((value * kScaleHigh + value * kScaleLow) - 1.0f);
}

// Three loops over bytes and then three over one plane each: what compilers turn into the best vector code.
template <class T>
OSF_SIMD_CLONES void convert_run(const uint8_t* pixels, int count, T (*run)[kRun]) {
    uint8_t plane[3][kRun];
    for (int i = 0; i < count; ++i) {
        for (int c = 0; c < 3; ++c) plane[c][i] = pixels[3 * i + c];
    }
    for (int c = 0; c < 3; ++c) {
        for (int i = 0; i < count; ++i) run[c][i] = normalized<T>(plane[c][i]);
    }
}

// Past the caches where that is possible: a batch is larger than they are.
inline void store_run(void* to, const void* from, size_t bytes) {
#if defined(__SSE2__)
    if (reinterpret_cast<uintptr_t>(to) % sizeof(__m128i) == 0 && bytes % sizeof(__m128i) == 0) {
        auto* target = static_cast<__m128i*>(to);
        const auto* source = static_cast<const __m128i*>(from);
        for (size_t i = 0; i < bytes / sizeof(__m128i); ++i) _mm_stream_si128(target + i, _mm_load_si128(source + i));
        return;
    }
#endif
    memcpy(to, from, bytes);
}

// One frame into its three places of a clip's out [3, T, H, W].
template <class T>
void collate_frame(const ClipPixels& clip, const BatchShape& shape, int frame, T* out) {
    const int64_t plane = int64_t{shape.height} * shape.width, channel = plane * shape.frames;
    const int64_t source_row = int64_t{clip.width} * 3;
    const uint8_t* source = clip.pixels + (int64_t{frame} * clip.height + clip.top) * source_row + clip.left * 3;
    out += frame * plane;
    for (int y = 0; y < shape.height; ++y, source += source_row, out += shape.width) {
        for (int x = 0; x < shape.width; x += kRun) {
            const int count = std::min(kRun, shape.width - x);
            alignas(64) T run[3][kRun];
            convert_run(source + 3 * x, count, run);
            for (int c = 0; c < 3; ++c) store_run(out + c * channel + x, run[c], count * sizeof(T));
        }
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

template <class T>
void collate_unit(const std::vector<ClipPixels>& clips, void* out, const BatchShape& shape, int64_t unit) {
    const int64_t clip = unit / shape.frames;
    const int64_t sample = int64_t{3} * shape.frames * shape.height * shape.width;
    collate_frame(clips[clip], shape, static_cast<int>(unit % shape.frames), static_cast<T*>(out) + clip * sample);
}

}  // namespace

struct CollateTicket::Work {
    std::vector<ClipPixels> clips;
    void* out;
    BatchShape shape;
    void (*unit)(const std::vector<ClipPixels>&, void*, const BatchShape&, int64_t);  // a frame of a clip
    int64_t units;
    int64_t next = 0;  // guarded by the queue's mutex
    pid_t owner;

    std::mutex mutex;
    std::condition_variable complete;
    int64_t left;  // units; guarded by `mutex`
};

struct Collator::Queue {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::shared_ptr<CollateTicket::Work>> works;  // those with units that nobody has begun
    bool closed = false;
};

CollateTicket::~CollateTicket() {
    if (getpid() != work_->owner) return;
    std::unique_lock<std::mutex> lock(work_->mutex);
    work_->complete.wait(lock, [this] { return work_->left == 0; });
}

bool CollateTicket::wait_until(std::chrono::steady_clock::time_point deadline) {
    if (getpid() != work_->owner) throw std::runtime_error(kNoThreads);
    std::unique_lock<std::mutex> lock(work_->mutex);
    return work_->complete.wait_until(lock, deadline, [this] { return work_->left == 0; });
}

Collator::Collator(int threads) : queue_(new Queue), owner_(getpid()) {
    require(threads >= 1, "threads must be 1 or more");
    try {
        for (int i = 0; i < threads; ++i) threads_.emplace_back(serve, std::ref(*queue_));
    } catch (...) {
        close();
        throw;
    }
}

Collator::~Collator() {
    close();
}

void Collator::serve(Queue& queue) {
    std::unique_lock<std::mutex> lock(queue.mutex);
    while (true) {
        queue.changed.wait(lock, [&] { return queue.closed || !queue.works.empty(); });
        if (queue.works.empty()) return;
        const std::shared_ptr<CollateTicket::Work> work = queue.works.front();
        const int64_t unit = work->next++;
        if (work->next == work->units) queue.works.pop_front();
        lock.unlock();
        work->unit(work->clips, work->out, work->shape, unit);
        {
            std::lock_guard<std::mutex> done(work->mutex);
            if (--work->left == 0) work->complete.notify_all();
        }
        lock.lock();
    }
}

std::unique_ptr<CollateTicket> Collator::submit(std::vector<ClipPixels> clips, void* out, const BatchShape& shape,
                                                const std::string& dtype) {
    if (getpid() != owner_) throw std::runtime_error(kNoThreads);
    require(!clips.empty() && shape.frames > 0 && shape.height > 0 && shape.width > 0, "the batch must not be empty");
    for (const ClipPixels& clip : clips) {
        require(clip.frames == shape.frames, "a clip must have as many frames as the batch");
        require(clip.top >= 0 && clip.left >= 0 && clip.height - clip.top >= shape.height &&
                    clip.width - clip.left >= shape.width,
                "a clip must cover the batch's height and width from its top and left on");
    }
    const auto work = std::make_shared<CollateTicket::Work>();
    work->owner = owner_;
    with_element_type(dtype, [&](auto element) { work->unit = collate_unit<decltype(element)>; });
    work->units = work->left = static_cast<int64_t>(clips.size()) * shape.frames;
    work->clips = std::move(clips);
    work->out = out;
    work->shape = shape;
    std::unique_ptr<CollateTicket> ticket(new CollateTicket(work));
    {
        std::lock_guard<std::mutex> lock(queue_->mutex);
        if (queue_->closed) {
            work->left = 0;
            throw std::runtime_error("the collator is closed");
        }
        queue_->works.push_back(work);
    }
    queue_->changed.notify_all();
    return ticket;
}

void Collator::close() {
    if (getpid() != owner_) {
        // What was copied along with the memory is left as it is: joining or destroying it would wait for ever.
        new std::vector<std::thread>(std::move(threads_));
        queue_.release();
        return;
    }
    {
        std::lock_guard<std::mutex> lock(queue_->mutex);
        queue_->closed = true;
    }
    queue_->changed.notify_all();
    for (std::thread& thread : threads_) {
        if (thread.joinable()) thread.join();
    }
}

}  // namespace osf
