"""A writer that is killed, and one whose system calls fail: the newest checkpoint that resume takes is whole."""

import errno
import importlib.util
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opensora_fast.errors import UserError

spec = importlib.util.spec_from_file_location("crash_host", Path(__file__).with_name("crash_host.py"))
crash_host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(crash_host)
states = crash_host.load("saved_states.py")

SAVES = "saved_states.py:save_steps"
GROUPS = [[1], [2], [3, 4], [4], [5, 6]]  # as in the test of power losses
ENGINES = ("auto", "pwrite")
SIGKILLED = -9
ALWAYS = 1_000_000


@pytest.fixture(scope="module")
def host() -> Iterator:
    host = crash_host.CrashHost()
    yield host
    host.close()


@pytest.fixture(scope="module")
def undisturbed(host, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, float]:
    """Calls and seconds of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    script = states.C.CallScript()
    run = states.open_run(folder / "counted", script)
    run.write_recipe(states.RECIPE)
    for group in GROUPS:
        for step in group:
            states.save(run, step)
        run.wait()
    run.close()
    seconds = []
    for number in range(3):
        begun = time.perf_counter()
        assert host.run(SAVES, {"run": str(folder / f"timed-{number}"), "groups": GROUPS}) == 0
        seconds.append(time.perf_counter() - begun)
    return script.count, min(seconds)


def _check(folder: Path, told: str) -> None:
    found = states.broken(folder / "run", states.acknowledged(folder / "acknowledged"))
    assert not found, f"{told}: {found}"


def _arguments(folder: Path, groups: list[list[int]], **script) -> dict:
    return {
        "run": str(folder / "run"),
        "groups": groups,
        "acknowledgements": str(folder / "acknowledged"),
        "script": script or None,
    }


@pytest.mark.parametrize("kills", [16, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_a_call(host, undisturbed: tuple[int, float], tmp_path: Path, kills: int) -> None:
    choice = random.Random(kills)
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        at, action = choice.randrange(undisturbed[0]), choice.choice(["kill", "kill_inside"])
        engine = choice.choice(ENGINES)
        status = host.run(SAVES, {**_arguments(folder, GROUPS, at=at, action=action), "engine": engine})
        assert status == SIGKILLED
        _check(folder, f"{action} at call {at}, {engine}")


@pytest.mark.parametrize("kills", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_time(host, undisturbed: tuple[int, float], tmp_path: Path, kills: int) -> None:
    choice, killed, longest = random.Random(kills), 0, undisturbed[1]
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        after = choice.uniform(0, longest)
        if host.run(SAVES, _arguments(folder, GROUPS), kill_after=after) == SIGKILLED:
            killed += 1
        else:
            longest = after  # it came too late: the host is faster now
        _check(folder, f"killed after {after:.4f} s")
    assert killed >= kills // 3


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_a_run_goes_on_and_leaves_nothing_unfinished(
    host, undisturbed: tuple[int, float], tmp_path: Path, kills: int
) -> None:
    choice, first = random.Random(kills), 1
    for _ in range(kills):
        groups = [[first + step for step in group] for group in GROUPS]
        at, action = choice.randrange(undisturbed[0]), choice.choice(["kill", "kill_inside"])
        assert host.run(SAVES, _arguments(tmp_path, groups, at=at, action=action)) == SIGKILLED
        _check(tmp_path, f"{action} at call {at} from step {first} on")
        first = max([first, *(int(path.name[5:]) for path in states.step_folders(tmp_path / "run"))])
    assert host.run(SAVES, _arguments(tmp_path, [[first + 1], [first + 2]])) == 0
    _check(tmp_path, "at the end")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"recipe.json", "LATEST", f"step-{first + 1}", f"step-{first + 2}"}


# Failing calls. A run has step-1 and step-2 and saves step-3, so that one is pruned as well.


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    states.save_steps(str(run), [[1], [2]])
    return run


@pytest.fixture(scope="module")
def calls_of_a_save(two_saved: Path) -> int:
    copy = two_saved.with_name("counted")
    shutil.copytree(two_saved, copy)
    return _saved_with_failures(copy, [], "auto")[0].count


def _saved_with_failures(run_path: Path, said: list[str], engine: str, **script):
    """Save step 3 with failing calls; gives the script and what was raised."""
    hold = states.C.CallScript(**script)
    error, run = None, states.open_run(run_path, hold, engine=engine, say=said.append)
    try:
        states.save(run, 3)
        run.wait()
    except UserError as raised:
        error = raised
    finally:
        run.close()
    return hold, error


def _points(calls: int, sample: int | None, seed: int) -> list[int]:
    return list(range(calls)) if sample is None else sorted(random.Random(seed).sample(range(calls), sample))


BOTH_ENGINES = pytest.mark.parametrize("engine", ENGINES)
SAMPLES = pytest.mark.parametrize("sample", [4, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])


@SAMPLES
@BOTH_ENGINES
@pytest.mark.parametrize("times", [1, ALWAYS], ids=["once", "for_good"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_the_trainer_hears_the_systems_reason_and_the_last_checkpoint_stays(
    two_saved: Path, calls_of_a_save: int, tmp_path: Path, engine: str, error: int, times: int, sample: int | None
) -> None:
    for at in _points(calls_of_a_save, sample, error + times):
        run, said = tmp_path / f"{at}" / "run", []
        shutil.copytree(two_saved, run)
        _, raised = _saved_with_failures(run, said, engine, at=at, action="fail", error=error, times=times)
        told = f"call {at}: raised {raised}, said {said}"
        assert os.strerror(error) in "\n".join([str(raised or ""), *said]), told
        assert "\n" not in str(raised), told
        published = (run / "LATEST").read_text() == "step-3"
        assert raised is not None or published, told
        found = states.broken(run, 2 if raised else 3)
        assert not found, f"{told}: {found}"
        states.save_steps(str(run), [[4], [5]])
        assert not states.broken(run, 5), told
        names = {path.name for path in run.iterdir()}
        assert names == {"recipe.json", "LATEST", "step-4", "step-5"}, told


@SAMPLES
@BOTH_ENGINES
@pytest.mark.parametrize("times", [1, 7])
@pytest.mark.parametrize(("action", "error"), [("fail", errno.EINTR), ("short", 0)], ids=["EINTR", "short"])
def test_interrupted_and_short_calls_are_continued(
    two_saved: Path,
    calls_of_a_save: int,
    tmp_path: Path,
    engine: str,
    action: str,
    error: int,
    times: int,
    sample: int | None,
) -> None:
    for at in _points(calls_of_a_save, sample, times):
        run, said = tmp_path / f"{at}" / "run", []
        shutil.copytree(two_saved, run)
        _, raised = _saved_with_failures(run, said, engine, at=at, action=action, error=error, times=times)
        assert raised is None, f"call {at}"
        found = states.broken(run, 3)
        assert not found, f"call {at}: {found}"
        assert {path.name for path in run.iterdir()} == {"recipe.json", "LATEST", "step-2", "step-3"}


def _step_until(run, told: Callable[[], bool]) -> str:
    """Call `check` as a trainer does every step, until it raises, which is what it gives, or until `told`."""
    limit = time.monotonic() + 60
    while not told() and time.monotonic() < limit:
        try:
            run.check()
        except UserError as error:
            return str(error)
    return ""


def test_a_failed_save_is_heard_at_the_next_step(two_saved: Path, tmp_path: Path) -> None:
    shutil.copytree(two_saved, tmp_path / "run")
    script = states.C.CallScript(at=3, action="fail", error=errno.ENOSPC, times=ALWAYS)
    run = states.open_run(tmp_path / "run", script)
    run.check()
    states.save(run, 3)
    told = _step_until(run, lambda: False)
    assert os.strerror(errno.ENOSPC) in told
    assert "step-3" in told
    run.close()
    assert not states.broken(tmp_path / "run", 2)


def test_told_to_go_on_training_says_it_once_and_saves_the_next_step(two_saved: Path, tmp_path: Path) -> None:
    shutil.copytree(two_saved, tmp_path / "run")
    said: list[str] = []
    script = states.C.CallScript(at=3, action="fail", error=errno.EIO)
    run = states.open_run(tmp_path / "run", script, on_failure="go_on", say=said.append)
    states.save(run, 3)
    assert not _step_until(run, lambda: bool(said))
    for _ in range(3):
        run.check()
    assert [os.strerror(errno.EIO) in line for line in said].count(True) == 1
    states.save(run, 4)
    assert run.wait() == tmp_path / "run" / "step-4"
    run.close()
    assert not states.broken(tmp_path / "run", 4)
    assert {path.name for path in (tmp_path / "run").glob("step-*")} == {"step-2", "step-4"}
