#include "io_options.h"

#include <algorithm>
#include <stdexcept>

namespace osf {

void IoOptions::check() const {
    if (chunk_bytes == 0 || chunk_bytes % kPage != 0 || chunk_bytes > size_t{1} << 30)
        throw std::invalid_argument("chunk_bytes is " + std::to_string(chunk_bytes) +
                                    "; it must be a multiple of 4096 up to 1 GiB");
    if (depth < 1 || depth > 256)
        throw std::invalid_argument("depth is " + std::to_string(depth) + "; it must be 1 to 256");
    if (threads < 1 || threads > 256)
        throw std::invalid_argument("threads is " + std::to_string(threads) + "; it must be 1 to 256");
    if (engine != "auto" && engine != "io_uring" && engine != "pwrite")
        throw std::invalid_argument("engine is " + engine + "; it must be auto, io_uring or pwrite");
}

void note_direct(const OpenFile& file, IoReport& report) {
    const std::string reason = file.not_direct();
    if (report.direct && !reason.empty()) report.fallback += (report.fallback.empty() ? "" : "; ") + reason;
    report.direct = report.direct && file.direct();
}

Crew crew_for(const IoOptions& options, size_t jobs, size_t transfers) {
    const size_t in_flight = std::max<size_t>(1, std::min(static_cast<size_t>(options.depth), jobs));
    Crew serial{"pwrite", "", in_flight, 1, {}};
    if (options.engine == "pwrite") return serial;
    const size_t threads = std::min(static_cast<size_t>(options.threads), in_flight);
    Crew crew{"io_uring", "", threads, (in_flight + threads - 1) / threads, {}};
    try {
        while (crew.rings.size() < threads)
            crew.rings.push_back(std::make_unique<IoRing>(static_cast<unsigned>(crew.slots * transfers)));
    } catch (const RingRefused& refused) {
        serial.fallback = std::string("no io_uring: ") + refused.what();
        return serial;
    }
    return crew;
}

}  // namespace osf
