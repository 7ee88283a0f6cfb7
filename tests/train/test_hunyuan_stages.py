"""Stages 1 to 3 on the Hunyuan autoencoder: on clips, from a cache of its latents, and what they say where it lacks.

The autoencoder, the model and the clips are tiny; the recipes are the paper's, and so is the way through them.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora_fast import cli
from opensora_fast.checkpoint_folder import find_checkpoint, load_autoencoder, read_recipe
from opensora_fast.config import HunyuanVAEConfig, VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.hunyuan_vae import HunyuanVAE
from opensora_fast.train.cache_reader import EncoderCache
from opensora_fast.train.checkpoint import RunFolder
from opensora_fast.train.config import AutoencoderSection, DiffusionRecipe, recipe_to_dict
from opensora_fast.train.encoder_cache import cache_encoders
from opensora_fast.train.index import index_folder
from opensora_fast.train.launch import check_supported, run_recipe
from opensora_fast.train.metrics import read_metrics
from opensora_fast.train.recipes import find_recipe
from opensora_fast.video_io import write_video

pytest.importorskip("diffusers", reason="the Hunyuan autoencoder is built from diffusers' parts")

CPU = torch.device("cpu")
# 64 x 64 pixels are four tiles of 48, of which the second ones are narrow
AUTOENCODER = HunyuanVAEConfig(
    latent_channels=4,
    block_out_channels=(8, 8, 8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    use_spatial_tiling=True,
    sample_size=48,
)
BUCKETS = {"64px": {1: (1.0, 2), 5: (1.0, 2), 9: (1.0, 2)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hunyuan_vae.safetensors, and clips.parquet of three clips of 9 frames."""
    folder = tmp_path_factory.mktemp("hunyuan")
    torch.manual_seed(0)
    weights = HunyuanVAE(AUTOENCODER).to(torch.bfloat16).state_dict()
    save_file(weights, folder / "hunyuan_vae.safetensors")
    (folder / "clips").mkdir()
    for number in range(3):
        write_video(folder / "clips" / f"{number}.mp4", torch.rand(3, 9, 64, 64) * 2 - 1, 12)
        (folder / "clips" / f"{number}.txt").write_text(f"noise of kind {number}")
    index_folder(folder / "clips", folder / "clips.parquet")
    return folder


def small(name: str, folder: Path, **changes: object) -> DiffusionRecipe:
    """A stage of the paper on the clips of `folder`, with models small enough for a test."""
    recipe = find_recipe(name)
    sizes = {"hidden_size": 32, "num_heads": 1, "axes_dim": (8, 12, 12), "depth": 1, "depth_single_blocks": 1}
    sizes |= {"in_channels": 16, "context_in_dim": 32, "vec_in_dim": 16}
    index = str(folder / "clips.parquet")
    data = {"index": index, "heldout_index": index, "buckets": BUCKETS, "workers": 1}
    section = dataclasses.replace(
        recipe.autoencoder, weights=str(folder / "hunyuan_vae.safetensors"), config=AUTOENCODER
    )
    text = {"t5": "demo", "clip": "demo", "max_length_t5": 16, "max_length_clip": 16}
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, **sizes),
        autoencoder=section,
        data=dataclasses.replace(recipe.data, **data),
        text=dataclasses.replace(recipe.text, **text),
        loop=dataclasses.replace(recipe.loop, device="cpu", steps=2, log_every=1),
        parallel=dataclasses.replace(recipe.parallel, context_parallel=1),
    )
    return dataclasses.replace(recipe, **changes)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if row["kind"] == "step"]


def test_the_paper_s_stages_use_it_in_spatial_tiles_of_the_released_size() -> None:
    for name in ("stage1", "stage2", "stage3"):
        section = find_recipe(name).autoencoder
        assert section == AutoencoderSection(kind="hunyuan", config=HunyuanVAEConfig(use_spatial_tiling=True))
        assert section.config.latent_channels == find_recipe(name).model.latent_channels


def test_stages_follow_each_other_on_clips(folder: Path, tmp_path: Path) -> None:
    before: Path | None = None
    for name in ("stage1", "stage2", "stage3"):
        run = tmp_path / name
        assert run_recipe(small(name, folder, init_weights=None if before is None else str(before)), run) == 0
        assert len(losses(run)) == 2
        assert all(0 < loss < 100 for loss in losses(run))
        before = run

    section = read_recipe(find_checkpoint(tmp_path / "stage3"))["autoencoder"]
    autoencoder = load_autoencoder(section, CPU, torch.float32)
    assert isinstance(autoencoder, HunyuanVAE)
    assert autoencoder.config == AUTOENCODER
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    assert autoencoder.decode(autoencoder.encode(torch.zeros(1, 3, 5, 64, 64))).shape == (1, 3, 5, 64, 64)


def test_a_cache_gives_the_same_training_as_the_encoder(folder: Path, tmp_path: Path) -> None:
    online = small("stage2", folder, follows=None)
    buckets = {"64px": {9: (1.0, 1)}}  # all of a clip: which part of it a step takes is not the cache's to repeat
    online = dataclasses.replace(online, data=dataclasses.replace(online.data, buckets=buckets))
    cache = tmp_path / "cache"
    cache_encoders(online, cache, prompts_at_once=1)
    settings = EncoderCache.open(cache).settings
    assert settings.layout.causal
    assert settings.layout.compression == (4, 8, 8)
    assert settings.autoencoder.kind == "hunyuan"

    # what the recipe leaves open is the cache's: weights, their configuration, text encoders
    left_open = dataclasses.replace(
        online,
        autoencoder=AutoencoderSection(kind="hunyuan", config=HunyuanVAEConfig()),
        data=dataclasses.replace(online.data, cache=str(cache)),
        text=dataclasses.replace(online.text, t5=None, clip=None),
    )
    assert run_recipe(online, tmp_path / "online") == 0
    assert run_recipe(left_open, tmp_path / "cached") == 0
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "online"), rel=1e-5)
    section = read_recipe(find_checkpoint(tmp_path / "cached"))["autoencoder"]
    assert section["kind"] == "hunyuan"
    assert section["weights"] == str(folder / "hunyuan_vae.safetensors")
    assert load_autoencoder(section, CPU, torch.float32).config == AUTOENCODER


def test_a_cache_made_with_another_configuration_is_refused(folder: Path, tmp_path: Path) -> None:
    recipe = small("stage1", folder)
    cache_encoders(recipe, tmp_path / "cache")
    section = dataclasses.replace(recipe.autoencoder, config=dataclasses.replace(AUTOENCODER, use_temporal_tiling=True))
    data = dataclasses.replace(recipe.data, cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="autoencoder.config is"):
        run_recipe(dataclasses.replace(recipe, autoencoder=section, data=data), tmp_path / "run")


def test_without_diffusers_a_stage_says_what_to_install_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    recipe = small("stage1", folder)
    install = r"pip install 'opensora-fast\[diffusers\]'"
    with pytest.raises(UserError, match=install):
        run_recipe(recipe, tmp_path / "run")
    with pytest.raises(UserError, match=install):
        cache_encoders(recipe, tmp_path / "cache")
    with pytest.raises(UserError, match=install):
        load_autoencoder(recipe_to_dict(recipe)["autoencoder"], CPU, torch.float32)
    assert not list(tmp_path.iterdir())
    check_supported(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, cache="there")))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: save_file({"a": torch.zeros(1)}, path), "missing"),
        (lambda path: save_file(VideoDCAE(TINY_DC_AE).state_dict(), path), "holds a Video DC-AE and the recipe's auto"),
        (lambda path: path.write_bytes(b"\x10"), "weights.safetensors"),
        (lambda path: None, "weights.safetensors"),
    ],
    ids=["other tensors", "another autoencoder", "cut", "nothing"],
)
def test_other_weights_are_refused_in_one_line(
    make, complaint: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "weights.safetensors")
    words = ["train", "stage1", "--out", str(tmp_path / "run"), "--loop.device", "cpu", "--text.t5", "demo"]
    words += ["--text.clip", "demo", "--data.index", str(folder / "clips.parquet")]
    words += ["--model.context_in_dim", "32", "--model.vec_in_dim", "16"]
    assert cli.main([*words, "--autoencoder.weights", str(tmp_path / "weights.safetensors")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert complaint in said
    assert said.count("\n") == 1


def test_the_two_autoencoders_are_not_taken_for_each_other(folder: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "ae", 1)
    model = VideoDCAE(TINY_DC_AE)
    section = {"kind": "video_dc_ae", "config": dataclasses.asdict(TINY_DC_AE)}
    with contextlib.closing(run):
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        run.save(1, tensors, {}, {"name": "ae", "autoencoder": section})
        run.wait()
    assert isinstance(load_autoencoder(section | {"weights": str(run.path)}, CPU, torch.float32), VideoDCAE)
    with pytest.raises(UserError, match="holds a Video DC-AE and the recipe's autoencoder is a Hunyuan VAE"):
        load_autoencoder({"kind": "hunyuan", "weights": str(run.path), "config": {}}, CPU, torch.float32)
    weights = str(folder / "hunyuan_vae.safetensors")
    with pytest.raises(UserError, match="holds a Hunyuan VAE and the recipe's autoencoder is a Video DC-AE"):
        load_autoencoder(section | {"weights": weights}, CPU, torch.float32)


TINY_DC_AE = VideoDCAEConfig(
    scaling_factor=1.0,
    latent_channels=4,
    encoder_widths=(4, 8),
    decoder_widths=(4, 8),
    encoder_depths=(1, 1),
    decoder_depths=(1, 1),
    encoder_block_types=("ResBlock", "ResBlock"),
    decoder_block_types=("ResBlock", "ResBlock"),
    temporal_downsample=(True, False),
)
