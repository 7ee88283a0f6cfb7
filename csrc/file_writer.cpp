#include "file_writer.h"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "crc32c.h"
#include "io_threads.h"
#include "page_memory.h"

namespace osf {
namespace {

constexpr size_t kMostPieces = 8;           // a chunk of more pieces is gathered into one
constexpr size_t kMostTransfers = kMostPieces + 1;
constexpr size_t kGatherStep = 256 * 1024;  // copied and summed while it is in the cache

constexpr int kNicer = 15;  // a share of 3 % where others want the whole processor

struct OutputFile {
    std::unique_ptr<OpenFile> file;
    uint64_t bytes = 0;
    bool padded = false;           // written in whole pages, the last one filled with zeros
    std::vector<uint64_t> starts;  // of the extents in the file
    std::atomic<size_t> chunks_left{0};
};

struct Chunk {
    size_t image, index;
    uint64_t offset;
    size_t bytes;
};

// The memory that a chunk's bytes lie in; neighbours in memory are one piece.
std::vector<Extent> pieces_of(const Chunk& chunk, const Image& image, const std::vector<uint64_t>& starts) {
    std::vector<Extent> pieces;
    const uint64_t end = chunk.offset + chunk.bytes;
    size_t i = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), chunk.offset) - starts.begin()) - 1;
    for (uint64_t at = chunk.offset; at < end; ++i) {
        const Extent& extent = image.extents[i];
        const uint64_t skip = at - starts[i];
        const uint64_t bytes = std::min(extent.bytes - skip, end - at);
        if (bytes == 0) continue;
        const char* const data = extent.data + skip;
        if (!pieces.empty() && pieces.back().data + pieces.back().bytes == data) {
            pieces.back().bytes += bytes;
        } else {
            pieces.push_back({data, bytes});
        }
        at += bytes;
    }
    return pieces;
}

// Whether the pieces can be written from where they are.
bool straight(const std::vector<Extent>& pieces, bool padded) {
    if (pieces.size() > kMostPieces) return false;
    if (!padded) return true;
    for (size_t i = 0; i < pieces.size(); ++i) {
        if (reinterpret_cast<uintptr_t>(pieces[i].data) % kPage != 0) return false;
        if (pieces[i].bytes % kPage != 0 && i + 1 < pieces.size()) return false;
    }
    return true;
}

class Writer {
  public:
    Writer(SystemCalls& calls, const std::vector<Image>& images, const IoOptions& options)
        : calls_(calls), images_(images), options_(options), files_(images.size()) {}

    IoReport run() {
        options_.check();
        create_files();
        list_chunks();

        const Crew crew = crew_for(options_, chunks_.size(), kMostTransfers);
        report_.engine = crew.engine;
        report_.fallback = crew.fallback;
        JobQueue queue(chunks_.size());
        run_threads(crew.threads, queue, [&](size_t thread) { work(queue, crew.slots, crew.ring(thread)); }, {});
        queue.rethrow();

        report_.direct = options_.direct;
        for (const OutputFile& out : files_) note_direct(*out.file, report_);
        return std::move(report_);
    }

  private:
    // A chunk in flight: its pieces as transfers, and the buffers for what cannot be written from where it is.
    struct Slot {
        const Chunk* chunk = nullptr;
        size_t transfers_left = 0;
        Transfer transfers[kMostTransfers];
        char* last_page = nullptr;
        char* gathered = nullptr;
    };

    void create_files() {
        report_.crc32c.resize(images_.size());
        for (size_t i = 0; i < images_.size(); ++i) {
            OutputFile& out = files_[i];
            uint64_t at = 0;
            for (const Extent& extent : images_[i].extents) {
                out.starts.push_back(at);
                at += extent.bytes;
            }
            out.bytes = at;
            report_.bytes += at;
            out.file = calls_.create(images_[i].path);
            if (options_.direct) out.file->ask_direct();
            out.padded = out.file->direct();
            if (at > 0) calls_.allocate(*out.file, out.padded ? page_up(at) : at);
        }
    }

    void list_chunks() {
        for (size_t i = 0; i < images_.size(); ++i) {
            const uint64_t bytes = files_[i].bytes;
            for (uint64_t offset = 0; offset < bytes; offset += options_.chunk_bytes) {
                const size_t size = std::min<uint64_t>(options_.chunk_bytes, bytes - offset);
                chunks_.push_back({i, report_.crc32c[i].size(), offset, size});
                report_.crc32c[i].push_back(0);
            }
            files_[i].chunks_left = report_.crc32c[i].size();
            if (bytes == 0) finish_file(i);
        }
        for (const Chunk& chunk : chunks_) {
            const OutputFile& out = files_[chunk.image];
            if (!straight(pieces_of(chunk, images_[chunk.image], out.starts), out.padded))
                gathered_bytes_ = std::max(gathered_bytes_, page_up(chunk.bytes));
        }
    }

    void work(JobQueue& queue, size_t slots, IoRing* ring) {
        // Of this thread alone, on Linux. A save in the background leaves the processor to who computes.
        setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + kNicer);
        const PageMemory memory(slots * (kPage + gathered_bytes_));
        const Span gathered{memory.data() + slots * kPage, slots * gathered_bytes_};
        std::vector<Slot> all(slots);
        std::vector<Slot*> idle;
        for (size_t i = 0; i < slots; ++i) {
            all[i].last_page = memory.data() + i * kPage;
            all[i].gathered = gathered.data + i * gathered_bytes_;
            idle.push_back(&all[i]);
        }
        // Last of all: it waits for what is in flight before the slots and their memory go.
        const auto engine = make_engine(calls_, ring, gathered);
        while (true) {
            size_t job;
            while (!idle.empty() && queue.take(job)) {
                begin(*idle.back(), chunks_[job], *engine);
                idle.pop_back();
            }
            if (idle.size() == slots) return;
            Slot* const slot = static_cast<Slot*>(engine->wait()->owner);
            if (--slot->transfers_left > 0) continue;
            const size_t image = slot->chunk->image;
            if (files_[image].chunks_left.fetch_sub(1) == 1) finish_file(image);
            idle.push_back(slot);
        }
    }

    void begin(Slot& slot, const Chunk& chunk, TransferEngine& engine) {
        OutputFile& out = files_[chunk.image];
        slot.chunk = &chunk;
        slot.transfers_left = 0;
        const std::vector<Extent> pieces = pieces_of(chunk, images_[chunk.image], out.starts);
        const auto add = [&](uint64_t offset, const char* data, size_t bytes) {
            Transfer& transfer = slot.transfers[slot.transfers_left++];
            transfer = Transfer{};
            transfer.file = out.file.get();
            transfer.write = true;
            transfer.offset = offset;
            transfer.data = const_cast<char*>(data);  // only a read writes there
            transfer.bytes = transfer.needed = bytes;
            transfer.owner = &slot;
        };
        uint32_t crc = 0;
        const bool gather = !straight(pieces, out.padded);
        if (gather) {
            size_t at = 0;
            for (const Extent& piece : pieces) {
                for (uint64_t from = 0; from < piece.bytes; from += kGatherStep) {
                    const size_t bytes = std::min<uint64_t>(kGatherStep, piece.bytes - from);
                    memcpy(slot.gathered + at, piece.data + from, bytes);
                    crc = crc32c(slot.gathered + at, bytes, crc);
                    at += bytes;
                }
            }
            const size_t whole = out.padded ? page_up(at) : at;
            memset(slot.gathered + at, 0, whole - at);
            add(chunk.offset, slot.gathered, whole);
        } else {
            uint64_t offset = chunk.offset;
            for (const Extent& piece : pieces) {
                const size_t rest = out.padded ? piece.bytes % kPage : 0;
                if (piece.bytes > rest) add(offset, piece.data, piece.bytes - rest);
                if (rest > 0) {
                    memcpy(slot.last_page, piece.data + piece.bytes - rest, rest);
                    memset(slot.last_page + rest, 0, kPage - rest);
                    add(offset + piece.bytes - rest, slot.last_page, kPage);
                }
                offset += piece.bytes;
            }
        }
        const size_t transfers = slot.transfers_left;
        for (size_t i = 0; i < transfers; ++i) engine.submit(&slot.transfers[i]);
        // While the device reads the same memory.
        if (!gather)
            for (const Extent& piece : pieces) crc = crc32c(piece.data, piece.bytes, crc);
        report_.crc32c[chunk.image][chunk.index] = crc;
    }

    void finish_file(size_t image) {
        const OutputFile& out = files_[image];
        if (out.padded && out.bytes % kPage != 0) calls_.truncate(*out.file, out.bytes);
        calls_.sync(*out.file);
        out.file->close();
    }

    SystemCalls& calls_;
    const std::vector<Image>& images_;
    const IoOptions& options_;
    std::vector<OutputFile> files_;
    std::vector<Chunk> chunks_;
    size_t gathered_bytes_ = 0;  // of the largest chunk that is gathered
    IoReport report_;
};

}  // namespace

IoReport write_images(SystemCalls& calls, const std::vector<Image>& images, const IoOptions& options) {
    return Writer(calls, images, options).run();
}

}  // namespace osf
