// When a system call that failed is worth another attempt.
#pragma once

#include <unistd.h>

#include <cerrno>

namespace osf {

class BackOff {
  public:
    // True at once after an interruption. True after a pause where the kernel lacks room (EAGAIN, EBUSY): 30 times, in
    // two seconds altogether. False for everything else.
    bool again(int error) {
        if (error == EINTR) return true;
        if ((error != EAGAIN && error != EBUSY) || pauses_ == kMostPauses) return false;
        usleep(pauses_ < kDoublings ? kFirst << pauses_ : kFirst << kDoublings);
        ++pauses_;
        return true;
    }

  private:
    static constexpr int kMostPauses = 30, kDoublings = 10;
    static constexpr useconds_t kFirst = 100;  // microseconds

    int pauses_ = 0;
};

}  // namespace osf
