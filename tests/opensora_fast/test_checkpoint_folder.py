"""Which autoencoder a path stands for: a run with other weights lying in it, exported weights, and a download."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_fast.checkpoint_folder import is_run, load_autoencoder
from opensora_fast.cli import main
from opensora_fast.config import VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.train.checkpoint import RunFolder

CPU = torch.device("cpu")
# A run's own: neither its scale nor its tiling are those of a recipe's section.
TRAINED = VideoDCAEConfig(
    scaling_factor=1.7,
    use_spatial_tiling=True,
    spatial_tile_size=32,
    latent_channels=4,
    encoder_widths=(4, 8),
    decoder_widths=(4, 8),
    encoder_depths=(1, 1),
    decoder_depths=(1, 1),
    encoder_block_types=("ResBlock", "ResBlock"),
    decoder_block_types=("ResBlock", "ResBlock"),
    temporal_downsample=(True, False),
)
RECIPE = dataclasses.replace(TRAINED, scaling_factor=0.493, use_spatial_tiling=False)


def section(weights: Path) -> dict:
    """Of a recipe that trains on these weights."""
    return {"kind": "video_dc_ae", "weights": str(weights), "config": dataclasses.asdict(RECIPE)}


def loaded(weights: Path) -> VideoDCAE:
    model = load_autoencoder(section(weights), CPU, torch.float32)
    assert isinstance(model, VideoDCAE)
    return model


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Two checkpoints of an autoencoder run, whose first weights are all zero; the second's are not."""
    folder = RunFolder(tmp_path / "ae", 2)
    recipe = {"name": "ae", "autoencoder": {"kind": "video_dc_ae", "config": dataclasses.asdict(TRAINED)}}
    torch.manual_seed(0)
    with contextlib.closing(folder):
        for step in (1, 2):
            model = VideoDCAE(TRAINED)
            tensors = {f"model.{name}": tensor * (step - 1) for name, tensor in model.state_dict().items()}
            folder.save(step, tensors, {}, recipe)
            folder.wait()
    return folder


def export(source: Path, out: Path) -> Path:
    assert main(["checkpoint", "export", str(source), "--to", "released", "--out", str(out)]) == 0
    return out


def test_an_export_that_lies_in_a_run_is_not_what_the_run_is(run: RunFolder) -> None:
    export(run.path / "step-1", run.path / "export.safetensors")
    assert is_run(run.path)
    assert is_run(run.path / "step-1")
    assert not is_run(run.path / "export.safetensors")
    assert not is_run(run.path.parent)
    newest = loaded(run.path)
    assert any(parameter.any() for parameter in newest.parameters())
    assert not any(parameter.any() for parameter in loaded(run.path / "export.safetensors").parameters())


def test_an_export_is_used_as_its_run_is(run: RunFolder, tmp_path: Path) -> None:
    """The scale belongs to the latents that a model was trained on: no recipe's stands in its place."""
    video_BCTHW = torch.randn(1, 3, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    of_run, of_export = loaded(run.path), loaded(export(run.path, tmp_path / "export.safetensors"))
    assert of_run.config == of_export.config == TRAINED
    assert torch.equal(of_run.encode(video_BCTHW), of_export.encode(video_BCTHW))


def test_weights_that_say_nothing_are_read_as_the_recipe_says(run: RunFolder, tmp_path: Path) -> None:
    silent = tmp_path / "silent.safetensors"
    save_file(load_file(export(run.path, tmp_path / "export.safetensors")), silent)
    assert loaded(silent).config == RECIPE
    silent.with_suffix(".json").write_text(json.dumps({"scaling_factor": 2.5}))
    assert loaded(silent).config == dataclasses.replace(RECIPE, scaling_factor=2.5)


def test_a_damaged_configuration_names_its_file(run: RunFolder, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    tensors = load_file(export(run.path, tmp_path / "export.safetensors"))
    save_file(tensors, damaged, {"config": '{"scaling_factor": "a"}'})
    with pytest.raises(UserError, match=r"damaged\.safetensors.*scaling_factor"):
        loaded(damaged)
