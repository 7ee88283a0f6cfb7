// The checkpoint files' native code, run in the folder that is given as the argument.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <thread>

#include "check.h"
#include "crc32c.h"
#include "file_reader.h"
#include "file_writer.h"
#include "io_ring.h"
#include "page_memory.h"

using namespace osf;
namespace fs = std::filesystem;

namespace {

constexpr size_t kChunk = 64 * 1024;
fs::path folder;

std::vector<char> random_bytes(size_t bytes, unsigned seed) {
    std::mt19937_64 random(seed);
    std::vector<char> data(bytes);
    for (char& byte : data) byte = static_cast<char>(random());
    return data;
}

std::vector<char> content_of(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

size_t entries_in(const char* path) {
    return static_cast<size_t>(std::distance(fs::directory_iterator(path), fs::directory_iterator()));
}

std::vector<std::string> engines() {
    std::vector<std::string> names{"pwrite"};
    if (io_uring_missing().empty()) names.push_back("io_uring");
    return names;
}

// Extents of every kind over one memory: whole pages, an odd end, neighbours, odd pieces, nothing.
std::vector<std::vector<Extent>> shapes(const char* pages) {
    std::vector<Extent> crumbs;
    for (size_t i = 0; i < 500; ++i) crumbs.push_back({pages + 1000 * i + 3, 1 + i % 700});
    return {
        {{pages, 5 * kChunk}},
        {{pages + kPage, 3 * kChunk + 1234}},
        {{pages, kChunk}, {pages + kChunk, kChunk}, {pages + 3 * kChunk, 2 * kPage + 1}},
        {{pages + 1, 2 * kChunk}, {pages + 77, 12345}},
        {{pages + 5, 1}},
        {{pages, kPage - 1}},
        {{pages, 0}, {pages + kPage, kPage}, {pages, 0}},
        {},
        crumbs,
    };
}

std::vector<char> joined(const std::vector<Extent>& extents) {
    std::vector<char> all;
    for (const Extent& extent : extents) all.insert(all.end(), extent.data, extent.data + extent.bytes);
    return all;
}

// A folder of its own with the shapes' images, and what must be in them.
struct Case {
    explicit Case(const std::string& name) : path(folder / name), memory(8 * kChunk) {
        fs::create_directory(path);
        const std::vector<char> bytes = random_bytes(memory.bytes(), 1);
        memcpy(memory.data(), bytes.data(), bytes.size());
        for (const auto& extents : shapes(memory.data())) {
            images.push_back({path / ("image-" + std::to_string(images.size())), extents});
            contents.push_back(joined(extents));
        }
    }
    ~Case() { fs::remove_all(path); }

    void keep(const std::vector<size_t>& which) {
        std::vector<Image> kept;
        std::vector<std::vector<char>> kept_contents;
        for (const size_t i : which) {
            kept.push_back(images[i]);
            kept_contents.push_back(contents[i]);
        }
        images = kept;
        contents = kept_contents;
    }
    void check_files(const IoReport& report) const {
        CHECK(report.crc32c.size() == images.size());
        for (size_t i = 0; i < images.size(); ++i) {
            CHECK(content_of(images[i].path) == contents[i]);
            for (size_t chunk = 0; chunk < report.crc32c[i].size(); ++chunk) {
                const size_t bytes = std::min(kChunk, contents[i].size() - chunk * kChunk);
                CHECK(report.crc32c[i][chunk] == crc32c_software(contents[i].data() + chunk * kChunk, bytes));
            }
        }
    }
    std::vector<InputFile> inputs(const IoReport& report) const {
        std::vector<InputFile> files;
        for (size_t i = 0; i < images.size(); ++i)
            files.push_back({images[i].path, contents[i].size(), report.crc32c[i]});
        return files;
    }
    void remove_files() const {
        for (const Image& image : images) fs::remove(image.path);
    }

    const fs::path path;
    const PageMemory memory;
    std::vector<Image> images;
    std::vector<std::vector<char>> contents;
};

void test_crc32c() {
    unsigned char bytes[32];
    const auto both = [&](uint32_t expected, size_t count) {
        CHECK(crc32c(bytes, count) == expected);
        CHECK(crc32c_software(bytes, count) == expected);
    };
    memset(bytes, 0, 32);
    both(0x8a9136aa, 32);
    memset(bytes, 0xff, 32);
    both(0x62a8ab43, 32);
    for (int i = 0; i < 32; ++i) bytes[i] = static_cast<unsigned char>(i);
    both(0x46dd794e, 32);
    std::reverse(bytes, bytes + 32);
    both(0x113fdb5c, 32);
    memcpy(bytes, "123456789", 9);
    both(0xe3069283, 9);
    both(0, 0);
    const std::vector<char> data = random_bytes(60000, 2);
    std::mt19937 random(3);
    for (int i = 0; i < 500; ++i) {
        const size_t start = random() % 100, count = random() % (data.size() - start),
                     cut = count ? random() % count : 0;
        const uint32_t whole = crc32c_software(data.data() + start, count);
        CHECK(crc32c(data.data() + start, count) == whole);
        CHECK(crc32c(data.data() + start + cut, count - cut, crc32c(data.data() + start, cut)) == whole);
    }
}

void test_round_trip() {
    for (const std::string& engine : engines())
        for (const bool direct : {true, false})
            for (const int depth : {1, 3, 8}) {
                const Case here("round-trip");
                SystemCalls calls(nullptr);
                const IoOptions options{kChunk, depth, 2, engine, direct};
                const IoReport report = write_images(calls, here.images, options);
                CHECK(report.engine == engine);
                here.check_files(report);
                for (const bool aligned : {true, false}) {
                    const PageMemory out(16 * kChunk);
                    std::vector<ReadPiece> pieces;
                    std::vector<const char*> starts;
                    size_t at = aligned ? 0 : 3;
                    for (size_t i = 0; i < here.images.size(); ++i) {
                        const size_t bytes = here.contents[i].size(), cut = bytes / 3;
                        starts.push_back(out.data() + at);
                        pieces.push_back({i, cut, bytes - cut, out.data() + at + cut});
                        pieces.push_back({i, 0, cut, out.data() + at});
                        at += page_up(bytes);
                    }
                    read_pieces(calls, here.inputs(report), pieces, options, false);
                    for (size_t i = 0; i < here.images.size(); ++i)
                        CHECK(std::equal(here.contents[i].begin(), here.contents[i].end(), starts[i]));
                }
            }
}

// Every call in turn meets with trouble: a refusal is reported, anything else is survived.
void test_trouble_at_every_call() {
    struct Trouble {
        const char* action;
        int error;
    };
    for (const std::string& engine : engines())
        for (const bool direct : {true, false}) {
            Case here("trouble");
            here.keep({1, 3, 7});
            const IoOptions options{kChunk, 3, 2, engine, direct};
            const auto none = std::make_shared<CallScript>(false, -1, "", 0, 1);
            SystemCalls calm(none);
            const IoReport report = write_images(calm, here.images, options);
            const int64_t writes = none->count();
            std::vector<char> out(here.contents[0].size());
            const auto read = [&](SystemCalls& calls) {
                std::fill(out.begin(), out.end(), 0);
                return read_pieces(calls, here.inputs(report), {{0, 0, out.size(), out.data()}}, options, true);
            };
            read(calm);
            const int64_t reads = none->count() - writes;
            for (const Trouble& trouble : {Trouble{"fail", ENOSPC}, {"fail", EIO}, {"fail", EINTR}, {"short", 0}})
                for (const int64_t times : {int64_t{1}, INT64_MAX / 2}) {
                    if (times > 1 && trouble.error != 0) continue;  // EINTR for ever is for ever
                    const bool fatal = trouble.error == ENOSPC || trouble.error == EIO;
                    for (int64_t at = 0; at < writes; ++at) {
                        here.remove_files();
                        SystemCalls calls(
                            std::make_shared<CallScript>(false, at, trouble.action, trouble.error, times));
                        try {
                            here.check_files(write_images(calls, here.images, options));
                            CHECK(!fatal);
                        } catch (const SystemError& error) {
                            CHECK(fatal && error.error == trouble.error);
                        }
                    }
                    here.remove_files();
                    write_images(calm, here.images, options);
                    for (int64_t at = 0; at < reads; ++at) {
                        SystemCalls calls(
                            std::make_shared<CallScript>(false, at, trouble.action, trouble.error, times));
                        try {
                            read(calls);
                            CHECK(!fatal && out == here.contents[0]);
                        } catch (const SystemError& error) {
                            CHECK(fatal && error.error == trouble.error);
                        }
                    }
                }
        }
}

// The kernel lacks room for a moment, which passes, or for good, which is given up soon.
void test_room_is_waited_for() {
    for (const std::string& engine : engines())
        for (const int error : {EAGAIN, EBUSY}) {
            Case here("room");
            here.keep({1});
            const IoOptions options{kChunk, 3, 2, engine, true};
            SystemCalls once(std::make_shared<CallScript>(false, 3, "fail", error, 4));
            here.check_files(write_images(once, here.images, options));
            if (error == EBUSY) continue;
            here.remove_files();
            SystemCalls for_good(std::make_shared<CallScript>(false, 3, "fail", error, INT64_MAX / 2));
            try {
                write_images(for_good, here.images, options);
                CHECK(false);
            } catch (const SystemError& refused) {
                CHECK(refused.error == error && refused.path == here.images[0].path);
            }
        }
}

// The files may be opened, a ring (the second one) may not: descriptors are at their limit.
void test_a_ring_that_is_refused() {
    if (engines().size() == 1) return;
    Case here("refused");
    here.keep({0});
    const IoOptions options{kChunk, 3, 2, "io_uring", true};
    SystemCalls calls(nullptr);
    rlimit before;
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    const int lowest = dup(0);
    close(lowest);
    for (const rlim_t rings : {0, 1}) {
        const rlimit tight{static_cast<rlim_t>(lowest) + 1 + rings, before.rlim_max};
        CHECK(setrlimit(RLIMIT_NOFILE, &tight) == 0);
        const IoReport written = write_images(calls, here.images, options);
        const IoReport read = read_pieces(calls, here.inputs(written), {}, options, true);
        CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
        for (const IoReport& report : {written, read})
            CHECK(report.engine == "pwrite" && report.fallback == "no io_uring: Too many open files");
        here.check_files(written);
        here.remove_files();
    }
}

// Pieces that only have their chunks verified, beside and on top of others, and nothing to read at all.
void test_what_is_verified_only() {
    for (const std::string& engine : engines()) {
        Case here("verified");
        here.keep({0, 1});
        SystemCalls calls(nullptr);
        const IoOptions options{kChunk, 4, 2, engine, true};
        const IoReport report = write_images(calls, here.images, options);
        std::vector<InputFile> files = here.inputs(report);
        CHECK(read_pieces(calls, {}, {}, options, true).bytes == 0);
        CHECK(read_pieces(calls, files, {}, options, false).bytes == 0);
        CHECK(read_pieces(calls, files, {{0, 0, 0, nullptr}}, options, false).bytes == 0);
        const PageMemory out(4 * kChunk);
        std::vector<ReadPiece> pieces;
        for (size_t chunk = 0; chunk < 4; ++chunk) pieces.push_back({1, chunk * kChunk, 1, nullptr});
        pieces.push_back({0, kChunk - 1, 3 * kChunk + 2, nullptr});
        pieces.push_back({0, kChunk, kChunk, out.data()});
        pieces.push_back({0, kChunk, kChunk, out.data() + kChunk});  // the same bytes to another place
        CHECK(read_pieces(calls, files, pieces, options, false).bytes == here.contents[1].size() + 5 * kChunk);
        for (const size_t at : {size_t{0}, kChunk})
            CHECK(memcmp(out.data() + at, here.contents[0].data() + kChunk, kChunk) == 0);
        files[1].crc32c[3] ^= 1;
        CHECK_THROWS(Corruption, read_pieces(calls, files, pieces, options, false));
        pieces.erase(pieces.begin() + 3);
        read_pieces(calls, files, pieces, options, false);
        files[1].crc32c.clear();
        CHECK(read_pieces(calls, files, {{1, 5, kChunk, nullptr}}, options, false).bytes == kChunk);
    }
}

// What the poll throws comes out, when no thread is left that writes to the caller's memory.
void test_a_read_is_interrupted() {
    struct Interruption {};
    for (const std::string& engine : engines()) {
        Case here("interrupted");
        here.keep({0});
        SystemCalls calls(nullptr);
        const IoOptions options{kPage, 4, 2, engine, true};
        const IoReport report = write_images(calls, here.images, options);
        const size_t descriptors = entries_in("/proc/self/fd");
        const auto interrupt = [] { throw Interruption(); };
        for (int i = 0; i < 50; ++i) {
            const PageMemory out(5 * kChunk);
            const std::vector<ReadPiece> piece{{0, 0, 5 * kChunk, out.data()}};
            CHECK_THROWS(Interruption, read_pieces(calls, here.inputs(report), piece, options, false, interrupt));
            CHECK(entries_in("/proc/self/fd") == descriptors);
            const std::vector<char> left(out.data(), out.data() + out.bytes());
            for (size_t at = 0; at < left.size(); at += kPage)  // whole chunks or nothing
                CHECK(left[at] == here.contents[0][at] || left[at] == 0);
            CHECK(memcmp(left.data(), out.data(), left.size()) == 0);
        }
        int polls = 0;
        std::vector<char> out(5 * kChunk);
        read_pieces(calls, here.inputs(report), {{0, 0, out.size(), out.data()}}, options, false, [&] { ++polls; });
        CHECK(polls >= 1 && out == here.contents[0]);
        // Damage that is found at the same time does not hide the interruption.
        std::vector<InputFile> files = here.inputs(report);
        for (uint32_t& sum : files[0].crc32c) sum ^= 1;
        CHECK_THROWS(Interruption, read_pieces(calls, files, {}, options, true, interrupt));
    }
}

void test_a_refusal_of_direct_io_is_told() {
    for (const std::string& engine : engines()) {
        const Case here("refusal");
        // A creation and an allocation of each file; the empty one has no allocation, but is synced.
        const auto before_the_first_write = static_cast<int64_t>(2 * here.images.size());
        SystemCalls calls(std::make_shared<CallScript>(false, before_the_first_write, "fail", EINVAL, 1));
        const IoReport report = write_images(calls, here.images, {kChunk, 4, 2, engine, true});
        here.check_files(report);
        CHECK(!report.direct && report.fallback == kRefused);
    }
}

void test_damage_is_found() {
    for (const std::string& engine : engines()) {
        const Case here("damage");
        SystemCalls calls(nullptr);
        const IoOptions options{kChunk, 4, 2, engine, true};
        const IoReport report = write_images(calls, here.images, options);
        const auto offset_of_damage = [&]() -> int64_t {
            try {
                read_pieces(calls, here.inputs(report), {}, options, true);
            } catch (const Corruption& corruption) {
                CHECK(corruption.path == here.images[1].path);
                return static_cast<int64_t>(corruption.offset);
            }
            return -1;
        };
        CHECK(offset_of_damage() == -1);
        const fs::path file = here.images[1].path;
        const std::vector<char> good = here.contents[1];
        std::mt19937 random(5);
        for (int i = 0; i < 30; ++i) {
            std::vector<char> bad = good;
            const size_t first = random() % bad.size(), second = random() % bad.size();
            bad[first] = static_cast<char>(bad[first] ^ (1 << random() % 8));
            if (second != first) bad[second] = static_cast<char>(bad[second] ^ 1);
            std::ofstream(file, std::ios::binary).write(bad.data(), static_cast<std::streamsize>(bad.size()));
            CHECK(offset_of_damage() == static_cast<int64_t>(std::min(first, second) / kChunk * kChunk));
        }
        fs::resize_file(file, good.size() - 1);
        CHECK(offset_of_damage() == static_cast<int64_t>(good.size() - 1));
        fs::resize_file(file, good.size() + 5);
        CHECK(offset_of_damage() == static_cast<int64_t>(good.size()));
        fs::remove(file);
        CHECK_THROWS(SystemError, offset_of_damage());
    }
}

void test_arguments() {
    const Case here("arguments");
    SystemCalls calls(nullptr);
    CHECK_THROWS(std::invalid_argument, write_images(calls, {}, {1000, 1, 1, "auto", true}));
    CHECK_THROWS(std::invalid_argument, write_images(calls, {}, {0, 1, 1, "auto", true}));
    CHECK_THROWS(std::invalid_argument, write_images(calls, {}, {kPage, 0, 1, "auto", true}));
    CHECK_THROWS(std::invalid_argument, write_images(calls, {}, {kPage, 1, 0, "auto", true}));
    CHECK_THROWS(std::invalid_argument, write_images(calls, {}, {kPage, 1, 1, "aio", true}));
    const IoOptions options{kChunk, 1, 1, "auto", true};
    const IoReport report = write_images(calls, here.images, options);
    CHECK_THROWS(SystemError, write_images(calls, here.images, options));  // they exist
    const auto files = here.inputs(report);
    char byte;
    CHECK_THROWS(std::invalid_argument, read_pieces(calls, files, {{files.size(), 0, 1, &byte}}, options, false));
    CHECK_THROWS(std::invalid_argument, read_pieces(calls, files, {{0, files[0].bytes, 1, &byte}}, options, false));
    CHECK_THROWS(std::invalid_argument, read_pieces(calls, files, {{0, UINT64_MAX, 1, &byte}}, options, false));
    CHECK_THROWS(std::invalid_argument, read_pieces(calls, {{"x", 2 * kChunk, {1}}}, {}, options, false));
    CHECK_THROWS(Corruption, read_pieces(calls, {{here.path, 0, {}}}, {}, options, true));  // a folder
    CHECK_THROWS(std::invalid_argument, CallScript(false, 0, "stumble", 0, 1));
    CHECK_THROWS(std::invalid_argument, CallScript(false, 0, "fail", 0, 1));
}

void test_small_calls_and_their_record() {
    const auto script = std::make_shared<CallScript>(true, -1, "", 0, 1);
    SystemCalls calls(script);
    const std::string path = folder / "small";
    calls.make_folder(path);
    CHECK_THROWS(SystemError, calls.make_folder(path));
    write_images(calls, {{path + "/a", {{"words", 5}}}}, {kPage, 1, 1, "pwrite", false});
    calls.rename(path + "/a", path + "/b");
    calls.sync_folder(path);
    calls.remove_file(path + "/b");
    calls.remove_folder(path);
    std::vector<std::string> names;
    for (const RecordedCall& call : script->calls()) names.push_back(call.name);
    const std::vector<std::string> expected{"mkdir",  "create",      "allocate", "write",        "sync",
                                            "rename", "sync_folder", "remove",   "remove_folder"};
    CHECK(names == expected);
    CHECK(script->calls()[3].content == "words");
    CHECK(script->count() == static_cast<int64_t>(expected.size()) + 1);
}

void test_threads_share_the_calls() {
    const Case here("shared");
    const size_t descriptors = entries_in("/proc/self/fd"), threads_before = entries_in("/proc/self/task");
    SystemCalls calls(std::make_shared<CallScript>(true, -1, "", 0, 1));
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 4; ++thread)
        threads.emplace_back([&, thread] {
            const fs::path own = here.path / std::to_string(thread);
            calls.make_folder(own);
            for (int round = 0; round < 5; ++round) {
                std::vector<Image> images = here.images;
                for (Image& image : images)
                    image.path = own / (std::to_string(round) + fs::path(image.path).filename().string());
                const IoOptions options{kChunk, 3, 2, thread % 2 ? "auto" : "pwrite", true};
                const IoReport report = write_images(calls, images, options);
                std::vector<InputFile> files = here.inputs(report);
                for (size_t i = 0; i < files.size(); ++i) files[i].path = images[i].path;
                read_pieces(calls, files, {}, options, true);
            }
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(entries_in("/proc/self/fd") == descriptors);
    CHECK(entries_in("/proc/self/task") == threads_before);
}

}  // namespace

int main(int count, char** arguments) {
    CHECK(count == 2);
    folder = fs::absolute(arguments[1]);
    test_crc32c();
    test_round_trip();
    test_trouble_at_every_call();
    test_room_is_waited_for();
    test_a_ring_that_is_refused();
    test_what_is_verified_only();
    test_a_read_is_interrupted();
    test_a_refusal_of_direct_io_is_told();
    test_damage_is_found();
    test_arguments();
    test_small_calls_and_their_record();
    test_threads_share_the_calls();
    puts("files: ok");
    return 0;
}
