"""Saving leaves threads, file descriptors and memory where they were."""

import errno
import importlib.util
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensora_fast.errors import UserError

spec = importlib.util.spec_from_file_location("crash_host", Path(__file__).with_name("crash_host.py"))
crash_host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(crash_host)
states = crash_host.load("saved_states.py")

OWN = Path(__file__).name
WARM_UP = 30
ALLOWED_GROWTH = 3 << 20  # a page lost by every one of 1,000 saves would be 4 MiB


def holdings() -> dict[str, int]:
    """What this process holds now, once threads that were joined are gone: the system lists them a moment longer."""
    limit = time.monotonic() + 5
    while (threads := len(os.listdir("/proc/self/task"))) > 1 and time.monotonic() < limit:
        os.sched_yield()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "threads": threads,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    }


# These run in a process of their own, so that nothing else allocates there.


def saves(run: str, count: int, answer: str) -> None:
    before = holdings()
    folder = states.open_run(run)
    rows = []
    for step in range(1, WARM_UP + count + 1):
        states.save(folder, step)
        if step % 2 == 0:  # two in flight
            folder.wait()
        if step in (WARM_UP, WARM_UP + count):
            folder.wait()
            rows.append(holdings())
    folder.close()
    del folder
    Path(answer).write_text(json.dumps([before, *rows, holdings()]))


def failing_saves(run: str, count: int, answer: str) -> None:
    choice, rows = random.Random(0), []
    for number in range(WARM_UP + count):
        error, at = choice.choice([errno.EIO, errno.ENOSPC]), choice.randrange(60)
        folder = states.open_run(run, states.C.CallScript(at=at, action="fail", error=error), say=lambda line: None)
        try:
            states.save(folder, number + 1)
            folder.wait()
        except UserError:
            pass
        folder.close()
        if number + 1 in (WARM_UP, WARM_UP + count):
            del folder
            rows.append(holdings())
    Path(answer).write_text(json.dumps(rows))


def restores(run: str, count: int, answer: str) -> None:
    states.save_steps(run, [[1], [2]])
    rows = []
    for number in range(WARM_UP + count):
        assert not states.broken(Path(run), 2)
        if number + 1 in (WARM_UP, WARM_UP + count):
            rows.append(holdings())
    Path(answer).write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def host() -> Iterator:
    host = crash_host.CrashHost()
    yield host
    host.close()


def _rows(host, folder: Path, function: str, count: int) -> list[dict[str, int]]:
    arguments = {"run": str(folder / "run"), "count": count, "answer": str(folder / "answer")}
    assert host.run(f"{OWN}:{function}", arguments) == 0
    return json.loads((folder / "answer").read_text())


def _same(warm: dict[str, int], after: dict[str, int]) -> None:
    assert after["threads"] == warm["threads"]
    assert after["descriptors"] == warm["descriptors"]
    assert after["bytes"] - warm["bytes"] < ALLOWED_GROWTH


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_saves_leave_nothing_behind(host, tmp_path: Path, count: int) -> None:
    before, warm, after, closed = _rows(host, tmp_path, "saves", count)
    _same(warm, after)
    assert closed["threads"] == before["threads"]
    assert closed["descriptors"] == before["descriptors"]
    assert len(list((tmp_path / "run").iterdir())) == 1 + states.KEEP  # LATEST and the steps


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_failed_saves_and_opened_runs_leave_nothing_behind(host, tmp_path: Path, count: int) -> None:
    _same(*_rows(host, tmp_path, "failing_saves", count))


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_verifying_and_restoring_leave_nothing_behind(host, tmp_path: Path, count: int) -> None:
    _same(*_rows(host, tmp_path, "restores", count))
