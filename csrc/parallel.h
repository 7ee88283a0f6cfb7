// Loops spread over threads.
#pragma once

#include <cstdint>
#include <functional>

namespace osf {

// Calls body(begin, end) on pieces of at most `grain` that cover [0, count), from up to `threads` threads, the caller's
// among them, and returns when all is done. body must not throw. Safe to call from any thread and after a fork: a
// second caller runs its loop alone rather than waiting for the first.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace osf
