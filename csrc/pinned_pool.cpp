#include "pinned_pool.h"

#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "common.h"

namespace osf {
namespace {

constexpr size_t kPage = 4096, kClassesPerDoubling = 8;

}  // namespace

PoolBlock::PoolBlock(std::shared_ptr<PinnedPool> pool, size_t offset, size_t bytes, size_t asked)
    : pool_(std::move(pool)), offset_(offset), bytes_(bytes), asked_(asked) {}

PoolBlock::~PoolBlock() {
    pool_->give_back(offset_, bytes_);
}

void* PoolBlock::address() const {
    return static_cast<char*>(pool_->memory_->address()) + offset_;
}

PinnedPool::PinnedPool(std::shared_ptr<HostMemory> memory)
    : memory_(std::move(memory)), capacity_(memory_->bytes() / kPage * kPage), owner_(getpid()) {
    statistics_.capacity = capacity_;
    if (capacity_ > 0) gaps_[0] = capacity_;
}

size_t PinnedPool::block_bytes(size_t bytes) {
    require(bytes > 0 && bytes <= SIZE_MAX / 4, "bytes must be positive, and no larger than an address space");
    size_t doubling = kPage;
    while (doubling <= bytes / 2) doubling *= 2;
    const size_t step = std::max(kPage, doubling / kClassesPerDoubling);
    return (bytes + step - 1) / step * step;
}

PoolStatistics PinnedPool::statistics() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return statistics_;
}

bool PinnedPool::find_room(size_t bytes, size_t* offset) {
    auto best = gaps_.end();
    for (auto gap = gaps_.begin(); gap != gaps_.end(); ++gap) {
        if (gap->second >= bytes && (best == gaps_.end() || gap->second < best->second)) best = gap;
    }
    if (best == gaps_.end()) return false;
    *offset = best->first;
    const size_t left = best->second - bytes;
    gaps_.erase(best);
    if (left > 0) gaps_[*offset + bytes] = left;
    statistics_.in_use += bytes;
    statistics_.peak = std::max(statistics_.peak, statistics_.in_use);
    ++statistics_.taken;
    return true;
}

void PinnedPool::give_back(size_t offset, size_t bytes) {
    if (getpid() != owner_) return;  // the fork may have copied the mutex while it was held
    {
        std::lock_guard<std::mutex> lock(mutex_);
        statistics_.in_use -= bytes;
        ++statistics_.returned;
        const auto after = gaps_.lower_bound(offset);
        const auto before = after == gaps_.begin() ? gaps_.end() : std::prev(after);
        if (after != gaps_.end() && after->first == offset + bytes) {
            bytes += after->second;
            gaps_.erase(after);
        }
        if (before != gaps_.end() && before->first + before->second == offset) {
            before->second += bytes;
        } else {
            gaps_[offset] = bytes;
        }
    }
    changed_.notify_all();
}

PoolRequest::PoolRequest(std::shared_ptr<PinnedPool> pool, size_t bytes)
    : pool_(std::move(pool)), bytes_(PinnedPool::block_bytes(bytes)), asked_(bytes) {
    if (getpid() != pool_->owner_) throw std::runtime_error("a pool gives no blocks to a forked process");
    require(bytes_ <= pool_->capacity_, "the pool is smaller than the block");
    std::lock_guard<std::mutex> lock(pool_->mutex_);
    pool_->requests_.push_back(this);
    since_ = std::chrono::steady_clock::now();
}

PoolRequest::~PoolRequest() {
    if (getpid() != pool_->owner_) return;
    {
        std::lock_guard<std::mutex> lock(pool_->mutex_);
        auto& requests = pool_->requests_;
        requests.erase(std::find(requests.begin(), requests.end(), this));
        if (waited_) {
            const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - since_;
            pool_->statistics_.wait_seconds += waited.count();
        }
    }
    pool_->changed_.notify_all();  // the next may be served
}

std::unique_ptr<PoolBlock> PoolRequest::wait_until(std::chrono::steady_clock::time_point deadline) {
    size_t offset = 0;
    const auto served = [&] { return pool_->requests_.front() == this && pool_->find_room(bytes_, &offset); };
    {
        std::unique_lock<std::mutex> lock(pool_->mutex_);
        if (!served()) {
            if (deadline <= std::chrono::steady_clock::now()) return nullptr;
            if (!waited_) ++pool_->statistics_.waits;
            waited_ = true;
            if (!pool_->changed_.wait_until(lock, deadline, served)) return nullptr;
        }
    }
    return std::make_unique<PoolBlock>(pool_, offset, bytes_, asked_);
}

}  // namespace osf
