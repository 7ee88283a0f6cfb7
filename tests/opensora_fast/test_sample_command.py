"""`opensora-fast sample` with released checkpoints: every mode from the command line, its files read back with PyAV."""

import csv
import json
from contextlib import closing

import av
import numpy as np
import pytest
import torch

from opensora_fast import cli, video_io
from opensora_fast.memory_plan import MemoryPlan
from opensora_fast.memory_prediction import MemorySettings
from opensora_fast.pipeline import VideoPipeline
from opensora_fast.video_io import (
    read_clip,
    read_image,
    read_image_metadata,
    read_video_metadata,
    write_image,
    write_video,
)

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

SMALL = ["--resolution", "32px", "--aspect-ratio", "1:1", "--steps", "2"]


@pytest.fixture
def ckpts(released_folder):
    return released_folder("open-sora-v2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two images and a video of 72 frames at 24 per second, of another size than what is sampled."""
    folder = tmp_path_factory.mktemp("files")
    pixels = torch.rand(3, 72, 40, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_video(folder / "clip.mp4", pixels, 24)
    write_image(folder / "first.png", pixels[:, 0])
    write_image(folder / "last.png", pixels[:, 1])
    return folder


def sample(checkpoint, out, *words, prompt="rain"):
    prompted = [] if prompt is None else ["--prompt", prompt]
    words = map(str, [*prompted, "--out", out, *SMALL, *words])
    return cli.main(["sample", "--checkpoint", str(checkpoint), *words])


def measured(path):
    """(frames, height, width, frames per second) of a file, every frame decoded."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        return len(frames), frames[0].height, frames[0].width, float(stream.average_rate)


def record(path):
    read = read_image_metadata if path.suffix == ".png" else read_video_metadata
    return json.loads(read(path)["comment"])


# mode -> words, frames, the condition's name
MODES = {
    "t2v": ([], 5),
    "i2v_head": (["--image", "first.png"], 5),
    "i2v_tail": (["--last", "last.png"], 5),
    "i2v_loop": (["--image", "first.png", "--last", "last.png"], 9),
    "v2v_head": (["--video", "clip.mp4"], 37),
    "v2v_tail": (["--video", "clip.mp4", "--condition", "v2v_tail"], 37),
    "v2v_head_easy": (["--video", "clip.mp4", "--condition", "v2v_head_easy"], 69),
    "v2v_tail_easy": (["--video", "clip.mp4", "--condition", "v2v_tail_easy"], 69),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_writes_its_video(mode, ckpts, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    words, frames = MODES[mode]
    out = tmp_path / "new folder" / f"{mode}.mp4"
    assert sample(ckpts, out, "--frames", frames, "--fps", 12 if mode == "t2v" else 24, *words) == 0
    assert measured(out) == (frames, 32, 32, 12 if mode == "t2v" else 24)
    assert record(out)["condition"] == mode
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(("condition", "given"), [("v2v_head", slice(0, 33)), ("v2v_tail", slice(-33, None))])
def test_a_video_is_continued_from_its_own_end(condition, given, ckpts, files, monkeypatch, tmp_path):
    seen = {}

    def make(pipe, prompts, settings, **arguments):
        seen.update(arguments)
        return torch.zeros(1, 3, settings.frames, 32, 32)

    monkeypatch.setattr(VideoPipeline, "make", make)
    words = ["--video", files / "clip.mp4", "--condition", condition, "--frames", 37]
    assert sample(ckpts, tmp_path / "out.mp4", *words) == 0
    pixels = seen["head" if condition == "v2v_head" else "tail"]
    frames = read_clip(files / "clip.mp4", 0 if condition == "v2v_head" else 72 - 33, 33, cover=(32, 32))
    assert pixels.shape == (1, 3, 33, 32, 32)
    left = (frames.shape[2] - 32) // 2
    expected = torch.from_numpy(frames[:, :32, left : left + 32].copy()).permute(3, 0, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(pixels[0], expected)


def test_the_video_dc_ae_makes_128_frames_unless_told(released_folder, tmp_path):
    out = tmp_path / "out.mp4"
    words = ["--resolution", "64px", "--steps", 1, "--guidance", 1]
    assert sample(released_folder("dcae"), out, *words) == 0
    assert measured(out) == (128, 64, 64, 24)


def test_a_picture_of_flux_begins_the_video(released_folder, ckpts, tmp_path):
    outs = {}
    for name, folder in (("released", ckpts), ("diffusers", released_folder("diffusers-flux"))):
        outs[name] = tmp_path / f"{name}.mp4"
        words = ["--frames", 5, "--flux", folder, "--flux-resolution", "64px"]
        assert sample(ckpts, outs[name], *words) == 0
        assert measured(outs[name])[:3] == (5, 32, 32)
        assert record(outs[name])["condition"] == "i2v_head"
        assert record(outs[name])["flux"].startswith(str(folder))
    assert sample(ckpts, tmp_path / "plain.mp4", "--frames", 5) == 0
    assert not np.array_equal(read_clip(outs["released"], 0, 5), read_clip(tmp_path / "plain.mp4", 0, 5))


def test_an_exported_model_makes_the_same_video(ckpts, tmp_path):
    parts = ["--t5", ckpts / "google/t5-v1_1-xxl", "--clip", ckpts / "openai/clip-vit-large-patch14"]
    for name, file in (("model", "Open_Sora_v2.safetensors"), ("vae", "hunyuan_vae.safetensors")):
        export = ["checkpoint", "export", ckpts / file, "--to", "diffusers", "--out", tmp_path / name]
        assert cli.main(list(map(str, export))) == 0
    words = ["--frames", 5, *parts, "--autoencoder", tmp_path / "vae"]
    assert sample(tmp_path / "model", tmp_path / "exported.mp4", *words) == 0
    assert sample(ckpts, tmp_path / "released.mp4", "--frames", 5) == 0
    frames = [read_clip(tmp_path / f"{name}.mp4", 0, 5) for name in ("exported", "released")]
    assert np.array_equal(*frames)


def test_a_full_gpu_is_told_what_helps(ckpts, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(VideoPipeline, "make", full)
    assert sample(ckpts, tmp_path / "out.mp4", "--frames", 5) == 2
    said = capsys.readouterr().err
    assert "such as --memory-budget 24GiB" in said
    assert said.count("\n") == 1


def test_images_samples_and_sizes(ckpts, tmp_path, capsys):
    words = ["--frames", 1, "--num-samples", 2, "--seed", 5, "--height", 32, "--width", 48]
    assert sample(ckpts, tmp_path / "picture.png", *words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture_0.png", "picture_1.png"]
    for index in range(2):
        path = tmp_path / f"picture_{index}.png"
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            assert (frame.height, frame.width) == (32, 48)
        assert record(path)["seed"] == 5 + index
    assert sample(ckpts, tmp_path / "one.png", "--frames", 1, "--seed", 6, "--height", 32, "--width", 48) == 0
    with closing(av.open(str(tmp_path / "one.png"))) as one, closing(av.open(str(tmp_path / "picture_1.png"))) as other:
        pictures = [next(each.decode(video=0)).to_ndarray(format="rgb24") for each in (one, other)]
    assert np.array_equal(*pictures)


def test_a_negative_prompt_changes_the_video(ckpts, tmp_path):
    outs = {name: tmp_path / f"{name}.mp4" for name in ("plain", "empty", "fog")}
    for name, out in outs.items():
        words = [] if name == "plain" else ["--negative-prompt", "" if name == "empty" else "fog"]
        assert sample(ckpts, out, "--frames", 5, *words) == 0
    frames = {name: read_clip(out, 0, 5) for name, out in outs.items()}
    assert np.array_equal(frames["plain"], frames["empty"])
    assert not np.array_equal(frames["plain"], frames["fog"])
    assert record(outs["fog"])["negative_prompt"] == "fog"


def test_a_preview_every_few_steps(ckpts, tmp_path):
    assert sample(ckpts, tmp_path / "out.mp4", "--frames", 9, "--steps", 3, "--preview-every", 2) == 0
    latents = {}
    pipe = VideoPipeline.from_pretrained(ckpts)
    pipe(
        "rain",
        num_frames=9,
        num_inference_steps=3,
        resolution="32px",
        aspect_ratio="1:1",
        callback_on_step_end=lambda _, step, __, tensors: latents.update({step + 1: tensors["latents"]}),
    )
    middle = pipe.models.autoencoder.decode(latents[2][:, :, [1]])[0, :, :1]
    write_image(tmp_path / "expected.png", middle.clamp(-1, 1))
    frames = [read_image(tmp_path / f"{name}.png").astype(int) for name in ("out.preview", "expected")]
    assert frames[0].shape == (1, 32, 32, 3)
    assert frames[0].std() > 0
    assert np.abs(frames[0] - frames[1]).max() <= 1


@pytest.mark.parametrize(
    "settings",
    [
        MemorySettings(text="while_used", autoencoder="while_used", blocks="streamed", modulation="precomputed"),
        MemorySettings(text="while_used", modulation="precomputed"),
        None,
    ],
    ids=str,
)
def test_a_memory_budget_changes_nothing_in_the_file(settings, ckpts, tmp_path, monkeypatch, capsys):
    words = ["--frames", 5, "--flux", ckpts, "--flux-resolution", "64px", "--preview-every", 1]
    assert sample(ckpts, tmp_path / "plain.mp4", *words) == 0
    if settings is not None:  # at this size every budget that does has room for all
        plan = MemoryPlan(2**31, settings, {}, str(settings))
        monkeypatch.setattr("opensora_fast.loaded_models.choose_memory", lambda *_, **__: plan)
    capsys.readouterr()
    assert sample(ckpts, tmp_path / "small.mp4", *words, "--memory-budget", "2GiB") == 0
    assert "memory: text " in capsys.readouterr().err
    assert (tmp_path / "small.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()


def test_8_bit_weights_say_their_error_and_are_recorded(ckpts, tmp_path, capsys):
    assert sample(ckpts, tmp_path / "plain.mp4", "--frames", 5) == 0
    assert sample(ckpts, tmp_path / "fp8.mp4", "--frames", 5, "--fp8") == 0
    assert "8-bit weights: " in capsys.readouterr().err
    assert record(tmp_path / "fp8.mp4")["fp8"] is True
    plain, fp8 = (read_clip(tmp_path / f"{name}.mp4", 0, 5).astype(int) for name in ("plain", "fp8"))
    assert 0 < np.abs(plain - fp8).mean() < 16


# A file of requests.


def write_rows(path, header, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_a_broken_row_stops_nobody_and_the_second_run_goes_on(ckpts, files, tmp_path, capsys):
    rows = [
        ["rain", "", "7", "5"],
        ["sun", str(tmp_path / "nowhere.png"), "", "5"],
        ["wind, and rain", str(files / "first.png"), "", "5"],
        ["snow", "", "many", "5"],
        ["a picture", "", "", "1"],
    ]
    prompts = write_rows(tmp_path / "list.csv", ["text", "ref", "seed", "frames"], *rows)
    out = tmp_path / "videos"
    assert sample(ckpts, out, "--prompts", prompts, prompt=None) == 1
    said = capsys.readouterr()
    assert "row 2: ref=" in said.err
    assert "nowhere.png: no such file" in said.err
    assert "row 4: seed='many': must be a whole number" in said.err
    assert "3 made; 2 failed: list_0002, list_0004" in said.err
    made = ["list_0001.mp4", "list_0003.mp4", "list_0005.png"]
    assert sorted(path.name for path in out.iterdir()) == made
    assert measured(out / made[1]) == (5, 32, 32, 24)
    assert (record(out / made[0])["seed"], record(out / made[1])["condition"]) == (7, "i2v_head")

    write_image(tmp_path / "nowhere.png", torch.zeros(3, 32, 32))
    before = {name: (out / name).stat().st_mtime_ns for name in made}
    assert sample(ckpts, out, "--prompts", prompts, prompt=None) == 1
    assert "1 made; 3 were there; 1 failed: list_0004" in capsys.readouterr().err
    assert before == {name: (out / name).stat().st_mtime_ns for name in made}
    assert measured(out / "list_0002.mp4") == (5, 32, 32, 24)


def test_seeds_that_run_out_are_one_rows_failure(ckpts, tmp_path, capsys):
    prompts = write_rows(tmp_path / "list.csv", ["prompt", "seed"], ["rain", 2**63 - 1], ["snow", 0])
    words = ["--prompts", prompts, "--frames", 1, "--num-samples", 2]
    assert sample(ckpts, tmp_path / "out", *words, prompt=None) == 1
    assert "2 made; 1 failed: list_0001" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["list_0002_0.png", "list_0002_1.png"]


def test_what_is_there_of_another_request_is_told_and_kept(ckpts, tmp_path, capsys):
    prompts = tmp_path / "list.jsonl"
    prompts.write_text('{"prompt": "rain", "name": "a", "frames": 5}\n{"prompt": "snow", "name": "b", "frames": 5}\n')
    assert sample(ckpts, tmp_path / "out", "--prompts", prompts, prompt=None) == 0
    before = (tmp_path / "out" / "a.mp4").read_bytes()
    capsys.readouterr()
    (tmp_path / "out" / "b.mp4").unlink()
    assert sample(ckpts, tmp_path / "out", "--prompts", prompts, "--seed", 3, prompt=None) == 1
    said = capsys.readouterr().err
    assert "a.mp4: is there of another request (seed=0, not 3); move it, or choose another --out" in said
    assert "1 made; 1 failed: a" in said
    assert (tmp_path / "out" / "a.mp4").read_bytes() == before
    assert record(tmp_path / "out" / "b.mp4")["seed"] == 3


def test_a_failure_while_sampling_does_not_stop_the_rest(ckpts, tmp_path, monkeypatch, capsys):
    prompts = write_rows(tmp_path / "list.csv", ["prompt"], ["rain"], ["snow"], ["sun"])
    make = VideoPipeline.make

    def failing(pipe, prompts, *arguments, **options):
        if prompts == ["snow"]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")
        return make(pipe, prompts, *arguments, **options)

    monkeypatch.setattr(VideoPipeline, "make", failing)
    assert sample(ckpts, tmp_path / "out", "--prompts", prompts, "--frames", 5, prompt=None) == 1
    said = capsys.readouterr().err
    assert "list_0002: the GPU's memory is full (CUDA out of memory. Tried to allocate much): " in said
    assert "--memory-budget 24GiB" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["list_0001.mp4", "list_0003.mp4"]


def test_a_bug_in_one_row_is_shown_and_does_not_stop_the_rest(ckpts, tmp_path, monkeypatch, capsys):
    prompts = write_rows(tmp_path / "list.csv", ["prompt"], ["rain"], ["snow"])
    make = VideoPipeline.make

    def failing(pipe, prompts, *arguments, **options):
        if prompts == ["rain"]:
            raise TypeError("an int is no str")
        return make(pipe, prompts, *arguments, **options)

    monkeypatch.setattr(VideoPipeline, "make", failing)
    assert sample(ckpts, tmp_path / "out", "--prompts", prompts, "--frames", 5, prompt=None) == 1
    said = capsys.readouterr().err
    assert "in failing" in said  # where it was raised
    assert "list_0001: an int is no str" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["list_0002.mp4"]


@pytest.fixture
def list_of_one(ckpts, files, tmp_path):
    """A row with an image, made; the words of its command, and the result."""
    (tmp_path / "first.png").write_bytes((files / "first.png").read_bytes())
    prompts = write_rows(tmp_path / "list.csv", ["prompt", "ref"], ["rain", tmp_path / "first.png"])
    words = ["--prompts", prompts, "--frames", 5, "--steps", 1, "--guidance", 1, "--guidance-image", 1]
    assert sample(ckpts, tmp_path / "out", *words, prompt=None) == 0
    return words, tmp_path / "out" / "list_0001.mp4"


def test_a_result_that_was_cut_off_is_not_there(list_of_one, ckpts, capsys):
    words, result = list_of_one
    data = result.read_bytes()
    result.write_bytes(data[: len(data) * 6 // 10])
    assert sample(ckpts, result.parent, *words, prompt=None) == 1
    said = capsys.readouterr().err
    assert f"list_0001: {result}: is there, but cut off or damaged; delete it, and it is made again" in said
    result.unlink()
    assert sample(ckpts, result.parent, *words, prompt=None) == 0
    assert result.read_bytes() == data


def test_results_of_other_files_are_of_another_request(list_of_one, ckpts, files, tmp_path, monkeypatch, capsys):
    words, result = list_of_one
    other = tmp_path / "other.safetensors"
    other.write_bytes((ckpts / "hunyuan_vae.safetensors").read_bytes())
    assert sample(ckpts, result.parent, *words, "--autoencoder", other, prompt=None) == 1
    assert "is there of another request (autoencoder=" in capsys.readouterr().err
    monkeypatch.chdir(result.parent)
    for spelled in (f"../out/../{ckpts.name}", tmp_path / "link"):
        for link in (tmp_path / ckpts.name, tmp_path / "link"):
            link.is_symlink() or link.symlink_to(ckpts)
        assert sample(spelled, "../out", *words, prompt=None) == 0
        assert "0 made; 1 were there" in capsys.readouterr().err
    (tmp_path / "first.png").write_bytes((files / "last.png").read_bytes())
    assert sample(ckpts, result.parent, *words, prompt=None) == 1
    assert "is there of another request (image_contents=" in capsys.readouterr().err


def test_the_picture_of_flux_is_checked_for_each_row_before_any_weights(ckpts, files, tmp_path, monkeypatch, capsys):
    prompts = write_rows(tmp_path / "list.csv", ["prompt", "ref"], ["rain", ""], ["snow", files / "first.png"])
    words = ["--prompts", prompts, "--frames", 5, "--flux", ckpts, "--flux-resolution", "3px"]
    painted = []
    monkeypatch.setattr(VideoPipeline, "_painted", lambda *arguments: painted.append(arguments))
    assert sample(ckpts, tmp_path / "out", *words, prompt=None) == 1
    said = capsys.readouterr().err
    assert "list_0001: resolution '3px' is too small" in said
    assert "1 made; 1 failed: list_0001" in said
    assert painted == []
    assert record(tmp_path / "out" / "list_0002.mp4")["image"] == str(files / "first.png")


def test_previews_have_names_of_their_own(ckpts, tmp_path, capsys):
    prompts = write_rows(tmp_path / "list.csv", ["prompt", "name"], ["rain", "a.preview"], ["snow", "a"])
    words = ["--prompts", prompts, "--frames", 1, "--preview-every", 1]
    assert sample(ckpts, tmp_path / "out", *words, prompt=None) == 1
    assert "names that end in .preview are those of previews" in capsys.readouterr().err


def test_an_interrupt_leaves_whole_files_and_the_next_run_goes_on(ckpts, tmp_path, monkeypatch, capsys):
    prompts = write_rows(tmp_path / "list.csv", ["prompt"], ["rain"], ["snow"])
    words = ["--prompts", prompts, "--frames", 5]
    with monkeypatch.context() as patch:
        to_uint8, written = video_io._to_uint8, []

        def interrupted(video_CTHW):
            written.append(video_CTHW)
            for index, picture in enumerate(to_uint8(video_CTHW)):
                if len(written) == 2 and index == 3:
                    raise KeyboardInterrupt
                yield picture

        patch.setattr(video_io, "_to_uint8", interrupted)
        assert sample(ckpts, tmp_path / "out", *words, prompt=None) == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["list_0001.mp4"]
    assert measured(tmp_path / "out" / "list_0001.mp4")[0] == 5
    assert "stopped after 1 of 2" in capsys.readouterr().err
    assert sample(ckpts, tmp_path / "out", *words, prompt=None) == 0
    assert "1 made; 1 were there" in capsys.readouterr().err


# What cannot be done is told in one line, before any weights are read.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frames", "6"], "frames=6"),
        (["--height", "40", "--width", "32"], "height=40: must be a multiple of 16, the pixels of a token's side"),
        (["--height", "40", "--width", "32"], "the nearest: 32 and 48"),
        (["--height", "32"], "height=32 without width"),
        (["--condition", "i2v_tail", "--image", "first.png"], "condition i2v_tail: is made of last and got image"),
        (["--condition", "i2v", "--image", "first.png"], "condition i2v: is not known; choose one of t2v"),
        (["--condition", "v2v_head"], "condition v2v_head: is made of video and got no file"),
        (["--video", "clip.mp4", "--frames", "33"], "'v2v_head' gives 9 latent frames of a clip that has 9"),
        (
            ["--video", "clip.mp4", "--condition", "v2v_tail_easy", "--fps", "12", "--frames", "69"],
            "72 frames at 24 per second are not the 65 at 12",
        ),
        (["--image", "clip.csv"], "clip.csv: cannot be read"),
        (["--flux", "."], "--flux .: holds no flux1-dev.safetensors"),
        (["--flux", "ckpts", "--image", "first.png"], "--flux makes the image that a video begins with"),
        (["--flux", "ckpts", "--frames", "1", "--out", "out.png"], "--flux makes the image that a video begins with"),
        (["--flux", "ckpts", "--condition", "t2v"], "--flux makes the image that a video begins with"),
        (["--flux", "ckpts", "--flux-resolution", "7pxx"], "resolution '7pxx' is not known"),
        (["--flux", "ckpts", "--flux-resolution", "3px"], "resolution '3px' is too small"),
        (["--out", "/proc/out.mp4"], "--out /proc/out.mp4: "),
        (["--out", "folder.mp4"], "folder.mp4: is a folder; choose another name"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "\ud800"], "is no Unicode text"),
        (["--autoencoder", "nowhere"], "--autoencoder nowhere: does not exist"),
        (["--autoencoder", "ckpts/flux1-dev-ae.safetensors"], "holds FLUX's image autoencoder"),
        (["--autoencoder", "dcae/F32T4C128_AE.safetensors"], "its latents have 8 channels"),
        (["--t5", "nowhere"], "--t5 nowhere: no such folder"),
        (["--t5", "ckpts/openai/clip-vit-large-patch14"], "d_model=None, and the transformer takes 48"),
        (["--weights", "ema"], "--weights ema: is for runs"),
        (["--num-samples", "0"], "--num-samples 0: must be at least 1"),
        (["--nproc", "0"], "--nproc 0: must be at least 1"),
        (["--preview-every", "0"], "--preview-every 0: must be at least 1"),
        (["--memory-budget", "lots"], "lots"),
        (["--memory-budget", "1KiB"], "at least"),
        (["--tensorrt"], "pip install 'opensora-fast[tensorrt]'"),
        (["--prompts", "list.csv"], "give --prompt for one request, or --prompts for a file of them"),
        (["--checkpoint", "flux"], "flux1-dev.safetensors makes pictures (FLUX); pass its folder as --flux"),
        (["--checkpoint", "ckpts/flux1-dev.safetensors"], "flux1-dev.safetensors makes pictures (FLUX)"),
        (["--checkpoint", "both"], "holds Open_Sora_v2.safetensors and copy.safetensors; name the one to use"),
        (["--checkpoint", "empty"], "holds no video transformer"),
        (["--checkpoint", "ckpts/hunyuan_vae.safetensors"], "holds a Hunyuan VAE"),
        (
            ["--checkpoint", "alone"],
            "alone/Open_Sora_v2.safetensors: no autoencoder of 16 latent channels lies beside it",
        ),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(
    words, message, ckpts, released_folder, files, tmp_path, capsys, monkeypatch
):
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "clip.csv").write_text("no picture")
    (tmp_path / "ckpts").symlink_to(ckpts)
    (tmp_path / "dcae").symlink_to(released_folder("dcae"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.mp4").mkdir()
    for name, file in (("flux", "flux1-dev.safetensors"), ("alone", "Open_Sora_v2.safetensors")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).symlink_to(ckpts / file)
    (tmp_path / "both").mkdir()
    for file in ("Open_Sora_v2.safetensors", "copy.safetensors"):
        (tmp_path / "both" / file).symlink_to(ckpts / "Open_Sora_v2.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opensora_fast.loaded_models.load_text_encoders", lambda *_: pytest.fail("weights were read"))
    assert sample("ckpts", "out.mp4", "--frames", "5", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no column text or prompt"),
        ("rain\nsnow\n", "names no column text or prompt"),
        ("text,prompt\na,b\n", "has column 'prompt' twice"),
        ("text,colour\na,b\n", "column 'colour' is not known"),
        ("text\n", "holds no row"),
    ],
)
def test_a_file_that_holds_no_requests_is_one_line(text, message, ckpts, tmp_path, capsys):
    (tmp_path / "list.csv").write_text(text)
    assert sample(ckpts, tmp_path / "out", "--prompts", tmp_path / "list.csv", prompt=None) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_options_of_one_request_do_not_go_with_a_file_of_them(ckpts, files, tmp_path, capsys):
    prompts = write_rows(tmp_path / "list.csv", ["prompt"], ["rain"])
    assert sample(ckpts, tmp_path / "out", "--prompts", prompts, "--image", files / "first.png", prompt=None) == 2
    assert "--image goes with --prompt" in capsys.readouterr().err
    assert sample(ckpts, tmp_path / "out.mp4", "--prompts", prompts, prompt=None) == 2
    assert "is the folder of what --prompts makes" in capsys.readouterr().err


def test_a_prompt_that_is_cut_is_told(ckpts, tmp_path, capsys):
    assert sample(ckpts, tmp_path / "o.png", "--frames", 1, prompt="rain, " * 400) == 0
    captured = capsys.readouterr()
    [told] = [line for line in (captured.out + captured.err).splitlines() if "of which T5 reads 512" in line]
    assert told.startswith("prompt 'rain, rain")
