// Host memory, the pool and the collator: the same calls from many threads, and what each of them promises.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <system_error>
#include <thread>
#include <vector>

#include "check.h"
#include "collate.h"
#include "common.h"
#include "copy_pieces.h"
#include "host_memory.h"
#include "pinned_pool.h"

using namespace osf;
using Clock = std::chrono::steady_clock;

namespace {

constexpr size_t kPage = 4096, kMiB = size_t{1} << 20;

// Far enough away that who is not woken does not finish.
Clock::time_point far_away() {
    return Clock::now() + std::chrono::hours(1);
}

bool is_mapped(const void* address) {
    return msync(const_cast<void*>(address), kPage, MS_ASYNC) == 0;
}

void test_memory_is_zero_aligned_and_goes() {
    for (const bool shared : {false, true}) {
        for (const size_t bytes : {size_t{1}, 3 * kMiB + 5, 70 * kMiB}) {
            bool mapped_at_release = false;
            const char* data;
            {
                HostMemory memory(bytes, shared, 3);
                data = static_cast<const char*>(memory.address());
                CHECK(reinterpret_cast<uintptr_t>(data) % (2 * kMiB) == 0);
                CHECK(memory.bytes() == bytes);
                CHECK((memory.descriptor() >= 0) == shared);
                for (size_t i = 0; i < bytes; ++i) CHECK(data[i] == 0);
                memset(memory.address(), 1, bytes);
                memory.before_release([&] { mapped_at_release = is_mapped(data); });
            }
            CHECK(mapped_at_release);
            CHECK(!is_mapped(data));
        }
    }
}

void test_memory_is_shared() {
    HostMemory memory(kMiB, true, 1);
    HostMemory attached(memory.descriptor(), kMiB - 7);
    CHECK(attached.address() != memory.address());
    static_cast<char*>(memory.address())[5] = 9;
    CHECK(static_cast<char*>(attached.address())[5] == 9);
    CHECK(ftruncate(attached.descriptor(), 0) != 0);
}

void test_memory_that_cannot_be_had() {
    HostMemory memory(kMiB, true, 1);
    CHECK_THROWS(std::invalid_argument, HostMemory(0, false, 1));
    CHECK_THROWS(std::invalid_argument, HostMemory(SIZE_MAX, false, 1));
    CHECK_THROWS(std::system_error, HostMemory(size_t{1} << 60, false, 1));
    CHECK_THROWS(std::system_error, HostMemory(size_t{1} << 60, true, 1));
    CHECK_THROWS(std::system_error, HostMemory(-1, kMiB));
    CHECK_THROWS(std::invalid_argument, HostMemory(memory.descriptor(), kMiB + 1));
}

void test_copies() {
    std::mt19937_64 random(1);
    for (int round = 0; round < 40; ++round) {
        std::vector<size_t> sizes(random() % 12);
        size_t total = 64;
        for (size_t& size : sizes) total += size = random() % (round % 2 == 0 ? 300 : 900'000);
        std::vector<char> source(total), target(total, 3), wanted(total, 3);
        for (char& byte : source) byte = static_cast<char>(random());
        std::vector<CopyPiece> pieces;
        size_t to = random() % 64, from = total - random() % 64;
        if (!sizes.empty()) to = 1, from = total - 1;
        for (const size_t size : sizes) {
            from -= size;
            pieces.push_back({target.data() + to, source.data() + from, size});
            memcpy(wanted.data() + to, source.data() + from, size);
            to += size;
        }
        copy_pieces(pieces, 1 + round % 4);
        CHECK(target == wanted);
    }
}

std::shared_ptr<PinnedPool> pool_of(size_t bytes) {
    return std::make_shared<PinnedPool>(std::make_shared<HostMemory>(bytes, false, 1));
}

std::unique_ptr<PoolBlock> take(const std::shared_ptr<PinnedPool>& pool, size_t bytes, Clock::time_point deadline) {
    return PoolRequest(pool, bytes).wait_until(deadline);
}

void test_threads_share_the_pool() {
    const auto pool = pool_of(2 * kMiB);
    std::vector<std::thread> threads;
    for (int id = 1; id <= 4; ++id) {
        threads.emplace_back([&pool, id] {
            std::mt19937 random(id);
            for (int i = 0; i < 400; ++i) {
                const size_t bytes = 1 + random() % kMiB;
                const auto block = take(pool, bytes, far_away());
                CHECK(block->bytes() == bytes);
                char* data = static_cast<char*>(block->address());
                memset(data, id, bytes);
                for (size_t at = 0; at < bytes; at += 997) CHECK(data[at] == id);
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    const PoolStatistics now = pool->statistics();
    CHECK(now.taken == 1600 && now.returned == 1600 && now.in_use == 0 && now.peak <= now.capacity);
    CHECK(take(pool, 2 * kMiB, Clock::now()));
}

// Takes in one thread what another gives back: nobody looks again by himself, so each must be woken.
void test_who_waits_is_woken() {
    const auto pool = pool_of(kMiB);
    for (int round = 0; round < 200; ++round) {
        auto block = take(pool, kMiB, Clock::now());
        CHECK(block);
        std::thread waiting([&] { CHECK(take(pool, kMiB, far_away())); });
        while (pool->statistics().waits <= static_cast<uint64_t>(round)) std::this_thread::yield();
        block.reset();
        waiting.join();
    }
}

void test_requests_are_served_in_their_order() {
    const auto pool = pool_of(4 * kMiB);
    auto block = take(pool, kMiB, Clock::now());
    PoolRequest large(pool, 4 * kMiB);
    CHECK(!large.wait_until(Clock::now()));
    {
        PoolRequest small(pool, kMiB);
        CHECK(!small.wait_until(Clock::now()));  // there is room, but it is not its turn
        PoolRequest another(pool, kMiB);
        block.reset();
        CHECK(!another.wait_until(Clock::now()));
    }
    CHECK(large.wait_until(Clock::now()));
    CHECK(pool->statistics().waits == 0);  // nobody had the time
}

void test_who_gives_up_wakes_the_next() {
    const auto pool = pool_of(2 * kMiB);
    const auto block = take(pool, kMiB, Clock::now());
    auto large = std::make_unique<PoolRequest>(pool, 2 * kMiB);
    CHECK(!large->wait_until(Clock::now()));
    std::thread next([&] { CHECK(take(pool, kMiB, far_away())); });
    while (pool->statistics().waits == 0) std::this_thread::yield();
    large.reset();
    next.join();
}

void test_blocks_outlive_their_pool() {
    auto pool = pool_of(kMiB);
    const auto block = take(pool, 3 * kPage, Clock::now());
    pool.reset();
    memset(block->address(), 1, block->bytes());
}

void test_pool_refuses() {
    const auto pool = pool_of(kMiB);
    CHECK_THROWS(std::invalid_argument, PoolRequest(pool, kMiB + 1));
    CHECK_THROWS(std::invalid_argument, PoolRequest(pool, 0));
    CHECK_THROWS(std::invalid_argument, PoolRequest(pool, SIZE_MAX));
}

struct Clips {
    std::vector<std::vector<uint8_t>> pixels;
    std::vector<ClipPixels> clips;
};

Clips random_clips(size_t batch, const BatchShape& shape, unsigned seed) {
    std::mt19937 random(seed);
    Clips made;
    for (size_t i = 0; i < batch; ++i) {
        const int top = random() % 4, left = random() % 4;
        const int height = top + shape.height + random() % 4, width = left + shape.width + random() % 4;
        auto& pixels = made.pixels.emplace_back(size_t{3} * shape.frames * height * width);
        for (uint8_t& value : pixels) value = static_cast<uint8_t>(random());
        made.clips.push_back({pixels.data(), height, width, shape.frames, top, left});
    }
    return made;
}

template <class T>
void check_batch(const std::vector<ClipPixels>& clips, const BatchShape& shape, const T* out) {
    for (const ClipPixels& clip : clips) {
        for (int c = 0; c < 3; ++c) {
            for (int t = 0; t < shape.frames; ++t) {
                for (int y = 0; y < shape.height; ++y) {
                    for (int x = 0; x < shape.width; ++x, ++out) {
                        const size_t row = (size_t{1} * t * clip.height + clip.top + y) * clip.width + clip.left + x;
                        const T wanted = from_float<T>(static_cast<float>(clip.pixels[row * 3 + c]) / 127.5f - 1.0f);
                        CHECK(memcmp(out, &wanted, sizeof wanted) == 0);
                    }
                }
            }
        }
    }
}

template <class T>
void test_batches_of(const char* dtype) {
    for (const int threads : {1, 3}) {
        Collator collator(threads);
        unsigned seed = 1;
        for (const auto& [frames, height, width] : {BatchShape{1, 1, 1}, {3, 5, 16}, {2, 4, 67}, {2, 3, 600}}) {
            const BatchShape shape{frames, height, width};
            const Clips source = random_clips(2, shape, seed++);
            std::vector<T> out(size_t{2} * 3 * frames * height * width + 1, T{});
            CHECK(collator.submit(source.clips, out.data(), shape, dtype)->wait_until(far_away()));
            check_batch(source.clips, shape, out.data());
        }
    }
}

// Many submit at once; some wait, some drop the ticket, and the last batches are completed by close().
void test_collator_is_shared() {
    const BatchShape shape{5, 24, 32};
    const Clips source = random_clips(2, shape, 5);
    const size_t count = size_t{2} * 3 * 5 * 24 * 32;
    Collator collator(2);
    std::vector<std::thread> threads;
    for (int id = 0; id < 3; ++id) {
        threads.emplace_back([&, id] {
            for (int i = 0; i < 40; ++i) {
                std::vector<float> out(count);
                auto ticket = collator.submit(source.clips, out.data(), shape, "float32");
                if ((i + id) % 2 == 0) CHECK(ticket->wait_until(far_away()));
                ticket.reset();
                check_batch(source.clips, shape, out.data());
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    std::vector<float> out(count);
    const auto ticket = collator.submit(source.clips, out.data(), shape, "float32");
    collator.close();
    CHECK(ticket->wait_until(Clock::now()));
    check_batch(source.clips, shape, out.data());
    CHECK_THROWS(std::runtime_error, collator.submit(source.clips, out.data(), shape, "float32"));
    collator.close();
}

void test_collator_refuses() {
    Collator collator(1);
    std::vector<float> out(3 * 2 * 4 * 4);
    const std::vector<uint8_t> pixels(3 * 2 * 5 * 5);
    const BatchShape shape{2, 4, 4};
    const auto refuses = [&](ClipPixels clip, const BatchShape& wanted, const char* dtype) {
        CHECK_THROWS(std::invalid_argument, collator.submit({clip}, out.data(), wanted, dtype));
    };
    refuses({pixels.data(), 5, 5, 1, 0, 0}, shape, "float32");
    refuses({pixels.data(), 5, 5, 2, 2, 0}, shape, "float32");
    refuses({pixels.data(), 5, 5, 2, 0, 2}, shape, "float32");
    refuses({pixels.data(), 5, 5, 2, -1, 0}, shape, "float32");
    refuses({pixels.data(), 5, 5, 2, 0, 0}, {2, 0, 4}, "float32");
    refuses({pixels.data(), 5, 5, 2, 0, 0}, shape, "int8");
    CHECK_THROWS(std::invalid_argument, collator.submit({}, out.data(), shape, "float32"));
    CHECK_THROWS(std::invalid_argument, Collator(0));
}

#if !defined(__SANITIZE_THREAD__)  // which does not follow threads across a fork
// A child that lets go of everything, while threads of the parent wait and work, neither hangs nor takes anything.
void test_a_forked_child_changes_nothing() {
    bool released = false;
    auto memory = std::make_unique<HostMemory>(kMiB, false, 1);
    memory->before_release([&] { released = true; });
    auto pool = pool_of(kMiB);
    auto block = take(pool, kMiB, Clock::now());
    memset(block->address(), 7, kMiB);
    auto collator = std::make_unique<Collator>(2);
    const BatchShape shape{40, 64, 64};
    const Clips source = random_clips(1, shape, 3);
    std::vector<float> out(size_t{3} * 40 * 64 * 64);
    auto ticket = collator->submit(source.clips, out.data(), shape, "float32");
    std::thread waiting([&] { CHECK(take(pool, kMiB, far_away())); });
    while (pool->statistics().waits == 0) std::this_thread::yield();

    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        CHECK_THROWS(std::runtime_error, PoolRequest(pool, 1));
        CHECK_THROWS(std::runtime_error, ticket->wait_until(Clock::now()));
        CHECK_THROWS(std::runtime_error, collator->submit(source.clips, out.data(), shape, "float32"));
        block.reset();
        pool.reset();
        memory.reset();
        ticket.reset();
        collator.reset();
        CHECK(!released);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(!released);
    for (size_t i = 0; i < kMiB; ++i) CHECK(static_cast<char*>(block->address())[i] == 7);
    CHECK(ticket->wait_until(far_away()));
    check_batch(source.clips, shape, out.data());
    block.reset();
    waiting.join();
    CHECK(pool->statistics().in_use == 0);
    memory.reset();
    CHECK(released);
}

// A fork copies the pool's lock as it is at that moment: held by a thread that is not there in the child.
void test_children_of_a_busy_process_do_not_hang() {
    const auto pool = pool_of(kMiB);
    auto block = take(pool, kPage, far_away());
    std::atomic<bool> stop{false};
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i) {
        threads.emplace_back([&] {
            while (!stop) take(pool, kPage, far_away());
        });
    }
    for (int i = 0; i < 300; ++i) {
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            block.reset();
            _exit(0);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child && status == 0);
    }
    stop = true;
    for (std::thread& thread : threads) thread.join();
}
#endif

}  // namespace

int main() {
    test_memory_is_zero_aligned_and_goes();
    test_memory_is_shared();
    test_memory_that_cannot_be_had();
    test_copies();
    test_threads_share_the_pool();
    test_who_waits_is_woken();
    test_requests_are_served_in_their_order();
    test_who_gives_up_wakes_the_next();
    test_blocks_outlive_their_pool();
    test_pool_refuses();
    test_batches_of<float>("float32");
    test_batches_of<BFloat16>("bfloat16");
    test_batches_of<Float16>("float16");
    test_collator_is_shared();
    test_collator_refuses();
#if !defined(__SANITIZE_THREAD__)
    test_a_forked_child_changes_nothing();
    test_children_of_a_busy_process_do_not_hang();
#endif
    puts("test_memory: passed");
    return 0;
}
