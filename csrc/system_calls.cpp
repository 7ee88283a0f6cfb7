#include "system_calls.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace osf {

SystemError::SystemError(int error, std::string path, std::string second_path)
    : error(error), path(std::move(path)), second_path(std::move(second_path)) {
    message_ = this->path + ": " + strerror(error);
}

CallScript::CallScript(bool record, int64_t at, const std::string& action, int error, int64_t times)
    : record_(record), at_(at), times_(times), error_(error) {
    if (action == "fail") action_ = Action::kFail;
    if (action == "short") action_ = Action::kShort;
    if (action == "kill") action_ = Action::kKill;
    if (action == "kill_inside") action_ = Action::kKillInside;
    if (action_ == Action::kNone && !action.empty())
        throw std::invalid_argument("action is " + action + "; it must be fail, short, kill or kill_inside");
    if (action_ == Action::kFail && error <= 0) throw std::invalid_argument("action fail needs an error number");
}

CallScript::Verdict CallScript::next(Kind kind) {
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t number = count_++;
    if (at_ < 0 || number < at_ || number - at_ >= times_) return {};
    switch (action_) {
        case Action::kFail:
            return {error_, false, false};
        case Action::kShort:
            return {0, kind != Kind::kOther, false};
        case Action::kKillInside:
            if (kind == Kind::kWrite) return {0, true, true};
            [[fallthrough]];
        case Action::kKill:
            kill_own_process();
        case Action::kNone:
            break;
    }
    return {};
}

void CallScript::record(RecordedCall call) {
    std::lock_guard<std::mutex> lock(mutex_);
    calls_.push_back(std::move(call));
}

int64_t CallScript::count() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return count_;
}

std::vector<RecordedCall> CallScript::calls() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return calls_;
}

void kill_own_process() {
    while (true) kill(getpid(), SIGKILL);
}

OpenFile::~OpenFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

void OpenFile::ask_direct() {
    const int flags = fcntl(descriptor_, F_GETFL);
    if (flags < 0 || fcntl(descriptor_, F_SETFL, flags | O_DIRECT) < 0) {
        if (errno != EINVAL) throw SystemError(errno, path);
        reason_ = kRefused;
    } else {
        direct_ = true;
    }
}

void OpenFile::drop_direct(const char* reason) {
    const int flags = fcntl(descriptor_, F_GETFL);
    if (flags < 0 || fcntl(descriptor_, F_SETFL, flags & ~O_DIRECT) < 0) throw SystemError(errno, path);
    reason_ = reason;
    direct_ = false;  // last: who sees it may use any address and offset
}

std::string OpenFile::not_direct() const {
    return reason_.load();
}

void OpenFile::close() {
    // Linux frees the descriptor even when it reports EINTR.
    if (::close(std::exchange(descriptor_, -1)) < 0 && errno != EINTR) throw SystemError(errno, path);
}

// Runs body() until it is not interrupted. Its result, or the negative errno.
template <class Body>
int SystemCalls::attempt(Body body) {
    while (true) {
        int error = next(CallScript::Kind::kOther).error;
        if (error == 0) {
            const int result = body();
            if (result >= 0) return result;
            error = errno;
        }
        if (error != EINTR) return -error;
    }
}

namespace {

int checked(int result, const std::string& path, const std::string& second_path = {}) {
    if (result < 0) throw SystemError(-result, path, second_path);
    return result;
}

}  // namespace

void SystemCalls::record(const char* name, const std::string& path, uint64_t bytes, const std::string& second_path) {
    if (script_ && script_->records()) script_->record({name, path, second_path, 0, bytes, {}});
}

void SystemCalls::record_write(const std::string& path, uint64_t offset, const char* data, size_t bytes) {
    if (script_ && script_->records()) script_->record({"write", path, {}, offset, bytes, std::string(data, bytes)});
}

void SystemCalls::make_folder(const std::string& path) {
    checked(attempt([&] { return mkdir(path.c_str(), 0777); }), path);
    record("mkdir", path);
}

void SystemCalls::sync_folder(const std::string& path) {
    const int descriptor = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) throw SystemError(errno, path);
    const OpenFile folder(path, descriptor);
    checked(attempt([&] { return fsync(descriptor); }), path);
    record("sync_folder", path);
}

void SystemCalls::rename(const std::string& from, const std::string& to) {
    checked(attempt([&] { return ::rename(from.c_str(), to.c_str()); }), from, to);
    record("rename", from, 0, to);
}

void SystemCalls::remove_file(const std::string& path) {
    checked(attempt([&] { return unlink(path.c_str()); }), path);
    record("remove", path);
}

void SystemCalls::remove_folder(const std::string& path) {
    checked(attempt([&] { return rmdir(path.c_str()); }), path);
    record("remove_folder", path);
}

std::unique_ptr<OpenFile> SystemCalls::create(const std::string& path) {
    const int flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;
    auto file =
        std::make_unique<OpenFile>(path, checked(attempt([&] { return open(path.c_str(), flags, 0666); }), path));
    record("create", path);
    return file;
}

std::unique_ptr<OpenFile> SystemCalls::open_to_read(const std::string& path) {
    return std::make_unique<OpenFile>(path,
                                      checked(attempt([&] { return open(path.c_str(), O_RDONLY | O_CLOEXEC); }), path));
}

bool SystemCalls::allocate(const OpenFile& file, uint64_t bytes) {
    const int result = attempt([&] { return fallocate(file.descriptor(), 0, 0, static_cast<off_t>(bytes)); });
    if (result == -EOPNOTSUPP || result == -ENOSYS) return false;
    checked(result, file.path);
    record("allocate", file.path, bytes);
    return true;
}

void SystemCalls::truncate(const OpenFile& file, uint64_t bytes) {
    checked(attempt([&] { return ftruncate(file.descriptor(), static_cast<off_t>(bytes)); }), file.path);
    record("truncate", file.path, bytes);
}

void SystemCalls::sync(const OpenFile& file) {
    checked(attempt([&] { return fdatasync(file.descriptor()); }), file.path);
    record("sync", file.path);
}

}  // namespace osf
