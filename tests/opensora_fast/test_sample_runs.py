"""`opensora-fast sample` from a run folder to a file, on a tiny random model."""

import json
from contextlib import closing
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from opensora_fast import cli
from opensora_fast.checkpoint_folder import read_recipe
from opensora_fast.config import MMDIT_PRESETS, VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.mmdit import MMDiT
from opensora_fast.text import save_tiny_text_encoders
from opensora_fast.train.checkpoint import RunFolder
from opensora_fast.video_io import probe, read_clip, read_image, read_video_metadata, write_image, write_video

pytest.importorskip("transformers")

MODEL = replace(MMDIT_PRESETS["tiny"], hidden_size=32, axes_dim=(4, 6, 6), depth_single_blocks=1)
AUTOENCODER = VideoDCAEConfig(
    latent_channels=4,
    encoder_widths=(8, 8, 16),
    decoder_widths=(8, 8, 16),
    encoder_depths=(1, 1, 1),
    decoder_depths=(1, 1, 1),
    encoder_block_types=("ResBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3,
    temporal_downsample=(True, True, False),
    scaling_factor=0.5,
)


def random_tensors(module, prefix, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}.{name}": 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in module.state_dict().items()
    }


def save_checkpoint(folder, recipe, tensors):
    with closing(RunFolder(folder.parent, keep=1)) as run:
        run.save(int(folder.name.removeprefix("step-")), tensors, {}, recipe)
        assert run.wait() == folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A diffusion run with one checkpoint, beside the autoencoder run and the text encoders that it names."""
    root = tmp_path_factory.mktemp("runs")
    save_tiny_text_encoders(root / "text", t5_dim=MODEL.context_in_dim, clip_dim=MODEL.vec_in_dim, seed=0)
    section = {"kind": "video_dc_ae", "weights": None, "config": asdict(AUTOENCODER)}
    save_checkpoint(
        root / "ae" / "step-3",
        {"name": "ae", "autoencoder": section},
        random_tensors(VideoDCAE(AUTOENCODER), "model", seed=1),
    )
    recipe = {
        "name": "stage",
        "model": asdict(MODEL),
        "autoencoder": section | {"weights": str(root / "ae")},
        "text": {
            "t5": str(root / "text" / "t5"),
            "clip": str(root / "text" / "clip"),
            "max_length_t5": 16,
            "max_length_clip": 64,
        },
        "sampling_defaults": {"resolution": "32px", "aspect_ratio": "1:1", "frames": 8, "fps": 12},
    }
    model = MMDiT(MODEL)
    tensors = random_tensors(model, "model", seed=2) | random_tensors(model, "ema", seed=3)
    save_checkpoint(root / "stage" / "step-7", recipe, tensors)
    return root / "stage"


@pytest.fixture
def clip(tmp_path):
    """A 48-frame video at 24 frames per second and an image, of another size than what is sampled."""
    pixels = torch.rand(3, 48, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_video(tmp_path / "in.mp4", pixels, 24)
    write_image(tmp_path / "in.png", pixels[:, 0])
    return tmp_path


def sample(run, out, *words):
    return cli.main(["sample", "--checkpoint", str(run), "--prompt", "rain", "--steps", "2", "--out", str(out), *words])


def test_a_video_with_its_request(run, tmp_path, capsys):
    out = tmp_path / "new" / "clip.mp4"
    assert sample(run, out) == 0
    assert str(out) in capsys.readouterr().out
    info = probe(out)
    assert (info.num_frames, info.height, info.width, info.fps) == (8, 32, 32, 12)
    request = json.loads(read_video_metadata(out)["comment"])
    assert request["prompt"] == "rain"
    assert request["checkpoint"] == str(run / "step-7")
    assert (request["frames"], request["steps"], request["guidance"], request["condition"]) == (8, 2, 7.5, "t2v")


def test_the_request_makes_the_file(run, tmp_path):
    variants = {
        "first": [],
        "again": [],
        "seed": ["--seed", "1"],
        "model": ["--weights", "model"],
        "ema": ["--weights", "ema"],
    }
    for name, words in variants.items():
        assert sample(run / "step-7" if name == "again" else run, tmp_path / f"{name}.mp4", *words) == 0
    assert (tmp_path / "first.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    frames = {name: read_clip(tmp_path / f"{name}.mp4", 0, 8) for name in variants}
    assert np.array_equal(frames["first"], frames["ema"])
    assert not np.array_equal(frames["first"], frames["seed"])
    assert not np.array_equal(frames["first"], frames["model"])


def test_an_image(run, tmp_path):
    out = tmp_path / "picture.png"
    assert sample(run, out, "--frames", "1", "--aspect-ratio", "16:9", "--resolution", "64px") == 0
    assert read_image(out).shape == (1, 48, 80, 3)
    assert b'"frames": 1' in out.read_bytes()


@pytest.mark.parametrize(
    ("options", "condition"),
    [
        ({"--image": "in.png"}, "i2v_head"),
        ({"--last": "in.png"}, "i2v_tail"),
        ({"--image": "in.png", "--last": "in.png"}, "i2v_loop"),
        ({"--video": "in.mp4"}, "v2v_head"),
    ],
)
def test_images_and_videos_as_conditions(run, clip, options, condition):
    out, plain = clip / "out.mp4", clip / "plain.mp4"
    files = [word for option, name in options.items() for word in (option, str(clip / name))]
    assert sample(run, out, "--frames", "40", "--fps", "24", *files) == 0
    assert json.loads(read_video_metadata(out)["comment"])["condition"] == condition
    assert sample(run, plain, "--frames", "40", "--fps", "24") == 0
    assert not np.array_equal(read_clip(out, 0, 40), read_clip(plain, 0, 40))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frames", "9"], "frames"),
        (["--frames", "4"], "frames=4: the autoencoder decodes them to 1"),
        (["--frames", "1"], "is written as .png"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--resolution", "huge"], "resolution 'huge' is not known"),
        (["--aspect-ratio", "16x9"], "aspect ratio '16x9' is not known"),
        (["--image", "nowhere.png"], "--image nowhere.png: no such file"),
        (["--video", "in.mp4", "--image", "in.png"], "--video cannot be combined"),
        (
            ["--video", "in.mp4", "--frames", "40", "--fps", "12"],
            "--video in.mp4: 48 frames at 24 per second are not the 32",
        ),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(run, clip, words, message, capsys, monkeypatch):
    monkeypatch.chdir(clip)
    assert sample(run, "out.mp4", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (clip / "out.mp4").exists()


def test_checkpoints_that_are_none(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty", run.parent / "ae"):
        assert sample(path, tmp_path / "out.mp4") == 2
        assert str(path) in capsys.readouterr().err


def test_another_architecture_is_named(run, tmp_path, capsys):
    recipe = read_recipe(run / "step-7")
    deeper = random_tensors(MMDiT(replace(MODEL, depth=2)), "model", seed=0)
    recipe["model"] |= {"hidden_size": 64, "axes_dim": [8, 12, 12]}
    save_checkpoint(tmp_path / "step-1", recipe, deeper)
    assert sample(tmp_path, tmp_path / "out.mp4") == 2
    assert "another architecture" in capsys.readouterr().err


def test_unknown_options_are_named(run, tmp_path, capsys):
    assert sample(run, tmp_path / "out.mp4", "--wings", "2") == 2
    said = capsys.readouterr().err
    assert "--wings" in said
    assert said.count("\n") == 1
