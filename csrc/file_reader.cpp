#include "file_reader.h"

#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>

#include "crc32c.h"
#include "io_threads.h"
#include "page_memory.h"

namespace osf {
namespace {

// A part of one chunk of one piece.
struct Part {
    size_t skip;  // from the job's first byte
    size_t bytes;
    char* data;  // or null
};

// What is read of one chunk: all of it when it is verified, else what the parts span.
struct Job {
    size_t file;
    uint64_t offset;
    size_t bytes;
    std::vector<Part> parts;
};

std::string base_name(const std::string& path) {
    return path.substr(path.rfind('/') + 1);
}

class Reader {
  public:
    Reader(SystemCalls& calls, const std::vector<InputFile>& files, const std::vector<ReadPiece>& pieces,
           const IoOptions& options, bool verify_all)
        : calls_(calls), files_(files), pieces_(pieces), options_(options), verify_all_(verify_all) {}

    IoReport run(const std::function<void()>& poll) {
        options_.check();
        check_arguments();
        list_jobs();
        open_files();
        size_buffers();

        const Crew crew = crew_for(options_, jobs_.size(), 1);
        report_.engine = crew.engine;
        report_.fallback = crew.fallback;
        JobQueue queue(jobs_.size());
        run_threads(crew.threads, queue, [&](size_t thread) { work(queue, crew.slots, crew.ring(thread)); }, poll);
        queue.rethrow();

        report_.direct = options_.direct;
        for (const auto& file : open_)
            if (file) note_direct(*file, report_);
        report_.bytes = bytes_;
        return std::move(report_);
    }

  private:
    struct Slot {
        size_t job = 0;
        Transfer transfer;
        char* buffer = nullptr;
        size_t lead = 0;  // bytes read before the job's first
    };

    uint64_t chunks_of(uint64_t bytes) const { return (bytes + options_.chunk_bytes - 1) / options_.chunk_bytes; }

    void check_arguments() const {
        for (const InputFile& file : files_)
            if (!file.crc32c.empty() && file.crc32c.size() != chunks_of(file.bytes))
                throw std::invalid_argument(file.path + ": " + std::to_string(file.crc32c.size()) + " checksums for " +
                                            std::to_string(chunks_of(file.bytes)) + " chunks");
        for (const ReadPiece& piece : pieces_) {
            if (piece.file >= files_.size())
                throw std::invalid_argument("a piece is of file " + std::to_string(piece.file) + " of " +
                                            std::to_string(files_.size()));
            const InputFile& file = files_[piece.file];
            if (piece.offset > file.bytes || piece.bytes > file.bytes - piece.offset)
                throw std::invalid_argument(file.path + ": a piece of " + std::to_string(piece.bytes) + " bytes at " +
                                            std::to_string(piece.offset) + " is not inside its " +
                                            std::to_string(file.bytes) + " bytes");
        }
    }

    void list_jobs() {
        std::map<std::pair<size_t, uint64_t>, std::vector<Part>> touched;  // file and chunk; skip is the file's offset
        for (const ReadPiece& piece : pieces_) {
            const uint64_t end = piece.offset + piece.bytes;
            for (uint64_t at = piece.offset; at < end;) {
                const uint64_t chunk = at / options_.chunk_bytes;
                const size_t bytes = std::min(end, (chunk + 1) * options_.chunk_bytes) - at;
                char* const data = piece.data == nullptr ? nullptr : piece.data + (at - piece.offset);
                touched[{piece.file, chunk}].push_back({static_cast<size_t>(at), bytes, data});
                at += bytes;
            }
        }
        if (verify_all_)
            for (size_t file = 0; file < files_.size(); ++file)
                for (uint64_t chunk = 0; chunk < files_[file].crc32c.size(); ++chunk) touched[{file, chunk}];
        for (auto& [where, parts] : touched) {
            const InputFile& file = files_[where.first];
            uint64_t begin = where.second * options_.chunk_bytes;
            uint64_t end = std::min(file.bytes, begin + options_.chunk_bytes);
            if (file.crc32c.empty()) {
                begin = UINT64_MAX;
                end = 0;
                for (const Part& part : parts) {
                    begin = std::min<uint64_t>(begin, part.skip);
                    end = std::max<uint64_t>(end, part.skip + part.bytes);
                }
            }
            for (Part& part : parts) part.skip -= begin;
            jobs_.push_back({where.first, begin, static_cast<size_t>(end - begin), std::move(parts)});
        }
    }

    void open_files() {
        std::vector<bool> wanted(files_.size(), verify_all_);
        for (const ReadPiece& piece : pieces_) wanted[piece.file] = true;
        open_.resize(files_.size());
        for (size_t i = 0; i < files_.size(); ++i) {
            if (!wanted[i]) continue;
            const InputFile& file = files_[i];
            open_[i] = calls_.open_to_read(file.path);
            struct stat status;
            if (fstat(open_[i]->descriptor(), &status) < 0) throw SystemError(errno, file.path);
            const uint64_t bytes = static_cast<uint64_t>(status.st_size);
            if (!S_ISREG(status.st_mode)) throw Corruption(base_name(file.path) + ": not a file", file.path, 0);
            if (bytes != file.bytes)
                throw Corruption(base_name(file.path) + ": " + std::to_string(bytes) + " bytes instead of " +
                                     std::to_string(file.bytes),
                                 file.path, std::min(bytes, file.bytes));
            if (options_.direct) open_[i]->ask_direct();
        }
    }

    static bool in_place(const Job& job, bool direct) {
        const auto aligned = [&](uint64_t value) { return !direct || value % kPage == 0; };
        return job.parts.size() == 1 && job.parts[0].data != nullptr && job.parts[0].bytes == job.bytes &&
               aligned(job.offset) && aligned(job.bytes) && aligned(reinterpret_cast<uintptr_t>(job.parts[0].data));
    }

    // The most that a job reads elsewhere than in place, with what direct I/O reads before and behind it.
    void size_buffers() {
        for (const Job& job : jobs_)
            if (!in_place(job, open_[job.file]->direct()))
                buffer_bytes_ = std::max(buffer_bytes_, page_up(job.bytes) + 2 * kPage);
    }

    void work(JobQueue& queue, size_t slots, IoRing* ring) {
        const PageMemory memory(slots * buffer_bytes_);
        std::vector<Slot> all(slots);
        std::vector<Slot*> idle;
        for (size_t i = 0; i < slots; ++i) {
            all[i].buffer = memory.data() + i * buffer_bytes_;
            idle.push_back(&all[i]);
        }
        // Last of all: it waits for what is in flight before the slots and their memory go.
        const auto engine = make_engine(calls_, ring, {memory.data(), memory.bytes()});
        while (true) {
            size_t job;
            while (!idle.empty() && queue.take(job)) {
                idle.back()->job = job;
                begin(*idle.back(), *engine);
                idle.pop_back();
            }
            if (idle.size() == slots) return;
            Slot* const slot = static_cast<Slot*>(engine->wait()->owner);
            // Chunks in flight are looked at even after a failure: the first damage is among them.
            try {
                finish(*slot);
            } catch (const Corruption&) {
                queue.fail(slot->job, std::current_exception());
            }
            idle.push_back(slot);
        }
    }

    void begin(Slot& slot, TransferEngine& engine) {
        const Job& job = jobs_[slot.job];
        OpenFile& file = *open_[job.file];
        Transfer& transfer = slot.transfer;
        transfer = Transfer{};
        transfer.file = &file;
        transfer.owner = &slot;
        const bool direct = file.direct();
        const uint64_t begin = direct ? page_down(job.offset) : job.offset;
        slot.lead = static_cast<size_t>(job.offset - begin);
        transfer.offset = begin;
        transfer.data = in_place(job, direct) ? job.parts[0].data : slot.buffer;
        transfer.needed = slot.lead + job.bytes;
        transfer.bytes = direct ? page_up(transfer.needed) : transfer.needed;
        engine.submit(&transfer);
    }

    void finish(Slot& slot) {
        const Job& job = jobs_[slot.job];
        const InputFile& file = files_[job.file];
        const Transfer& transfer = slot.transfer;
        if (transfer.done < transfer.needed)
            throw Corruption(base_name(file.path) + ": ends at " + std::to_string(transfer.offset + transfer.done) +
                                 " instead of " + std::to_string(file.bytes),
                             file.path, transfer.offset + transfer.done);
        const char* const data = transfer.data + slot.lead;
        bytes_.fetch_add(job.bytes, std::memory_order_relaxed);
        if (!file.crc32c.empty() && crc32c(data, job.bytes) != file.crc32c[job.offset / options_.chunk_bytes])
            throw Corruption(base_name(file.path) + ": bytes " + std::to_string(job.offset) + " to " +
                                 std::to_string(job.offset + job.bytes) + " do not match their checksum",
                             file.path, job.offset);
        for (const Part& part : job.parts)
            if (part.data != nullptr && part.data != data) memcpy(part.data, data + part.skip, part.bytes);
    }

    SystemCalls& calls_;
    const std::vector<InputFile>& files_;
    const std::vector<ReadPiece>& pieces_;
    const IoOptions& options_;
    const bool verify_all_;
    std::vector<std::unique_ptr<OpenFile>> open_;
    std::vector<Job> jobs_;
    size_t buffer_bytes_ = 0;  // of a slot
    std::atomic<uint64_t> bytes_{0};
    IoReport report_;
};

}  // namespace

IoReport read_pieces(SystemCalls& calls, const std::vector<InputFile>& files, const std::vector<ReadPiece>& pieces,
                     const IoOptions& options, bool verify_all, const std::function<void()>& poll) {
    return Reader(calls, files, pieces, options, verify_all).run(poll);
}

}  // namespace osf
