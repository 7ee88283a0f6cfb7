"""`opensora-fast bench checkpoint`: saving and loading a state on this disk, against other ways to do the same.

All in one process and in turns: a save of ours, a copy of the state (in memory with as many threads; from a GPU to one
pinned block), `fio` with the same block size and depth, `torch.save` and PyTorch's distributed checkpoint (both synced
to the disk, as ours is); then the same state read back cold. Between the two, how much a computing thread loses while
a save goes on behind it.

    opensora-fast bench checkpoint [--device cuda] [--dir DIR] [--gib 4] [--rounds 5] [--out rows.jsonl] [--html FILE]
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from rich.progress import Progress
from torch import Tensor

from opensora_fast.arguments import Parser
from opensora_fast.checkpoint_folder import STEP_FOLDER, step_folders
from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.errors import UserError
from opensora_fast.native import native
from opensora_fast.profiling.ledger import Row
from opensora_fast.profiling.machine import this_machine
from opensora_fast.profiling.runtime_report import Claim, finish, row, with_claims
from opensora_fast.profiling.timing import Timing
from opensora_fast.train.checkpoint import CHUNK_BYTES, RunFolder
from opensora_fast.train.checkpoint_writer import DEPTH, WRITER_THREADS
from opensora_fast.train.staging import MOST_THREADS

State = dict[str, Tensor]
TENSOR_MIB = (192, 64, 48, 16, 1)  # sizes in turn, as those of a transformer's weights beside its biases
PRODUCT_SIDE = 512
COPY_THREADS = min(MOST_THREADS, torch.get_num_threads())  # as many as a snapshot takes


def main(argv: list[str]) -> int:
    """Returns 0 when all was measured, whatever the figures. Raises UserError for a place that cannot hold it."""
    parser = Parser(prog="opensora-fast bench checkpoint", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="a folder of the disk to measure (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the state is (%(default)s)")
    parser.add_argument("--gib", type=float, default=4.0, help="size of the state; thrice as much memory is needed")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    parser.add_argument("--html", type=Path, help="write a page with bars")
    options = parser.parse_args(argv)
    if options.gib * 2**30 < CHUNK_BYTES or options.rounds < 2:
        raise UserError(f"--gib {options.gib} --rounds {options.rounds}: use 0.02 and two rounds, or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; leave it out")
    options.dir.mkdir(parents=True, exist_ok=True)
    needed = 3 * options.gib * 2**30
    if shutil.disk_usage(options.dir).free < needed:
        raise UserError(f"--dir {options.dir}: {needed / 2**30:.1f} GiB are needed there; free some or lower --gib")
    with tempfile.TemporaryDirectory(prefix="checkpoint-bench-", dir=options.dir) as folder:
        rows = measure(Path(folder), int(options.gib * 2**30), options.rounds, torch.device(options.device))
    note = (
        f"{options.gib:g} GiB of random tensors; medians of {options.rounds} rounds, in turns in one process; "
        "saves end when the disk has everything; loads begin with nothing in the page cache"
    )
    finish(rows, title="Checkpoints", note=note, charts=[], out=options.out, html=options.html)
    return 0


def measure(folder: Path, num_bytes: int, rounds: int, device: torch.device) -> list[Row]:
    """The rows of a state of about so many bytes on `device`, saved to and loaded from `folder`."""
    state = random_state(num_bytes, device)
    total = sum(tensor.nbytes for tensor in state.values())
    checksums = checksums_of(state)
    with Progress(transient=True) as progress:
        task = progress.add_task("checkpoints", total=3 * rounds)
        seconds: dict[str, dict[str, list[float]]] = {}

        def take(case: str, provider: str, taken: float) -> None:
            seconds.setdefault(case, {}).setdefault(provider, []).append(taken)

        slowdowns = []
        copy: Memcpy | PinnedCopy = Memcpy(total) if device.type == "cpu" else PinnedCopy(total, device)
        run = RunFolder(folder / "ours", keep=2 * rounds)  # what is removed is removed between the turns, as for all
        run.prepare(state)
        others = {"torch.save": _torch_save, "torch.distributed.checkpoint": _dcp_save}
        for number in range(rounds):
            stall, published = _save_ours(run, number, state)
            take("trainer blocked", "ours", stall)
            take("save", "ours", published)
            take("written behind it", "ours", published - stall)
            take("trainer blocked", copy.name, copy.seconds(state))
            if shutil.which("fio"):
                take("written behind it", "fio", _fio(folder, total))
            for name, save in others.items():
                take("save", name, save(folder / name, state))
            progress.advance(task)
        run.keep = 1  # now as in training: the one before goes too
        for number in range(rounds):
            slowdowns.append(_slowdown(run, rounds + number, state))
            progress.advance(task)
        run.close()
        del copy
        for _ in range(rounds):
            take("load", "ours", _load(folder / "ours", state, _load_ours, checksums))
            take(
                "load",
                "torch.distributed.checkpoint",
                _load(folder / "torch.distributed.checkpoint", state, _load_dcp, checksums),
            )
            take("load", "torch.load", _load(folder / "torch.save", state, _load_torch, {}))
            progress.advance(task)
    return _rows(seconds, total, slowdowns, device)


def _rows(
    seconds: dict[str, dict[str, list[float]]], total: int, slowdowns: list[float], device: torch.device
) -> list[Row]:
    machine = this_machine()
    timings = {case: {name: Timing.of(taken) for name, taken in of.items()} for case, of in seconds.items()}

    def ratio(case: str, ours: str, other: str) -> float:
        """Median over the rounds: neighbours come and go, and a round sees the same ones."""
        pairs = zip(seconds[case][ours], seconds[case][other], strict=True)
        return statistics.median(theirs / mine for mine, theirs in pairs)

    def claim(name: str, value: float, aim: float, *, at_most: bool = False) -> Claim:
        return Claim(name=name, value=value, aim=aim, at_most=at_most, unit="x")

    (copy,) = timings["trainer blocked"].keys() - {"ours"}
    claims = {
        "trainer blocked": [
            claim(
                "trainer blocked, in copies of the state",
                1 / ratio("trainer blocked", "ours", copy),
                1.1,
                at_most=True,
            )
        ],
        "save": [
            claim("save against torch.save", ratio("save", "ours", "torch.save"), 2.0),
            claim("save against DCP's file writer", ratio("save", "ours", "torch.distributed.checkpoint"), 1.5),
        ],
        "written behind it": [],
        "load": [
            claim("cold load against torch.load", ratio("load", "ours", "torch.load"), 2.0),
            claim("cold load against DCP's file reader", ratio("load", "ours", "torch.distributed.checkpoint"), 1.5),
        ],
    }
    if "fio" in timings["written behind it"]:
        claims["written behind it"].append(
            claim("background rate in fio's", ratio("written behind it", "ours", "fio"), 0.85)
        )
    slowdown = Claim(
        name="a computing thread's loss", value=100 * statistics.median(slowdowns), aim=5, at_most=True, unit="%"
    )
    claims["written behind it"].append(slowdown)
    rows = []
    for case, of in timings.items():
        for name, timing in of.items():
            made = row(machine, device.type, "checkpoint", case, name, timing, total)
            rows.append(with_claims(made, claims[case]) if name == "ours" else made)
    if "fio" not in timings["written behind it"]:
        missing = {**rows[0], "case": "written behind it", "provider": "fio", "status": "failed"}
        rows.append(missing | {"reason": "fio is not installed", "claims": []})
    return rows


def random_state(num_bytes: int, device: torch.device) -> State:
    """Tensors of mixed sizes with random bytes in them, float32 as an optimiser's state is."""
    state: State = {}
    generator = torch.Generator().manual_seed(0)
    left = num_bytes
    while left >= 4:
        size = min(left, TENSOR_MIB[len(state) % len(TENSOR_MIB)] << 20)
        state[f"model.{len(state)}"] = torch.rand(size // 4, generator=generator).to(device)
        left -= size // 4 * 4
    return state


def checksums_of(state: State) -> dict[str, int]:
    checksums = {}
    for name, tensor in state.items():
        in_memory = tensor.cpu()
        checksums[name] = native().crc32c(in_memory.data_ptr(), in_memory.nbytes)
    return checksums


class Memcpy:
    """The C library's memcpy of a state by several threads, into memory that is already there."""

    name = f"memcpy, {COPY_THREADS} threads"

    def __init__(self, num_bytes: int) -> None:
        self._target = torch.zeros(num_bytes, dtype=torch.uint8)
        self._pool = ThreadPoolExecutor(COPY_THREADS)

    def seconds(self, state: State) -> float:
        """Each thread copies an equal share of every tensor."""
        jobs: list[list[tuple[int, int, int]]] = [[] for _ in range(COPY_THREADS)]
        target = self._target.data_ptr()
        for tensor in state.values():
            share = -(-tensor.nbytes // COPY_THREADS)
            for thread, begin in enumerate(range(0, tensor.nbytes, share)):
                jobs[thread].append((target + begin, tensor.data_ptr() + begin, min(share, tensor.nbytes - begin)))
            target += tensor.nbytes
        begun = time.perf_counter()
        list(self._pool.map(lambda job: [ctypes.memmove(*piece) for piece in job], jobs))
        return time.perf_counter() - begun


class PinnedCopy:
    """As many bytes from a CUDA device to one block of pinned memory: what the bus can do."""

    name = "one copy to pinned memory"

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
        self._target = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def seconds(self, state: State) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        self._target.copy_(self._source, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - begun


# Saves: seconds until the disk has everything.


def _save_ours(run: RunFolder, step: int, state: State) -> tuple[float, float]:
    """Seconds until the state may change again, and until the checkpoint is published."""
    cuda = torch.cuda.is_initialized()
    if cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run.save(step, state, {}, {"name": "bench"})
    if cuda:
        run.order_update()
        torch.cuda.current_stream().synchronize()
    staged = time.perf_counter() - begun
    run.wait()
    published = time.perf_counter() - begun
    _remove_before(run, step)
    return staged, published


def _remove_before(run: RunFolder, step: int) -> None:
    for folder in step_folders(run.path):
        if folder.name != STEP_FOLDER.format(step):
            shutil.rmtree(folder)


def _torch_save(path: Path, state: State) -> float:
    path.unlink(missing_ok=True)
    begun = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begun


def _dcp_save(path: Path, state: State) -> float:
    shutil.rmtree(path, ignore_errors=True)
    begun = time.perf_counter()
    with _no_process_group():
        writer = dcp.FileSystemWriter(path, single_file_per_rank=False, sync_files=True, thread_count=WRITER_THREADS)
        dcp.save(dict(state), storage_writer=writer, no_dist=True)
    return time.perf_counter() - begun


@contextmanager
def _no_process_group() -> Iterator[None]:
    """DCP without its warning that there is no process group: none is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        yield


def _fio(folder: Path, num_bytes: int) -> float:
    """Seconds that fio takes to write as much with direct I/O, by its own clock."""
    target = folder / "fio"
    command = ["fio", "--name=write", f"--filename={target}", "--rw=write", f"--bs={CHUNK_BYTES}"]
    command += [f"--iodepth={DEPTH}", "--ioengine=io_uring", "--direct=1", "--end_fsync=1", f"--size={num_bytes}"]
    done = subprocess.run([*command, "--output-format=json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"fio failed ({done.stderr.strip().splitlines()[-1:]}): mend it, or take it off PATH")
    target.unlink()
    return json.loads(done.stdout)["jobs"][0]["write"]["runtime"] / 1e3


# A computing thread.


def _products_per_second(until: Callable[[], bool]) -> float:
    a, b = torch.rand(PRODUCT_SIDE, PRODUCT_SIDE), torch.rand(PRODUCT_SIDE, PRODUCT_SIDE)
    out = torch.empty_like(a)
    count, begun = 0, time.perf_counter()
    while not until():
        torch.mm(a, b, out=out)
        count += 1
    return count / (time.perf_counter() - begun)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _slowdown(run: RunFolder, step: int, state: State) -> float:
    """The share of its products that one computing thread loses while a save is written behind it."""
    with _one_thread():
        run.save(step, state, {}, {"name": "bench"})
        waiter = threading.Thread(target=run.wait)
        begun = time.perf_counter()
        waiter.start()
        busy = _products_per_second(lambda: not waiter.is_alive())
        waiter.join()
        end = 2 * time.perf_counter() - begun  # as long again, with nothing behind it
        quiet = _products_per_second(lambda: time.perf_counter() > end)
    return 1 - busy / quiet


# Loads: seconds from a cold page cache into tensors that are there; torch.load makes its own.


def _load(path: Path, state: State, load: Callable[[Path, State], None], checksums: dict[str, int]) -> float:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            _drop_from_page_cache(file)
    if checksums:
        for tensor in state.values():
            tensor.fill_(torch.nan)
    begun = time.perf_counter()
    load(path, state)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    if checksums and checksums_of(state) != checksums:
        raise RuntimeError(f"{path}: what was loaded is not what was saved")
    return seconds


def _drop_from_page_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _load_ours(path: Path, state: State) -> None:
    CheckpointReader(step_folders(path)[-1]).read(state)


def _load_dcp(path: Path, state: State) -> None:
    with _no_process_group():
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)


def _load_torch(path: Path, state: State) -> None:
    torch.load(path, mmap=False, weights_only=True, map_location=next(iter(state.values())).device)
