"""From the command line to checkpoints and samples, with real clips on disk and models small enough for a test."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from opensora_fast import cli
from opensora_fast.checkpoint_folder import find_checkpoint, load_autoencoder, read_recipe
from opensora_fast.errors import UserError
from opensora_fast.kernels import backend
from opensora_fast.train.index import index_folder
from opensora_fast.train.launch import run_recipe
from opensora_fast.train.metrics import read_metrics
from opensora_fast.train.recipes import demo_stage1
from opensora_fast.video_io import write_video

SMALL = ["--model.hidden_size", "32", "--model.num_heads", "1", "--model.axes_dim", "8", "12", "12"]
SMALL += ["--model.depth", "1", "--model.depth_single_blocks", "1", "--loop.device", "cpu"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options naming an index of three short clips, which also serve as held-out ones."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        time, row, column = torch.meshgrid(
            torch.arange(34) / 4, torch.arange(48) / 20, torch.arange(80) / 20, indexing="ij"
        )
        frames = torch.stack([torch.sin(row * number + column + time + shade) for shade in range(3)])
        write_video(folder / f"{number}.mp4", frames, 12)
        (folder / f"{number}.txt").write_text(f"waves of kind {number}")
    index_folder(folder, folder / "index.parquet")
    return ["--data.index", str(folder / "index.parquet"), "--data.heldout_index", str(folder / "index.parquet")]


def _losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if row["kind"] == "step"]


def test_stages_follow_each_other_resume_and_sample(tmp_path: Path, clips: list[str]) -> None:
    autoencoder, first, second = (str(tmp_path / name) for name in ("ae", "first", "second"))
    options = [*SMALL, *clips, "--autoencoder.weights", autoencoder]
    assert cli.main(["train", "demo_ae", "--out", autoencoder, "--steps", "2", "--loop.device", "cpu", *clips]) == 0
    assert cli.main(["train", "demo_stage1", "--out", first, "--steps", "2", *options]) == 0
    assert cli.main(["train", "demo_stage1", "--out", first, "--steps", "4", *options]) == 0
    follow = ["--init_weights", first, "--validation.prompts", "waves", "--validation.sample_every", "2"]
    follow += ["--sampling_defaults.steps", "2"]
    assert cli.main(["train", "demo_stage2", "--out", second, "--steps", "2", *options, *follow]) == 0
    assert len(list((tmp_path / "second" / "samples").glob("step-2-*.mp4"))) == 1

    whole = str(tmp_path / "whole")
    assert cli.main(["train", "demo_stage1", "--out", whole, "--steps", "4", *options]) == 0
    assert _losses(tmp_path / "first") == _losses(tmp_path / "whole")
    assert len(set(_losses(tmp_path / "first"))) == 4

    video = tmp_path / "out.mp4"
    assert cli.main(["sample", "--checkpoint", second, "--prompt", "waves", "--steps", "2", "--out", str(video)]) == 0
    assert video.stat().st_size > 0

    recipe = read_recipe(find_checkpoint(Path(autoencoder)))
    assert 0.1 <= recipe["autoencoder"]["config"]["scaling_factor"] <= 100
    model = load_autoencoder({"weights": autoencoder}, torch.device("cpu"), torch.float32)
    assert model.config.scaling_factor == recipe["autoencoder"]["config"]["scaling_factor"]


def test_a_rehearsal_without_an_autoencoder_says_so(
    tmp_path: Path, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "demo_stage1", "--out", str(tmp_path / "run"), "--steps", "1", *SMALL, *clips]) == 0
    assert "using an untrained autoencoder (seed 0)" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert Path(stored["autoencoder"]["weights"]).is_absolute()
    assert Path(stored["text"]["t5"]).is_dir()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["stage1"], "autoencoder.weights is not set: recipe stage1 encodes with the Hunyuan autoencoder"),
        (["stage3"], "hunyuan_vae.safetensors with --autoencoder.weights FILE, or a latent cache with --data.cache"),
        (["stage2", "--autoencoder.weights", "nowhere"], "init_weights is not set: stage2 goes on from stage1"),
        (["stage1", "--autoencoder.untrained_seed", "0"], "the stand-in is a Video DC-AE; name weights"),
        (
            ["demo_stage1", "--autoencoder.kind", "hunyuan"],
            "or train a recipe of the other autoencoder",
        ),
        (["demo_ae", "--autoencoder.kind", "hunyuan"], "autoencoder.kind='hunyuan'"),
        (["dcae_short"], "data.index is not set"),
        (["demo_stage1", "--data.index", "nowhere.parquet"], "nowhere.parquet"),
        (["demo_stage1", "--autoencoder.weights", "nowhere"], "nowhere"),
        (["demo_stage1", "--init_weights", "nowhere"], "nowhere"),
        (["demo_stage1", "--data.cache", "nowhere"], "nowhere holds no cache"),
        (["demo_ae", "--data.cache", "nowhere"], "data.cache=nowhere: demo_ae trains on pixels"),
        (["demo_stage1", "--parallel.context_parallel", "2"], "parallel.context_parallel=2"),
        (["demo_stage2"], "demo_stage2 goes on from demo_stage1; name its run with --init_weights"),
        (["demo_stage0"], "unknown recipe 'demo_stage0'"),
        (["demo_stage1", "--nonsense", "1"], "--nonsense"),
        (["demo_stage1", "--checkpoint.chunk_mib", "0"], "checkpoint.chunk_mib=0"),
        (["demo_stage1", "--checkpoint.on_failure", "wait"], "--checkpoint.on_failure"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], named: str, tmp_path: Path, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    indexed = [] if words[0].startswith(("stage", "dcae")) else clips
    words = [words[0], "--out", str(tmp_path / "run"), *indexed, *words[1:]]
    assert cli.main(["train", *words]) == 2
    captured = capsys.readouterr().err
    assert named in captured
    assert captured.startswith("error: ")
    assert captured.count("\n") == 1
    assert not list(tmp_path.glob("run/step-*"))


def test_a_backend_that_cannot_run_here_is_one_line(tmp_path: Path, clips: list[str], capsys) -> None:
    with backend.forced({"attention": "gluon"}):
        words = ["train", "demo_stage1", "--out", str(tmp_path / "run"), "--steps", "1", *SMALL, *clips]
        assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith("error: forced attention:gluon does not exist for these tensors; choose")


def test_frames_that_the_autoencoder_cannot_take_are_refused_before_training(tmp_path: Path, clips: list[str]) -> None:
    recipe = demo_stage1()
    data = dataclasses.replace(recipe.data, buckets={"64px": {17: (1.0, 2)}}, index=clips[1], heldout_index=clips[3])
    with pytest.raises(UserError, match="17"):
        run_recipe(dataclasses.replace(recipe, data=data), tmp_path / "run")


def test_a_checkpoint_of_another_architecture_is_refused(
    tmp_path: Path, clips: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "demo_stage1", "--out", str(tmp_path / "run"), "--steps", "1", *SMALL, *clips]
    assert cli.main(words) == 0
    assert cli.main([*words, "--model.depth", "2"]) == 2
    assert "depth is 1, the recipe says 2" in capsys.readouterr().err
    assert cli.main([*words, "--model.depth", "2", "--fresh"]) == 0
