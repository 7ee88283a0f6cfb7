"""A run that was killed and started again has bitwise the losses and the weights of one that was not."""

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opensora_fast.train.index import index_folder
from opensora_fast.train.metrics import read_metrics
from opensora_fast.video_io import write_video

spec = importlib.util.spec_from_file_location("crash_host", Path(__file__).with_name("crash_host.py"))
crash_host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(crash_host)
training = crash_host.load("tiny_training.py")

TRAIN = "tiny_training.py:run_training"
SIGKILLED = -9


@pytest.fixture(scope="module")
def host() -> Iterator:
    host = crash_host.CrashHost()
    yield host
    host.close()


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, int]:
    """A run that nothing happened to: its dtype, its folder, the number of its files' calls."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return request.param, run, training.run_training(str(run), request.param)


def _losses(run: Path) -> list[tuple[str, int, float]]:
    return [(row["kind"], row["step"], row["loss"]) for row in read_metrics(run)]


def _finish_and_compare(host, whole: tuple[str, Path, int], run: Path, told: str) -> None:
    dtype, expected, _ = whole
    assert host.run(TRAIN, {"run": str(run), "dtype": dtype}) == 0, told
    assert _losses(run) == _losses(expected), told
    ours, theirs = training.final_state(run), training.final_state(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()), told


def test_the_losses_depend_on_all_that_is_saved(whole: tuple[str, Path, int]) -> None:
    losses = [loss for kind, _, loss in _losses(whole[1]) if kind == "step"]
    assert len(set(losses)) == training.STEPS
    names = training.final_state(whole[1]).keys()
    assert {name.split(".")[0] for name in names} >= {"model", "ema", "first_moment", "second_moment", "updates", "rng"}


@pytest.mark.parametrize("step", range(1, training.STEPS + 1))
def test_killed_in_a_step(host, whole: tuple[str, Path, int], tmp_path: Path, step: int) -> None:
    arguments = {"run": str(tmp_path / "run"), "dtype": whole[0], "die_at": step - 1}
    assert host.run(TRAIN, arguments) == SIGKILLED
    _finish_and_compare(host, whole, tmp_path / "run", f"killed in step {step}")


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_while_it_saves(host, whole: tuple[str, Path, int], tmp_path: Path, kills: int) -> None:
    choice = random.Random(kills)
    for number in range(kills):
        at, action = choice.randrange(whole[2]), choice.choice(["kill", "kill_inside"])
        run = tmp_path / str(number)
        arguments = {"run": str(run), "dtype": whole[0], "script": {"at": at, "action": action}}
        assert host.run(TRAIN, arguments) == SIGKILLED, f"{action} at call {at}"
        _finish_and_compare(host, whole, run, f"{action} at call {at}")


def test_killed_in_every_step_that_it_reaches(host, whole: tuple[str, Path, int], tmp_path: Path) -> None:
    for step in range(1, training.STEPS + 1):
        arguments = {"run": str(tmp_path / "run"), "dtype": whole[0], "die_at": step - 1}
        assert host.run(TRAIN, arguments) == SIGKILLED, f"step {step}"
    _finish_and_compare(host, whole, tmp_path / "run", "killed in every step")


def test_a_failed_save_that_training_goes_on_from_changes_no_loss(whole: tuple[str, Path, int], tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = {"at": whole[2] // 3, "action": "fail", "error": 28}
    training.run_training(str(run), whole[0], script=script, on_failure="go_on")
    assert _losses(run) == _losses(whole[1])


# A recipe as the command line runs it: clips are decoded by workers, and the model, small as it is, is the real one.

RECIPE = "tiny_training.py:run_recipe"
SMALL = ["--model.hidden_size", "32", "--model.num_heads", "1", "--model.axes_dim", "8", "12", "12"]
SMALL += ["--model.depth", "1", "--model.depth_single_blocks", "1", "--loop.device", "cpu"]
SMALL += ["--steps", "4", "--checkpoint.every", "2", "--data.workers", "1"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options naming an index of three short clips, which also serve as held-out ones."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        grid = torch.meshgrid(torch.arange(34) / 4, torch.arange(48) / 20, torch.arange(80) / 20, indexing="ij")
        frames = torch.stack([torch.sin(grid[0] + grid[1] * number + grid[2] + shade) for shade in range(3)])
        write_video(folder / f"{number}.mp4", frames, 12)
        (folder / f"{number}.txt").write_text(f"waves of kind {number}")
    index_folder(folder, folder / "index.parquet")
    return ["--data.index", str(folder / "index.parquet"), "--data.heldout_index", str(folder / "index.parquet")]


@pytest.fixture(scope="module")
def whole_recipe(host, clips: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole_recipe") / "run"
    assert host.run(RECIPE, {"words": ["demo_stage1", "--out", str(run), *SMALL, *clips]}) == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_recipe_killed_in_a_step(host, clips: list[str], whole_recipe: Path, tmp_path: Path, step: int) -> None:
    run = tmp_path / "run"
    words = ["demo_stage1", "--out", str(run), *SMALL, *clips]
    assert host.run(RECIPE, {"words": words, "die_at": step}) == SIGKILLED
    assert host.run(RECIPE, {"words": words}) == 0
    assert _losses(run) == _losses(whole_recipe)
    ours, theirs = (training.final_state(path, 4) for path in (run, whole_recipe))
    assert ours.keys() == theirs.keys()
    differing = [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)]
    assert not differing
