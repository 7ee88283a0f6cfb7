"""A run's checkpoints: what comes back, what is kept, and what a failure leaves. Cuts are in test_checkpoint_*.py."""

import errno
import gc
import json
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.errors import UserError
from opensora_fast.kernels import extension
from opensora_fast.manifest import MANIFEST, read_manifest, sealed
from opensora_fast.train.checkpoint import Restored, RunFolder
from opensora_fast.train.checkpoint_writer import ImageWriter, _in_parts, _merged
from opensora_fast.train.save_queue import SaveQueue

C = extension.load().module
RECIPE = {"name": "test", "model": {"width": 4}}


def _tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((3, 4), value), "updates.weight": torch.tensor(value)}


def _architecture(recipe: dict) -> dict:
    return recipe["model"]


def _restore(run: RunFolder) -> tuple[dict[str, torch.Tensor], Restored | None]:
    tensors = _tensors(-1.0)
    return tensors, run.restore(tensors, RECIPE, _architecture)


def _save(run: RunFolder, step: int) -> Path:
    """Save the step and wait for it."""
    run.save(step, _tensors(step), {}, RECIPE)
    published = run.wait()
    assert published is not None
    return published


@pytest.fixture
def open_run(tmp_path: Path) -> Iterator[Callable[..., RunFolder]]:
    """open_run(keep=..., script=..., **options): a run in tmp_path; closed in the end."""
    runs = []

    def opened(keep: int = 3, script: object = None, path: Path = tmp_path, **options: object) -> RunFolder:
        runs.append(RunFolder(path, keep, files=C.FileSystem(script), **options))
        return runs[-1]

    yield opened
    for run in runs:
        run.close()


def test_saved_state_comes_back_with_its_progress(tmp_path: Path, open_run) -> None:
    run = open_run(path=tmp_path / "new" / "run")
    assert _restore(run)[1] is None
    assert run.wait() is None
    run.save(7, _tensors(0.25), {"loader": {"epoch": 1}}, RECIPE)
    folder = run.wait()
    tensors, restored = _restore(run)
    assert restored == Restored(folder, {"loader": {"epoch": 1}, "step": 7}, ())
    assert folder == tmp_path / "new" / "run" / "step-7"
    assert all(torch.equal(tensors[name], value) for name, value in _tensors(0.25).items())
    assert (run.path / "LATEST").read_text() == "step-7"
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "rank-0-1.bin"]


def test_the_manifest_says_what_made_it(open_run) -> None:
    manifest = read_manifest(_save(open_run(), 3))
    assert manifest.world == {"ranks": 1}
    assert manifest.recipe == RECIPE
    assert manifest.progress == {"step": 3}
    assert manifest.versions["torch"] == torch.__version__


def test_what_changes_after_a_save_is_not_in_it(open_run) -> None:
    """Saves are still being written while their tensors, progress and recipe change."""
    run = open_run(keep=10)
    tensors, progress, recipe = _tensors(0.0), {"loader": [0]}, {"name": "test", "model": {"width": 4}}
    for step in range(1, 9):
        for tensor in tensors.values():
            tensor.fill_(step)
        progress["loader"][0] = step
        run.save(step, tensors, progress, recipe)
        for tensor in tensors.values():
            tensor.fill_(-step)
        progress["loader"][0] = -step
    run.wait()
    for folder in (run.path / f"step-{step}" for step in range(1, 9)):
        run.path.joinpath("LATEST").write_text(folder.name)
        step = int(folder.name[5:])
        manifest = read_manifest(folder)
        assert manifest.progress == {"loader": [step], "step": step}
    tensors, restored = _restore(run)
    assert restored.progress["step"] == 8
    assert tensors["model.weight"].eq(8).all()


def test_only_the_newest_are_kept_by_number_not_by_name(tmp_path: Path, open_run) -> None:
    run = open_run(keep=2)
    for step in (9, 10, 100):
        _save(run, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-10", "step-100"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path, open_run) -> None:
    run = open_run(keep=1)
    first = _save(run, 5)
    for value in (0.5, 0.75):
        run.save(5, _tensors(value), {"finished": value}, RECIPE)
        assert run.wait() == first
        tensors, restored = _restore(run)
        assert restored.progress == {"finished": value, "step": 5}
        assert torch.equal(tensors["model.weight"], _tensors(value)["model.weight"])
    assert len(list(first.iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-5"]


@pytest.mark.parametrize("damage", ["bit", "truncated", "no data", "no manifest", "manifest"])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path: Path, open_run, damage: str) -> None:
    run = open_run()
    _save(run, 1)
    newest = _save(run, 2)
    data = newest / "rank-0-1.bin"
    match damage:
        case "bit":
            data.write_bytes(data.read_bytes()[:-1] + b"\1")
        case "truncated":
            data.write_bytes(data.read_bytes()[:40])
        case "no data":
            data.unlink()
        case "no manifest":
            (newest / MANIFEST).unlink()
        case "manifest":
            (newest / MANIFEST).write_bytes((newest / MANIFEST).read_bytes().replace(b"model", b"Model"))
    tensors, restored = _restore(run)
    assert restored is not None
    assert restored.progress["step"] == 1
    assert tensors["model.weight"].eq(1).all()
    (line,) = restored.damaged
    assert str(newest) in line
    assert (MANIFEST if "manifest" in damage else "rank-0-1.bin") in line
    assert "\n" not in line
    assert (tmp_path / "LATEST").read_text() == "step-1"
    assert not newest.exists()
    assert len(list(tmp_path.glob("step-2.damaged-*"))) == 1
    _save(run, 2)
    assert _restore(run)[1].progress["step"] == 2


def test_nothing_readable_is_an_error_not_a_fresh_start(open_run) -> None:
    run = open_run()
    (_save(run, 1) / MANIFEST).unlink()
    with pytest.raises(UserError, match="--fresh"):
        _restore(run)


def test_a_newer_format_is_not_passed_over(tmp_path: Path, open_run) -> None:
    run = open_run()
    _save(run, 1)
    path = _save(run, 2) / MANIFEST
    fields = json.loads(path.read_bytes()) | {"format": 2}
    del fields["crc32c"]
    path.write_bytes(sealed(json.dumps(fields).encode()[1:]))
    with pytest.raises(UserError, match="step-2.*format 2 is newer than this version reads .*: update opensora-fast"):
        _restore(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-1", "step-2"]


def test_a_checkpoint_without_a_moving_average_is_not_passed_over(tmp_path: Path, open_run) -> None:
    """One was kept at first, then not, and now it is asked for again: nothing is damaged."""
    run = open_run()
    averaged = {"ema.weight": torch.ones(3)}
    for step, more in ((1, averaged), (2, {}), (3, {})):
        run.save(step, _tensors(step) | more, {}, RECIPE)
    run.wait()
    expected = r"step-3 keeps no moving average: use --optimizer.ema_decay None, or name another --out$"
    with pytest.raises(UserError, match=expected):
        run.restore(_tensors(0.0) | averaged, RECIPE, _architecture)
    with pytest.raises(UserError, match=r"step-3 lacks model.more: name another --out$"):
        run.restore(_tensors(0.0) | {"model.more": torch.ones(3)}, RECIPE, _architecture)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-1", "step-2", "step-3"]
    assert _restore(run)[1].progress["step"] == 3


@pytest.mark.parametrize("error", [errno.EACCES, errno.EMFILE, errno.ENOMEM], ids=errno.errorcode.get)
def test_what_cannot_be_read_now_is_not_passed_over(tmp_path: Path, open_run, error: int, monkeypatch) -> None:
    run = open_run()
    for step in (1, 2):
        _save(run, step)
    told = r"^checkpoint .*step-2 cannot be read now \(.*: rank-0-1\.bin\): mend that, then run again$"
    with pytest.raises(UserError, match=told):
        _restore(open_run(script=C.CallScript(at=0, action="fail", error=error)))
    with monkeypatch.context() as patch:

        def read_bytes(path: Path) -> bytes:
            raise OSError(error, "Odd", str(path))

        patch.setattr(Path, "read_bytes", read_bytes)
        with pytest.raises(UserError, match=r"step-2/manifest\.json: not readable \(Odd\): mend that, then run again$"):
            _restore(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-1", "step-2"]


def test_what_the_disk_has_lost_is_passed_over(open_run) -> None:
    run = open_run()
    for step in (1, 2):
        _save(run, step)
    _, restored = _restore(open_run(script=C.CallScript(at=0, action="fail", error=errno.EIO)))
    assert restored.progress["step"] == 1
    (line,) = restored.damaged
    assert line.endswith("step-2: rank-0-1.bin cannot be read (Input/output error)")


def test_another_architecture_is_named(open_run) -> None:
    run = open_run()
    run.save(1, _tensors(1.0), {}, {**RECIPE, "model": {"width": 8}})
    run.wait()
    with pytest.raises(UserError, match="width is 8, the recipe says 4"):
        _restore(run)


def _calls_of_a_save(open_run, tmp_path: Path) -> list[tuple]:
    """What the second save of a run calls, when the first has been pruned by it."""
    script = C.CallScript(record=True)
    run = open_run(keep=1, script=script, path=tmp_path / "recorded")
    _save(run, 1)
    before = len(script.calls())
    _save(run, 2)
    return script.calls()[before:]


def test_the_order_of_a_commit(tmp_path: Path, open_run) -> None:
    calls = []
    for name, path, *_ in _calls_of_a_save(open_run, tmp_path):
        relative = Path(path).relative_to(tmp_path / "recorded")
        calls.append((name, "/".join(part.split(".tmp-")[0] + ".tmp" * (".tmp-" in part) for part in relative.parts)))
    step = [call for call in calls if call[0] not in ("allocate", "truncate", "write")]
    assert step == [
        ("mkdir", "step-2.tmp"),
        ("create", "step-2.tmp/rank-0-1.bin"),
        ("sync", "step-2.tmp/rank-0-1.bin"),
        ("create", "step-2.tmp/manifest.json"),
        ("sync", "step-2.tmp/manifest.json"),
        ("sync_folder", "step-2.tmp"),
        ("rename", "step-2.tmp"),
        ("sync_folder", ""),
        ("create", "LATEST.tmp"),
        ("sync", "LATEST.tmp"),
        ("rename", "LATEST.tmp"),
        ("sync_folder", ""),
        ("rename", "step-1"),
        ("sync_folder", ""),
        *[call for call in step if call[0] == "remove"],
        ("remove_folder", "step-1.tmp"),
    ]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_save_that_fails_anywhere_leaves_the_last_good_one(tmp_path: Path, open_run, error: int) -> None:
    """Each call of a save fails once: before the new step is published the old one stays; after it the new one does."""
    calls = [call[0] for call in _calls_of_a_save(open_run, tmp_path)]
    pruning = len(calls) - calls[::-1].index("sync_folder") - 2  # from here on, nothing is lost by a failure
    for at in range(len(calls)):
        said: list[str] = []
        run = open_run(keep=1, path=tmp_path / str(at), say=said.append)
        _save(run, 1)
        run.close()
        script = C.CallScript(at=at, action="fail", error=error)
        run = open_run(keep=1, script=script, path=tmp_path / str(at), say=said.append)
        run.save(2, _tensors(2.0), {}, RECIPE)
        if at >= pruning:
            assert run.wait() == run.path / "step-2"
            assert "cannot be removed" in said[-1]
        else:
            with pytest.raises(UserError, match=r"(No space left|Input/output).*mend the disk.*to resume$") as raised:
                run.wait()
            published = (run.path / "step-2").exists()
            assert ("step-2: published, but LATEST" if published else "step-2: not saved") in str(raised.value)
            assert run.wait() == (run.path / "step-2" if published else None)  # told once
            unfinished = [path.name for path in run.path.iterdir() if ".tmp-" in path.name]
            assert not unfinished, calls[at]
        tensors, restored = _restore(run)
        assert restored.damaged == ()
        assert tensors["model.weight"].eq(restored.progress["step"]).all()
        assert (run.path / "LATEST").read_text() in [path.name for path in run.path.glob("step-*")]
        assert _save(run, 3) == run.path / "step-3"
        assert [path.name for path in run.path.glob("step-*")] == ["step-3"], calls[at]


def test_a_failure_that_a_later_save_makes_up_for_is_said(tmp_path: Path) -> None:
    """Two in flight, of which the first fails: the state is safe, and what ends with `wait` ends well."""
    held, said = HeldBack(failing=1), []
    held.release.set()
    with closing(RunFolder(tmp_path, 3, files=held, say=said.append)) as run:
        for step in (1, 2):
            run.save(step, _tensors(step), {}, RECIPE)
        assert run.wait() == tmp_path / "step-2"
        (line,) = said
        assert "step-1: not saved (No space left on device" in line
        assert line.endswith("a later one is saved")
        held.failing = 1
        run.save(3, _tensors(3.0), {}, RECIPE)
        with pytest.raises(UserError, match="step-3: not saved"):
            run.wait()


def test_a_failure_that_is_not_the_disks_does_not_blame_it(open_run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ImageWriter, plan: object) -> None:
        raise ValueError("odd plan")

    monkeypatch.setattr(ImageWriter, "prepare_local_plan", refuse)
    run = open_run()
    run.save(1, _tensors(1.0), {}, RECIPE)
    with pytest.raises(UserError, match=r"step-1: not saved \(odd plan\): run the same command to resume$"):
        run.wait()


def test_what_goes_wrong_after_a_failure_does_not_hide_it(open_run, monkeypatch: pytest.MonkeyPatch) -> None:
    def abandon(self: ImageWriter) -> None:
        raise MemoryError("out of everything")

    run = open_run(script=C.CallScript(at=3, action="fail", error=errno.EIO))
    monkeypatch.setattr(ImageWriter, "abandon", abandon)
    run.save(1, _tensors(1.0), {}, RECIPE)
    with pytest.raises(MemoryError):
        run.wait()
    with pytest.raises(UserError, match="step-1: not saved"):
        run.wait()
    for step in (2, 3, 4):
        assert _save(run, step) == run.path / f"step-{step}"


def test_work_that_raises_does_not_keep_back_what_comes_after_it() -> None:
    queue, done, begin = SaveQueue("work"), [], threading.Event()

    def fail() -> None:
        begin.wait()
        raise RuntimeError("odd work")

    for work in (fail, lambda: done.append(1), fail):
        queue.submit(work)
    begin.set()
    with pytest.raises(RuntimeError, match="odd work"):
        queue.join()
    assert done == [1]
    assert not queue.working
    queue.submit(lambda: done.append(2))
    queue.join()
    assert done == [1, 2]


def test_without_a_thread_a_save_fails_as_others_do(open_run, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    run = open_run()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for step in (1, 2, 3):  # no arena is lost
            run.save(step, _tensors(step), {}, RECIPE)
    with pytest.raises(UserError, match="step-1: not saved .can't start new thread.: run the same command to resume"):
        run.check()
    assert _save(run, 4) == run.path / "step-4"


def test_close_gives_the_memory_back(open_run) -> None:
    run = open_run()
    _save(run, 1)
    memory = [weakref.ref(arena._memory.native) for arena in run._stager._arenas]
    assert all(reference() for reference in memory)
    run.close()
    gc.collect()
    assert not any(reference() for reference in memory)


def test_a_failure_is_raised_once_by_the_next_check(open_run) -> None:
    run = open_run(script=C.CallScript(at=3, action="fail", error=errno.EIO))
    run.save(1, _tensors(1.0), {}, RECIPE)
    run._queue.join()
    with pytest.raises(UserError, match="step-1: not saved"):
        run.check()
    run.check()
    assert run.wait() is None
    assert _save(run, 2) == run.path / "step-2"


def test_training_may_go_on_without_a_checkpoint(open_run) -> None:
    said: list[str] = []
    script = C.CallScript(at=3, action="fail", error=errno.ENOSPC)
    run = open_run(script=script, on_failure="go_on", say=said.append)
    run.save(1, _tensors(1.0), {}, RECIPE)
    run._queue.join()
    run.check()
    run.check()
    (line,) = [line for line in said if "not saved" in line]
    assert "No space left on device" in line
    assert line.endswith("training goes on")
    assert _save(run, 2) == run.path / "step-2"


def test_the_last_save_has_to_succeed_even_so(open_run) -> None:
    run = open_run(script=C.CallScript(at=3, action="fail", error=errno.ENOSPC), on_failure="go_on")
    run.save(1, _tensors(1.0), {}, RECIPE)
    with pytest.raises(UserError, match="not saved"):
        run.wait()


class HeldBack:
    """A file system whose data wait for `release`; the next `failing` times there is no room for them."""

    def __init__(self, failing: int = 0) -> None:
        self.files = C.FileSystem()
        self.release = threading.Event()
        self.failing = failing

    def __getattr__(self, name: str) -> object:
        return getattr(self.files, name)

    def write_images(self, *args: object, **options: object) -> object:
        self.release.wait()
        if self.failing:
            self.failing -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.files.write_images(*args, **options)


def test_a_third_save_waits_and_says_so(tmp_path: Path) -> None:
    held, said = HeldBack(), []

    def say(line: str) -> None:
        said.append(line)
        held.release.set()

    run = RunFolder(tmp_path, 3, files=held, say=say)
    run.prepare(_tensors(0.0))
    for step in (1, 2):
        run.save(step, _tensors(step), {}, RECIPE)
    assert said == []
    assert list(tmp_path.glob("step-?")) == []
    run.save(3, _tensors(3.0), {}, RECIPE)
    assert "step 3: waits" in said[0]
    assert run.wait() == tmp_path / "step-3"
    for step in (1, 2, 3):
        assert read_manifest(tmp_path / f"step-{step}").step == step
    run.close()
    assert "checkpoints" not in [thread.name for thread in threading.enumerate()]


def test_a_process_that_leaves_finishes_its_saves(tmp_path: Path) -> None:
    """Neither an exception nor the interpreter's end loses a save, or waits for ever."""
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom opensora_fast.train.checkpoint import RunFolder\n"
        "run = RunFolder(Path(sys.argv[1]), 3)\n"
        "for step in (1, 2): run.save(step, {'w': torch.full((3000, 1000), float(step))}, {}, {'model': {}})\n"
        "raise KeyboardInterrupt"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert "KeyboardInterrupt" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert (tmp_path / "LATEST").read_text() == "step-2"
    tensors = {"w": torch.zeros(3000, 1000)}
    with closing(RunFolder(tmp_path, 3)) as run:
        assert run.restore(tensors, {"model": {}}, _architecture).progress["step"] == 2
    assert tensors["w"].eq(2).all()


def test_a_state_of_another_layout_is_saved_too(open_run) -> None:
    run = open_run()
    _save(run, 1)
    grown = {"model.weight": torch.rand(300, 4), "more": torch.arange(5)}
    run.save(2, grown, {}, RECIPE)
    run.wait()
    tensors = {name: torch.zeros_like(tensor) for name, tensor in grown.items()}
    assert run.restore(tensors, RECIPE, _architecture)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in grown.items())


def test_a_layout_is_planned_once_and_again_after_a_failure(open_run, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    plan = DefaultSavePlanner.create_local_plan
    monkeypatch.setattr(DefaultSavePlanner, "create_local_plan", lambda self: planned.append(self) or plan(self))
    files = HeldBack()
    files.release.set()
    run = RunFolder(open_run().path, 9, files=files)
    for step in (1, 2, 3):
        _save(run, step)
    assert len(planned) == 1
    monkeypatch.setattr(files, "files", C.FileSystem(C.CallScript(at=4, action="fail", error=errno.EIO)))
    with pytest.raises(UserError, match="Input/output error"):
        _save(run, 4)
    assert len(planned) == 1
    for step in (4, 5):
        _save(run, step)
    assert len(planned) == 2
    for step in range(1, 6):
        assert CheckpointReader(run.path / f"step-{step}").verify() == []
        tensors = _tensors(-1.0)
        CheckpointReader(run.path / f"step-{step}").read(tensors)
        assert tensors["model.weight"].eq(step).all()
    run.close()


def _draws() -> tuple:
    return (
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        np.random.standard_normal(3).tolist(),
        random.random(),
        random.gauss(0, 1),
    )


@pytest.mark.parametrize("drawn", [0, 1])
def test_the_global_generators_go_on_where_they_were(open_run, drawn: int) -> None:
    """After an odd number of Gaussian numbers NumPy and Python hold back the other one of a pair."""
    for _ in range(drawn):
        _draws()
    run = open_run()
    run.save(1, _tensors(1.0), {}, RECIPE)
    expected = _draws()
    run.wait()
    _draws()
    assert _restore(run)[1]
    assert _draws() == expected


def test_unfinished_folders_are_never_read_and_the_next_save_removes_them(tmp_path: Path, open_run) -> None:
    run = open_run()
    for name in ("step-5.tmp-dead", "step-4.tmp-dead/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / MANIFEST).write_text("")
    (tmp_path / "LATEST.tmp-dead").write_text("step-5")
    assert _restore(run)[1] is None
    _save(run, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-6"]


@pytest.mark.parametrize("name", ["step-\N{SUPERSCRIPT TWO}", "step-007", "step-1.old", "step-"])
def test_folders_of_other_names_are_no_checkpoints(tmp_path: Path, open_run, name: str) -> None:
    run = open_run(keep=1)
    (tmp_path / name).mkdir()
    for step in (1, 2):
        _save(run, step)
    assert _restore(run)[1].progress["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["LATEST", "step-2", name])


def test_a_foreign_file_in_a_checkpoint_does_not_keep_it_from_being_replaced(open_run) -> None:
    run = open_run()
    folder = _save(run, 1)
    (folder / "rank-0-x.bin").write_text("")
    assert _save(run, 1) == folder
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "rank-0-2.bin"]


def test_what_a_link_points_to_stays(tmp_path: Path, open_run) -> None:
    run = open_run(keep=1, path=tmp_path / "run")
    _save(run, 1)
    elsewhere = tmp_path / "elsewhere"
    (run.path / "step-1").rename(elsewhere)
    (run.path / "step-1").symlink_to(elsewhere)
    (run.path / "samples").symlink_to(elsewhere)
    (run.path / "step-9.tmp-1").symlink_to(elsewhere)
    _save(run, 2)
    assert sorted(path.name for path in run.path.iterdir()) == ["LATEST", "samples", "step-2"]
    run.clear()
    assert list(run.path.iterdir()) == []
    assert len(list(elsewhere.iterdir())) == 2


def test_clear_leaves_what_is_not_the_runs(tmp_path: Path, open_run) -> None:
    run = open_run()
    run.write_recipe(RECIPE)
    _save(run, 1)
    (tmp_path / "step-3.damaged-1").mkdir()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.mp4").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    run.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"^--out .*: .*: name a folder that can be written$"):
            RunFolder(path, keep=1)
    denied = C.FileSystem(C.CallScript(at=0, action="fail", error=errno.EACCES))
    with pytest.raises(UserError, match=r"--out .*new: Permission denied"):
        RunFolder(tmp_path / "new", keep=1, files=denied)


def test_a_recipe_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    full = C.FileSystem(C.CallScript(at=0, action="fail", error=errno.ENOSPC))
    run = RunFolder(tmp_path, keep=1, files=full)
    with pytest.raises(UserError, match=r"recipe\.json: cannot be changed \(No space left on device"):
        run.write_recipe(RECIPE)
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 400))
def test_files_are_runs_of_tensors_of_about_as_many_bytes(sizes: list[int], chunk: int) -> None:
    parts = _in_parts(sizes, chunk)
    assert [size for part in parts for size in sizes[part]] == sizes
    assert len(parts) <= max(1, min(4, -(-sum(sizes) // chunk)))
    assert all(sum(sizes[part]) < sum(sizes) / len(parts) + 2 * max(sizes) for part in parts)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=20))
def test_extents_that_touch_become_one(gaps: list[tuple[int, int]]) -> None:
    extents, at = [], 0
    for bytes, gap in gaps:
        extents.append((at, bytes))
        at += bytes + gap
    merged = _merged(extents)
    assert [byte for start, bytes in merged for byte in range(start, start + bytes)] == [
        byte for start, bytes in extents for byte in range(start, start + bytes)
    ]
    assert all(sum(one) < other[0] for one, other in pairwise(merged))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_state_on_a_device_is_saved_while_the_next_step_runs(open_run) -> None:
    run = open_run()
    tensors = {"w": torch.zeros(2**22, device="cuda"), "count": torch.zeros((), device="cuda"), "host": torch.zeros(3)}
    run.prepare(tensors)
    for step in (1, 2, 3):
        torch.cuda._sleep(20_000_000)
        for tensor in tensors.values():
            tensor.fill_(step)
        run.save(step, tensors, {}, RECIPE)
        run.order_update()
        for tensor in tensors.values():
            tensor.fill_(-1)
    expected = torch.rand(3, device="cuda")
    run.wait()
    assert run.restore(tensors, RECIPE, _architecture).progress["step"] == 3
    assert all(tensor.eq(3).all() for tensor in tensors.values())
    assert torch.equal(torch.rand(3, device="cuda"), expected)
