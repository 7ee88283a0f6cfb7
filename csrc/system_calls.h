// The operating system's calls on files and folders, made so that a test can stop, bend or record each one. Everything
// durable that a checkpoint does goes through a SystemCalls; EINTR is retried here, all other errors are thrown.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace osf {

constexpr size_t kPage = 4096;  // what addresses, offsets and sizes of direct I/O are multiples of

constexpr size_t page_down(size_t bytes) {
    return bytes / kPage * kPage;
}
constexpr size_t page_up(size_t bytes) {
    return page_down(bytes + kPage - 1);
}

constexpr const char* kRefused = "O_DIRECT refused by the file system (EINVAL)";

// An errno and the path (for a rename both paths) that it came from.
class SystemError : public std::exception {
  public:
    SystemError(int error, std::string path, std::string second_path = {});
    const char* what() const noexcept override { return message_.c_str(); }

    const int error;
    const std::string path, second_path;

  private:
    std::string message_;
};

// One call that succeeded. `name` is mkdir, create, allocate, write, truncate, sync, sync_folder, rename, remove or
// remove_folder; `bytes` is the size of an allocate or truncate, `content` what a write wrote at `offset`.
struct RecordedCall {
    std::string name, path, second_path;
    uint64_t offset = 0, bytes = 0;
    std::string content;
};

// A test's hold on the calls, which it numbers from 0. The calls [at, at + times) meet with `action`: "fail" (not made,
// `error` is their errno), "short" (a read or write moves only a part, never a multiple of 512 bytes), "kill" (the
// process ends before the call) or "kill_inside" (it ends when half of a write is done; before any other call).
class CallScript {
  public:
    CallScript(bool record, int64_t at, const std::string& action, int error, int64_t times);

    // What a call meets with; killing is done here, but for a write that is to be killed inside.
    struct Verdict {
        int error = 0;
        bool shorten = false, kill_inside = false;
    };
    enum class Kind { kRead, kWrite, kOther };
    Verdict next(Kind kind);

    bool records() const { return record_; }
    void record(RecordedCall call);
    int64_t count() const;
    std::vector<RecordedCall> calls() const;

  private:
    enum class Action { kNone, kFail, kShort, kKill, kKillInside };

    const bool record_;
    const int64_t at_, times_;
    Action action_ = Action::kNone;
    const int error_;
    mutable std::mutex mutex_;  // guards the rest
    int64_t count_ = 0;
    std::vector<RecordedCall> calls_;
};

[[noreturn]] void kill_own_process();

// A descriptor and its path, closed with the object. Direct I/O bypasses the page cache; several threads may find at
// once that it cannot go on.
class OpenFile {
  public:
    OpenFile(std::string path, int descriptor) : path(std::move(path)), descriptor_(descriptor) {}
    ~OpenFile();
    OpenFile(const OpenFile&) = delete;
    OpenFile& operator=(const OpenFile&) = delete;

    int descriptor() const { return descriptor_; }
    bool direct() const { return direct_; }
    void ask_direct();                     // or be buffered, where the file system refuses
    void drop_direct(const char* reason);  // reads and writes go through the page cache from here on
    std::string not_direct() const;        // why a file that was asked to be direct is not, or ""
    void close();                          // throws SystemError

    const std::string path;

  private:
    int descriptor_;
    std::atomic<bool> direct_{false};
    std::atomic<const char*> reason_{""};
};

class SystemCalls {
  public:
    explicit SystemCalls(std::shared_ptr<CallScript> script) : script_(std::move(script)) {}

    void make_folder(const std::string& path);
    void sync_folder(const std::string& path);
    void rename(const std::string& from, const std::string& to);
    void remove_file(const std::string& path);
    void remove_folder(const std::string& path);

    // A new file; an existing one is an error.
    std::unique_ptr<OpenFile> create(const std::string& path);
    std::unique_ptr<OpenFile> open_to_read(const std::string& path);
    // Sets the size and the space aside. False where the file system cannot.
    bool allocate(const OpenFile& file, uint64_t bytes);
    void truncate(const OpenFile& file, uint64_t bytes);
    void sync(const OpenFile& file);  // the data, and what it takes to find it again

    // For the one who makes the calls that move data (transfer.h).
    CallScript::Verdict next(CallScript::Kind kind) { return script_ ? script_->next(kind) : CallScript::Verdict{}; }
    void record_write(const std::string& path, uint64_t offset, const char* data, size_t bytes);

  private:
    template <class Body>
    int attempt(Body body);
    void record(const char* name, const std::string& path, uint64_t bytes = 0, const std::string& second_path = {});

    const std::shared_ptr<CallScript> script_;
};

}  // namespace osf
