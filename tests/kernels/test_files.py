"""The native checkpoint files: checksums, images of any extents, trouble at any system call, damage, leaks."""

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PAGE = 4096
ENGINES = ["io_uring", "pwrite"]
LAW = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


class Memory:
    """`bytes` random bytes whose address is a multiple of PAGE."""

    def __init__(self, size: int, seed: int = 0):
        self.array = np.zeros(size + PAGE, dtype=np.uint8)
        self.address = -(-self.array.ctypes.data // PAGE) * PAGE
        skip = self.address - self.array.ctypes.data
        self.view = self.array[skip : skip + size]
        self.view[:] = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)

    def at(self, offset: int, size: int) -> tuple[int, int]:
        return self.address + offset, size


def content(extents) -> bytes:
    return b"".join(ctypes.string_at(address, size) for address, size in extents)


def read_all(native, files, path, size, crc32c, **options) -> bytes:
    out = Memory(size)
    out.view[:] = 0
    files.read_pieces([(path, size, crc32c)], [(0, 0, size, out.address)], verify_all=True, **options)
    return out.view.tobytes()


@pytest.fixture(params=ENGINES)
def engine(request, native):
    if request.param == "io_uring" and native.runtime_info()["io_uring"]:
        pytest.skip(f"no io_uring: {native.runtime_info()['io_uring']}")
    return request.param


@pytest.fixture
def shared_memory_folder():
    """A folder in memory, where preallocation, truncation and direct I/O are another file system's."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no writable /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def checksum(function, data: bytes, seed: int = 0) -> int:
    held = ctypes.create_string_buffer(data, len(data))
    return function(ctypes.addressof(held), len(data), seed=seed)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_crc32c_of_published_vectors(native, data, expected):
    assert checksum(native.crc32c, data) == checksum(native.crc32c_software, data) == expected


@LAW
@given(st.binary(max_size=40_000), st.integers(0, 2**32 - 1), st.integers(0, 40_000))
def test_crc32c_of_the_processor_equals_the_tables_and_goes_on_from_a_seed(native, data, seed, cut):
    whole = checksum(native.crc32c_software, data, seed)
    assert checksum(native.crc32c, data, seed) == whole
    assert checksum(native.crc32c, data[cut:], checksum(native.crc32c, data[:cut], seed)) == whole


def test_runtime_info_says_what_there_is(native):
    info = native.runtime_info()
    assert info.keys() == {"crc32c", "io_uring", "registered_buffers"}
    assert info["crc32c"] in {"sse4.2", "armv8", "tables"}
    assert not info["io_uring"] or info["registered_buffers"]


extents_of = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 40).map(lambda n: n * PAGE), st.integers(0, 40 * PAGE)),
        st.one_of(st.integers(0, 20).map(lambda n: n * PAGE), st.integers(0, 20 * PAGE)),
    ),
    max_size=12,
)


@LAW
@given(
    images=st.lists(extents_of, max_size=4),
    chunk=st.sampled_from([PAGE, 4 * PAGE, 64 * PAGE]),
    depth=st.integers(1, 6),
    threads=st.integers(1, 3),
    direct=st.booleans(),
    shift=st.integers(0, PAGE),
)
def test_images_of_any_extents_come_back(
    native, engine, tmp_path_factory, images, chunk, depth, threads, direct, shift
):
    folder = tmp_path_factory.mktemp("images")
    memory = Memory(64 * PAGE)
    files = native.FileSystem()
    options = dict(chunk_bytes=chunk, depth=depth, threads=threads, engine=engine, direct=direct)
    extents = [[memory.at(*extent) for extent in image] for image in images]
    named = [(str(folder / str(i)), image) for i, image in enumerate(extents)]
    report = files.write_images(named, **options)
    assert report.engine == engine
    assert report.bytes == sum(size for image in extents for _, size in image)
    assert report.direct == (direct and not report.fallback)
    records, pieces, expected, start = [], [], [], 0
    out = Memory(2 * PAGE + sum(-(-len(content(image)) // PAGE) * PAGE + PAGE for image in extents))
    for i, (path, image) in enumerate(named):
        data = content(image)
        assert Path(path).read_bytes() == data
        sums = [checksum(native.crc32c_software, data[at : at + chunk]) for at in range(0, len(data), chunk)]
        assert report.crc32c[i] == sums
        records.append((path, len(data), sums))
        where = out.address + start + (shift if i % 2 else 0)
        middle = len(data) // 3
        pieces += [(i, middle, len(data) - middle, where + middle), (i, 0, middle, where)]
        expected.append((where, data))
        start += -(-len(data) // PAGE) * PAGE + PAGE
    again = files.read_pieces(records, pieces, **options)
    assert again.engine == engine
    for where, data in expected:
        assert ctypes.string_at(where, len(data)) == data


@pytest.mark.parametrize("direct", [True, False])
def test_memory_file_systems_are_written_too(native, engine, direct, shared_memory_folder):
    memory, files = Memory(9 * PAGE), native.FileSystem()
    image = [memory.at(0, 8 * PAGE + 5)]
    path = str(shared_memory_folder / "file")
    report = files.write_images([(path, image)], chunk_bytes=4 * PAGE, engine=engine, direct=direct)
    assert report.direct or not direct or "O_DIRECT" in report.fallback
    assert read_all(native, files, path, 8 * PAGE + 5, report.crc32c[0], chunk_bytes=4 * PAGE) == content(image)


NATIVE_IN_A_CHILD = """
import ctypes, errno, importlib.util, json, os, pathlib, struct, sys
sys.path.insert(0, {folder!r})
spec = importlib.util.spec_from_file_location("_C", {native!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
"""


def run_in_a_child(native, code: str) -> str:
    start = NATIVE_IN_A_CHILD.format(folder=str(Path(__file__).parent), native=native.__file__)
    done = subprocess.run([sys.executable, "-P", "-c", start + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


SETUP, REGISTER = 425, 427  # io_uring's calls
REFUSE, KILL = 0x50000 | errno.EPERM, 0x80000000  # what seccomp may do


def forbidding(call: int, verdict: int) -> str:
    """A child's code that forbids itself a call of the kernel; where it may not, it prints null and ends."""
    return f"""
libc = ctypes.CDLL(None, use_errno=True)
# Load the call's number; is it the one? Then the verdict, else let it pass.
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, {call}), (0x06, 0, 0, {verdict}), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program):  # no new privileges; seccomp filter
    print(json.dumps(None))
    sys.exit()
"""


def test_where_io_uring_is_forbidden_pwrite_is_used_and_the_reason_told(native, tmp_path):
    code = f"""{forbidding(SETUP, REFUSE)}
info = native.runtime_info()
report = native.FileSystem().write_images([({str(tmp_path / "a")!r}, [])], chunk_bytes=4096, engine="io_uring")
print(json.dumps([info["io_uring"], info["registered_buffers"], report.engine, report.fallback]))
"""
    said = json.loads(run_in_a_child(native, code))
    if said is None:
        pytest.skip("a process here may not restrict itself (seccomp)")
    missing, registered, engine, fallback = said
    assert missing
    assert registered == missing
    assert (engine, fallback) == ("pwrite", f"no io_uring: {missing}")
    if not native.runtime_info()["io_uring"]:
        assert "security policy" in missing


@pytest.mark.parametrize(("start", "status"), [(0, 0), (1, signal.SIGSYS)])
def test_only_buffers_that_are_reused_are_registered(native, tmp_path, start, status):
    """Pages are written from where they are: nothing is registered. What is gathered passes through buffers."""
    if native.runtime_info()["io_uring"]:
        pytest.skip(f"no io_uring: {native.runtime_info()['io_uring']}")
    code = f"""{forbidding(REGISTER, KILL)}
from test_files import PAGE, Memory
memory = Memory(8 * PAGE)
child = os.fork()
if child == 0:
    native.FileSystem().write_images([({str(tmp_path / "a")!r}, [memory.at({start}, 7 * PAGE)])], chunk_bytes=2 * PAGE)
    os._exit(0)
print(os.waitpid(child, 0)[1] & 0x7F)
"""
    said = json.loads(run_in_a_child(native, code))
    if said is None:
        pytest.skip("a process here may not restrict itself (seccomp)")
    assert said == status


def test_a_read_answers_ctrl_c(native, engine, tmp_path):
    """SIGINT once the read has begun: it ends long before the file does, and none of its threads is left."""
    chunk, chunks = 2**22, 2**14
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(chunk * chunks)
    code = f"""
import signal, threading
script = native.CallScript()
def interrupt():
    while script.count < 10:
        pass
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    native.FileSystem(script).read_pieces(
        [({str(path)!r}, {chunk * chunks}, [])], [(0, 0, {chunk * chunks}, 0)], chunk_bytes={chunk}, engine={engine!r}
    )
    print("not answered")
except KeyboardInterrupt:
    print(script.count)
"""
    assert 10 <= int(run_in_a_child(native, code)) < chunks / 2


def test_a_file_system_without_preallocation(native, engine, tmp_path):
    memory = Memory(8 * PAGE)
    image = [memory.at(0, 7 * PAGE + 9)]
    files = native.FileSystem(native.CallScript(at=1, action="fail", error=errno.EOPNOTSUPP))
    files.write_images([(tmp_path / "a", image)], chunk_bytes=2 * PAGE, engine=engine)
    assert (tmp_path / "a").read_bytes() == content(image)


def small_save(native, folder, script, engine, direct):
    """Two images and the small calls; the files' paths and what they must hold."""
    files = native.FileSystem(script)
    memory = Memory(12 * PAGE)
    step = folder / "step"
    files.make_folder(step)
    images = [
        (str(step / "a"), [memory.at(0, 7 * PAGE + 100)]),
        (str(step / "b"), [memory.at(1, 3 * PAGE), memory.at(9 * PAGE, 99)]),
    ]
    files.write_images(images, chunk_bytes=2 * PAGE, depth=3, threads=2, engine=engine, direct=direct)
    files.write_file(step / "manifest", b"words" * 3)
    files.sync_folder(step)
    files.rename(step, folder / "published")
    files.sync_folder(folder)
    return {"a": content(images[0][1]), "b": content(images[1][1]), "manifest": b"words" * 3}


def clear(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("action", "error"), [("fail", errno.ENOSPC), ("fail", errno.EIO), ("fail", errno.EINTR), ("short", 0)]
)
def test_trouble_at_every_call_is_raised_or_survived(native, engine, direct, tmp_path, action, error):
    calm = native.CallScript()
    small_save(native, tmp_path, calm, engine, direct)
    assert calm.count > 15
    for at in range(calm.count):
        clear(tmp_path)
        script = native.CallScript(at=at, action=action, error=error)
        if error in (errno.ENOSPC, errno.EIO):
            with pytest.raises(OSError, match=os.strerror(error)) as caught:
                small_save(native, tmp_path, script, engine, direct)
            assert caught.value.errno == error
            assert str(caught.value.filename).startswith(str(tmp_path))
            assert not (tmp_path / "published").exists() or at == calm.count - 1
        else:
            for name, data in small_save(native, tmp_path, script, engine, direct).items():
                assert (tmp_path / "published" / name).read_bytes() == data


@pytest.mark.parametrize("direct", [True, False])
def test_every_transfer_may_be_short_and_interrupted(native, engine, direct, tmp_path):
    script = native.CallScript(at=0, action="short", times=10**6)
    for name, data in small_save(native, tmp_path, script, engine, direct).items():
        path = tmp_path / "published" / name
        assert path.read_bytes() == data
        assert read_all(native, native.FileSystem(script), path, len(data), [], chunk_bytes=PAGE, engine=engine) == data
    clear(tmp_path)
    small_save(native, tmp_path, native.CallScript(at=3, action="fail", error=errno.EINTR, times=50), engine, direct)


def test_a_file_system_that_refuses_direct_writes_gets_buffered_ones(native, engine, tmp_path):
    memory = Memory(8 * PAGE)
    image = [memory.at(0, 7 * PAGE + 9)]
    # The calls: create, allocate, then the first write.
    files = native.FileSystem(native.CallScript(at=2, action="fail", error=errno.EINVAL))
    report = files.write_images([(tmp_path / "a", image)], chunk_bytes=2 * PAGE, engine=engine)
    assert not report.direct
    assert report.fallback == "O_DIRECT refused by the file system (EINVAL)"
    assert (tmp_path / "a").read_bytes() == content(image)


@pytest.mark.parametrize("direct", [True, False])
def test_the_record_is_what_reached_the_disk(native, engine, direct, tmp_path):
    script = native.CallScript(record=True, at=7, action="short", times=3)
    expected = small_save(native, tmp_path, script, engine, direct)
    contents: dict[str, bytearray] = {}
    synced: dict[str, bytes] = {}
    for name, path, *rest in script.calls():
        if name == "create":
            assert path not in contents
            contents[path] = bytearray()
        elif name in ("allocate", "truncate"):
            (size,) = rest
            contents[path] = contents[path][:size].ljust(size, b"\0")
        elif name == "write":
            offset, data = rest
            contents[path][offset : offset + len(data)] = data
        elif name == "sync":
            synced[path] = bytes(contents[path])
    assert {Path(path).name: data for path, data in synced.items()} == expected
    step, published = str(tmp_path / "step"), str(tmp_path / "published")
    names = [call for call in script.calls() if call[0] in ("mkdir", "sync_folder", "rename")]
    assert names == [
        ("mkdir", step),
        ("sync_folder", step),
        ("rename", step, published),
        ("sync_folder", str(tmp_path)),
    ]
    files = native.FileSystem(script)
    for name in expected:
        files.remove_file(Path(published) / name)
    files.remove_folder(published)
    assert script.calls()[-1] == ("remove_folder", published)


@pytest.mark.parametrize("action", ["kill", "kill_inside"])
def test_killed_at_a_call(native, engine, tmp_path, action):
    code = f"""
from test_files import small_save
for at in range(100):
    folder = pathlib.Path({str(tmp_path)!r}) / str(at)
    folder.mkdir()
    child = os.fork()
    if child == 0:
        small_save(native, folder, native.CallScript(at=at, action={action!r}), {engine!r}, True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == 9, status
    assert not (folder / "published").exists() or at > 15
print(at)
"""
    assert 15 < int(run_in_a_child(native, code)) < 100


@LAW
@given(data=st.data())
def test_damage_is_found_with_file_and_offset(native, engine, tmp_path_factory, data):
    folder, chunk, files = tmp_path_factory.mktemp("damage"), 2 * PAGE, native.FileSystem()
    memory = Memory(16 * PAGE)
    sizes = [11 * PAGE + 17, 5 * PAGE]
    images = [(str(folder / f"rank-0-{i}.bin"), [memory.at(i * PAGE, size)]) for i, size in enumerate(sizes)]
    report = files.write_images(images, chunk_bytes=chunk, engine=engine)
    records = [(path, size, sums) for (path, _), size, sums in zip(images, sizes, report.crc32c, strict=True)]
    victim = data.draw(st.integers(0, 1))
    path, size, _ = records[victim]
    what = data.draw(st.sampled_from(["flip", "zeros", "cut", "grow"]))
    at = data.draw(st.integers(0, size - 1))
    good = Path(path).read_bytes()
    bad = bytearray(good)
    if what == "flip":
        bad[at] ^= 1 << data.draw(st.integers(0, 7))
    elif what == "zeros":
        end = data.draw(st.integers(at + 1, size))
        bad[at:end] = bytes(end - at)
    elif what == "cut":
        bad = bad[:at]
    else:
        bad += b"x"
    Path(path).write_bytes(bad)
    if bytes(bad) == good:
        return
    with pytest.raises(native.Corruption) as caught:
        files.read_pieces(records, [], chunk_bytes=chunk, engine=engine, verify_all=True)
    message, where, offset = caught.value.args
    assert isinstance(caught.value, ValueError)
    assert where == path
    first = next((i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
    if len(bad) == len(good):
        assert offset == first // chunk * chunk
        end = min(offset + chunk, size)
        assert message == f"rank-0-{victim}.bin: bytes {offset} to {end} do not match their checksum"
    else:
        assert offset == min(len(good), len(bad))
        assert message == f"rank-0-{victim}.bin: {len(bad)} bytes instead of {size}"


def test_only_touched_chunks_are_read_and_verified(native, engine, tmp_path):
    files, chunk = native.FileSystem(), 2 * PAGE
    memory = Memory(8 * PAGE)
    path = str(tmp_path / "a")
    sums = files.write_images([(path, [memory.at(0, 8 * PAGE)])], chunk_bytes=chunk, engine=engine).crc32c[0]
    with open(path, "r+b") as file:
        file.write(b"damaged!")
    out = Memory(8 * PAGE)
    options = dict(chunk_bytes=chunk, engine=engine)
    report = files.read_pieces([(path, 8 * PAGE, sums)], [(0, chunk + 5, 3 * PAGE, out.address)], **options)
    assert report.bytes == 2 * chunk
    assert ctypes.string_at(out.address, 3 * PAGE) == content([memory.at(chunk + 5, 3 * PAGE)])
    with pytest.raises(native.Corruption, match="bytes 0 to 8192"):
        files.read_pieces([(path, 8 * PAGE, sums)], [(0, 0, 1, out.address)], **options)
    with pytest.raises(native.Corruption, match="bytes 0 to 8192"):
        files.read_pieces([(path, 8 * PAGE, sums)], [(0, 7, 1, 0)], **options)
    before = out.view.tobytes()
    verified = [(0, chunk, 1, 0), (0, 3 * chunk - 1, 2, 0)]  # at the address 0: not copied
    assert files.read_pieces([(path, 8 * PAGE, sums)], verified, **options).bytes == 3 * chunk
    assert out.view.tobytes() == before
    report = files.read_pieces([(path, 8 * PAGE, [])], [(0, 3, 9, out.address)], **options)
    assert report.bytes == 9
    assert ctypes.string_at(out.address, 5) == b"aged!"


def test_operating_system_errors_keep_their_reason_and_path(native, tmp_path):
    files, missing = native.FileSystem(), str(tmp_path / "missing" / "file")
    with pytest.raises(FileNotFoundError) as caught:
        files.write_file(missing, b"")
    assert (caught.value.filename, caught.value.filename2) == (missing, None)
    with pytest.raises(FileNotFoundError) as caught:
        files.rename(missing, str(tmp_path / "new"))
    assert (caught.value.filename, caught.value.filename2) == (missing, str(tmp_path / "new"))
    files.write_file(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        files.write_file(tmp_path / "a", b"second")
    with pytest.raises(NotADirectoryError):
        files.make_folder(tmp_path / "a" / "b")
    with pytest.raises(native.Corruption, match="not a file"):
        files.read_pieces([(tmp_path, 0, [])], [], chunk_bytes=PAGE, verify_all=True)
    assert (tmp_path / "a").read_bytes() == b"first"
    odd = tmp_path / os.fsdecode(b"n\xc3\xa4me-\xff")
    files.write_file(odd, b"x")
    assert odd.read_bytes() == b"x"
    with pytest.raises(FileExistsError) as caught:
        files.make_folder(odd)
    assert caught.value.filename == str(odd)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"chunk_bytes": 1000}, "chunk_bytes is 1000"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"engine": "aio"}, "engine is aio"),
    ],
)
def test_bad_options_are_named(native, wrong, named):
    with pytest.raises(ValueError, match=named):
        native.FileSystem().write_images([], **{"chunk_bytes": PAGE} | wrong)
    with pytest.raises(ValueError, match=named):
        native.FileSystem().read_pieces([], [], **{"chunk_bytes": PAGE} | wrong)


def test_bad_pieces_are_named(native, tmp_path):
    files, path = native.FileSystem(), tmp_path / "a"
    files.write_file(path, bytes(10))
    for piece, named in [((1, 0, 1, 0), "file 1 of 1"), ((0, 5, 6, 0), "not inside"), ((0, 2**63, 2**63, 0), "inside")]:
        with pytest.raises(ValueError, match=named):
            files.read_pieces([(path, 10, [])], [piece], chunk_bytes=PAGE)
    with pytest.raises(ValueError, match="2 checksums for 1 chunks"):
        files.read_pieces([(path, 10, [1, 2])], [], chunk_bytes=PAGE)


def test_the_interpreter_goes_on_during_a_write(native, engine, tmp_path):
    """Another thread counts while this one writes: with the lock held it could not even start."""
    memory = Memory(64 * 256 * PAGE)
    begun, turns, stop = threading.Event(), [], threading.Event()

    def count() -> None:
        begun.set()
        while not stop.is_set():
            turns.append(1)
            stop.wait(0.0001)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is asked to give the lock up
    try:
        thread = threading.Thread(target=count)
        thread.start()
        begun.wait()
        seen = len(turns)
        native.FileSystem().write_images(
            [(tmp_path / "a", [memory.at(0, memory.view.size)])], chunk_bytes=256 * PAGE, engine=engine
        )
        during = len(turns) - seen
    finally:
        sys.setswitchinterval(before)
        stop.set()
        thread.join()
    assert during > 0


def resources() -> tuple[int, int, int]:
    """Descriptors, threads and KiB of resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident


def round_of_everything(native, folder, engine, memory) -> None:
    files = native.FileSystem(native.CallScript(record=True))
    path = folder / "a"
    image = [memory.at(1, 40 * PAGE), memory.at(0, 3)]
    report = files.write_images([(path, image)], chunk_bytes=8 * PAGE, engine=engine)
    read_all(native, files, path, 40 * PAGE + 3, report.crc32c[0], chunk_bytes=8 * PAGE, engine=engine)
    with pytest.raises(native.Corruption):
        files.read_pieces([(path, 40 * PAGE + 3, [0] * 6)], [], chunk_bytes=8 * PAGE, engine=engine, verify_all=True)
    files.remove_file(path)
    failing = native.FileSystem(native.CallScript(at=4, action="fail", error=errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        failing.write_images([(path, image)], chunk_bytes=8 * PAGE, engine=engine)
    files.remove_file(path)


@pytest.mark.parametrize("rounds", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_nothing_leaks(native, engine, tmp_path, rounds):
    memory = Memory(64 * PAGE)
    for _ in range(30):
        round_of_everything(native, tmp_path, engine, memory)
    descriptors, threads, resident = resources()
    for _ in range(rounds):
        round_of_everything(native, tmp_path, engine, memory)
    after = resources()
    assert after[:2] == (descriptors, threads)
    assert after[2] - resident < 8 * 1024  # a round moves 640 KiB
