// Blocks of one arena, given out and taken back without ever asking the system for more.
//
// A block has one of eight sizes for each doubling, so that blocks of nearly the same size fit into each other's gaps,
// and lies in the smallest gap that holds it. Neighbouring gaps are one gap at once: when everything has come back, the
// arena is one gap again, and the largest block fits. Requests are served in their order, so that a large one is not
// passed over for ever; who takes blocks in the order in which they come back never waits in vain.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

#include "host_memory.h"

namespace osf {

struct PoolStatistics {
    size_t capacity, in_use, peak;    // bytes, of whole blocks
    uint64_t taken, returned, waits;  // blocks; requests that were not served at once and waited
    double wait_seconds;              // of all those that have ended
};

class PinnedPool;
class PoolRequest;

// Room in the arena. It goes back when this is destroyed, from whatever thread; in a forked child nothing happens.
class PoolBlock {
  public:
    PoolBlock(std::shared_ptr<PinnedPool> pool, size_t offset, size_t bytes, size_t asked);
    ~PoolBlock();

    PoolBlock(const PoolBlock&) = delete;
    PoolBlock& operator=(const PoolBlock&) = delete;

    void* address() const;
    size_t offset() const { return offset_; }
    size_t bytes() const { return asked_; }

  private:
    std::shared_ptr<PinnedPool> pool_;
    size_t offset_, bytes_, asked_;
};

class PinnedPool {
  public:
    explicit PinnedPool(std::shared_ptr<HostMemory> memory);

    // What a block of `bytes` takes of the arena.
    static size_t block_bytes(size_t bytes);

    size_t capacity() const { return capacity_; }
    PoolStatistics statistics() const;

  private:
    friend class PoolBlock;
    friend class PoolRequest;

    void give_back(size_t offset, size_t bytes);
    bool find_room(size_t bytes, size_t* offset);

    const std::shared_ptr<HostMemory> memory_;
    const size_t capacity_;
    const pid_t owner_;

    mutable std::mutex mutex_;  // guards all below
    std::condition_variable changed_;
    std::map<size_t, size_t> gaps_;            // offset to bytes
    std::deque<const PoolRequest*> requests_;  // the first is served first
    PoolStatistics statistics_{};
};

// A place in the queue of those who want a block, from construction to destruction.
class PoolRequest {
  public:
    // Throws std::invalid_argument when the arena is smaller or bytes is 0, std::runtime_error in a forked child.
    PoolRequest(std::shared_ptr<PinnedPool> pool, size_t bytes);
    ~PoolRequest();

    PoolRequest(const PoolRequest&) = delete;
    PoolRequest& operator=(const PoolRequest&) = delete;

    // The block, or null when there is none by `deadline`; to be called until there is one, or given up.
    std::unique_ptr<PoolBlock> wait_until(std::chrono::steady_clock::time_point deadline);

  private:
    std::shared_ptr<PinnedPool> pool_;
    size_t bytes_, asked_;
    bool waited_ = false;
    std::chrono::steady_clock::time_point since_;
};

}  // namespace osf
