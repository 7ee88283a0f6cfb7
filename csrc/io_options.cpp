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
}

void note_direct(const OpenFile& file, IoReport& report) {
    const std::string reason = file.not_direct();
    if (report.direct && !reason.empty()) report.fallback += (report.fallback.empty() ? "" : "; ") + reason;
    report.direct = report.direct && file.direct();
}

Crew crew_for(const EngineChoice& engine, const IoOptions& options, size_t jobs) {
    const size_t in_flight = std::max<size_t>(1, std::min(static_cast<size_t>(options.depth), jobs));
    const size_t threads =
        engine.name == "pwrite" ? in_flight : std::min(static_cast<size_t>(options.threads), in_flight);
    return {threads, (in_flight + threads - 1) / threads};
}

}  // namespace osf
