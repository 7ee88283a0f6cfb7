"""`opensora-fast sample` on several processes makes the file that one makes."""

import csv

import numpy as np
import pytest
import torch
import torch.distributed as dist

from opensora_fast import cli
from opensora_fast.errors import UserError
from opensora_fast.pipeline import VideoPipeline
from opensora_fast.video_io import probe, read_clip, write_image

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

SMALL = ["--resolution", "32px", "--aspect-ratio", "1:1", "--steps", "2"]


@pytest.fixture
def ckpts(released_folder):
    return released_folder("open-sora-v2")


def sample(checkpoint, out, *words):
    return cli.main(["sample", *map(str, ["--checkpoint", checkpoint, "--out", out, *SMALL, *words])])


def run_all(calls):
    """On a rank: several commands."""
    return [sample(*words) for words in calls]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_make_the_file_of_one(size, ranks, ckpts, tmp_path):
    words = ["--prompt", "fog", "--frames", "5"]
    call = [str(ckpts), str(tmp_path / "several.mp4"), *words]
    assert ranks(size).run("opensora_fast/test_sample_processes.py:run_all", [call]) == [[0]] * size
    assert sample(ckpts, tmp_path / "one.mp4", *words) == 0
    check_equal(tmp_path / "one.mp4", tmp_path / "several.mp4")


def run_with_failures(calls):
    """On a rank: "snow" fails alike on all ranks before they meet, "wind" on the second alone after they met."""
    make = VideoPipeline.make

    def failing(pipe, prompts, *arguments, **options):
        if prompts == ["snow"]:
            raise UserError("no snow")
        video = make(pipe, prompts, *arguments, **options)
        if prompts == ["wind"] and dist.get_rank() == 1:
            raise OSError("no wind")
        return video

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoPipeline, "make", failing)
        return run_all(calls)


def test_a_request_that_fails_on_several_processes_does_not_stop_the_rest(ranks, ckpts, tmp_path):
    prompts = tmp_path / "list.csv"
    (tmp_path / "out" / ".list_0004.mp4.part").mkdir(parents=True)  # cannot be written
    prompts.write_text("prompt\nsnow\nwind\nrain\nsun\n")
    call = [str(ckpts), str(tmp_path / "out"), "--prompts", str(prompts), "--frames", "5"]
    found = ranks(2).run("opensora_fast/test_sample_processes.py:run_with_failures", [call])
    assert found == [[1], [1]]
    made = {path.name for path in (tmp_path / "out").glob("*.mp4")}
    assert made - {"list_0002.mp4"} == {"list_0003.mp4"}  # the first had written the second before it heard


def check_equal(one, several):
    frames = [read_clip(path, 0, 5).astype(int) for path in (one, several)]
    assert np.abs(frames[0] - frames[1]).max() <= 2  # of 255: rounding before and after H.264


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_lists_conditions_pictures_and_previews_on_several_processes(size, ranks, ckpts, tmp_path):
    write_image(tmp_path / "first.png", torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    prompts = tmp_path / "list.csv"
    with prompts.open("w", newline="") as file:
        rows = ["text", "frames", "ref"], ["rain", 5, ""], ["snow", 6, ""], ["wind", 5, tmp_path / "first.png"]
        csv.writer(file).writerows(rows)
    words = ["--prompts", prompts, "--flux-resolution", "32px"]
    calls = [
        [str(word) for word in (ckpts, tmp_path / "several", *words)],
        [str(word) for word in (ckpts, tmp_path / "flux.mp4", "--prompt", "fog", "--frames", 5, "--flux", ckpts)],
    ]
    calls[1] += ["--flux-resolution", "32px", "--preview-every", "1"]
    codes = ranks(size).run("opensora_fast/test_sample_processes.py:run_all", calls)
    assert codes == [[1, 0]] * size
    assert sample(ckpts, tmp_path / "one", *words) == 1
    assert sample(*[word.replace("flux.mp4", "flux_one.mp4") for word in calls[1]]) == 0
    pairs = [(tmp_path / "one" / name, tmp_path / "several" / name) for name in ("list_0001.mp4", "list_0003.mp4")]
    for one, several in [*pairs, (tmp_path / "flux_one.mp4", tmp_path / "flux.mp4")]:
        check_equal(one, several)
    assert sorted(path.name for path in (tmp_path / "several").iterdir()) == ["list_0001.mp4", "list_0003.mp4"]
    assert (tmp_path / "flux.preview.png").is_file()


@pytest.mark.slow
def test_nproc_starts_them(ckpts, tmp_path, capfd):
    (tmp_path / "list.csv").write_text("prompt,frames\nrain,5\nsnow,6\n")
    words = ["--prompts", tmp_path / "list.csv", "--nproc", 2]
    assert sample(ckpts, tmp_path / "out", *words) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["list_0001.mp4"]
    assert "1 made; 1 failed: list_0002" in capfd.readouterr().err
    assert sample(ckpts, tmp_path / "out.mp4", "--prompt", "rain", "--frames", 5, "--nproc", 2) == 0
    info = probe(tmp_path / "out.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (5, 32, 32, 24)


@pytest.mark.parametrize(
    ("words", "message"), [(["--frames", "6"], "frames=6"), (["--image", "no.png"], "no such file")]
)
def test_what_cannot_be_made_is_told_once_before_they_start(words, message, ckpts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("opensora_fast.sample_command.relaunch", lambda *_: pytest.fail("processes were started"))
    assert sample(ckpts, tmp_path / "out.mp4", "--prompt", "rain", "--nproc", 2, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
