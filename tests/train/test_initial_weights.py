"""`opensora-fast train RECIPE --init_weights PATH`: FLUX as the start of stage 1, adaptation to another autoencoder,
and what a stage that follows another refuses.

The learning rate is zero, so that a step leaves the weights as training began with them.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from opensora_fast import cli, initialisation, streamed_loading
from opensora_fast.checkpoint_folder import find_checkpoint
from opensora_fast.config import MMDiTConfig
from opensora_fast.initialisation import REPORT
from opensora_fast.mmdit import initialize_parameter
from opensora_fast.model_folder import autoencoder_layout, find_model
from opensora_fast.parameter_source import open_parameters, read_parameters
from opensora_fast.peak_memory import LiveBytes
from opensora_fast.train.diffusion import initial_model
from opensora_fast.train.index import index_folder
from opensora_fast.train.recipes import RECIPES, find_recipe
from opensora_fast.video_io import write_video

IN_AND_OUT = ("img_in.", "cond_in.", "final_layer.linear.")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2):
        video = torch.rand(3, 20, 48, 80, generator=torch.Generator().manual_seed(number)) * 2 - 1
        write_video(folder / f"{number}.mp4", video, 12)
        (folder / f"{number}.txt").write_text(f"noise of kind {number}")
    index_folder(folder, folder / "index.parquet")
    return ["--data.index", str(folder / "index.parquet"), "--data.heldout_index", str(folder / "index.parquet")]


@pytest.fixture(scope="module")
def options(released_checkpoints, clips) -> list[str]:
    """A recipe's model as tiny as the released checkpoints; nothing is learnt."""
    words = [*clips, "--loop.device", "cpu", "--optimizer.lr", "0", "0.0", "--validation.draws", "1"]
    for name, value in released_checkpoints.mmdit_config("open-sora-v2").items():
        if name in ("vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "depth", "depth_single_blocks"):
            words += [f"--model.{name}", str(value)]
        if name == "axes_dim":
            words += ["--model.axes_dim", *map(str, value)]
    return words


@pytest.fixture(scope="module")
def flux(released_checkpoints, tmp_path_factory) -> Path:
    return released_checkpoints.write("flux-dev", tmp_path_factory.mktemp("flux") / "flux1-dev.safetensors")


@pytest.fixture(scope="module")
def run(flux, options, tmp_path_factory) -> Path:
    """A stage 1 that began with FLUX."""
    out = tmp_path_factory.mktemp("runs") / "stage1"
    assert (
        cli.main(["train", "demo_stage1", "--out", str(out), "--steps", "1", "--init_weights", str(flux), *options])
        == 0
    )
    return out


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    source = open_parameters(path, "model" if path.is_dir() else None)
    return read_parameters(source, source.specs)


def report_of(run: Path) -> dict:
    return json.loads((run / REPORT).read_text())


def test_stage_1_begins_with_flux(run, flux):
    began, source = weights_of(run), weights_of(flux)
    assert {tensor.dtype for tensor in began.values()} == {torch.float32}
    for name, tensor in began.items():
        assert torch.equal(tensor, source[name].float() if name in source else torch.zeros_like(tensor)), name
    assert began.keys() - source.keys() == {"cond_in.weight", "cond_in.bias"}
    report = report_of(run)
    assert set(report["new"]) == began.keys() - source.keys()
    assert {name.split(".")[0] for name in report["ignored"]} == {"guidance_in"}
    assert report["dtypes"] == "bfloat16 to float32"
    assert set(report["loaded"]) | set(report["converted"]) | set(report["new"]) == began.keys()


def test_going_on_reads_the_run_and_not_the_weights(run, flux, options, tmp_path, capsys):
    (run / REPORT).rename(tmp_path / "kept.json")
    words = ["train", "demo_stage1", "--out", str(run), "--steps", "2", "--init_weights", str(tmp_path / "moved")]
    assert cli.main([*words, *options]) == 0
    assert not (run / REPORT).exists()
    (tmp_path / "kept.json").rename(run / REPORT)
    assert find_checkpoint(run).name == "step-2"


def test_a_run_that_starts_over_keeps_no_report_of_other_weights(options, tmp_path):
    (tmp_path / REPORT).write_text("{}")
    assert cli.main(["train", "demo_stage1", "--out", str(tmp_path), "--steps", "1", "--fresh", *options]) == 0
    assert not (tmp_path / REPORT).exists()


def test_a_run_with_stand_ins_is_one_to_sample_from(run):
    """Its autoencoder is untrained and lies in the run; its size is known without its weights."""
    found = find_model(run)
    layout = autoencoder_layout(found.autoencoder)
    assert Path(found.autoencoder["weights"]).is_relative_to(run.resolve())
    assert layout.latent_channels == found.config.latent_channels


def test_another_autoencoder_keeps_the_blocks(run, options, tmp_path, capsys):
    """Tokens of one place in place of four: a quarter of the channels."""
    other = ["--model.in_channels", "16", "--model.patch_size", "1"]
    words = ["train", "demo_stage1", "--steps", "1", "--init_weights", str(run), *options, *other]
    assert cli.main([*words, "--out", str(tmp_path / "adapted")]) == 0
    assert "6 new" in capsys.readouterr().out
    before, after = weights_of(run), weights_of(tmp_path / "adapted")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if not name.startswith(IN_AND_OUT):
            assert torch.equal(tensor, before[name]), name
    assert after["img_in.weight"].shape == (64, 16)
    assert after["img_in.weight"].std() > 0
    assert not after["final_layer.linear.weight"].any()
    assert {name for name in after if name.startswith(IN_AND_OUT)} == set(report_of(tmp_path / "adapted")["new"])

    assert cli.main([*words, "--out", str(tmp_path / "strict"), "--new_layers", "none"]) == 2
    told = capsys.readouterr().err
    assert "in_channels is 64 there and 16 in the model" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "strict" / "recipe.json").exists()
    assert not list((tmp_path / "strict").rglob("*.safetensors"))  # not even the text encoders of the demo


def test_weights_go_to_the_device_without_a_copy_on_the_host(flux, released_checkpoints, monkeypatch):
    """The device "meta" stands for one with memory of its own. New layers are drawn on the CPU, whatever the device."""
    monkeypatch.setattr(streamed_loading, "BLOCK_BYTES", 2**14)
    drawn_on = {}

    def noted(name: str, parameter: torch.Tensor) -> None:
        drawn_on[name] = parameter.device.type
        initialize_parameter(name, parameter)

    source, form = open_parameters(flux), released_checkpoints.mmdit_config("open-sora-v2")
    config = MMDiTConfig(**{field.name: form[field.name] for field in dataclasses.fields(MMDiTConfig)})
    recipe = dataclasses.replace(RECIPES["stage1"](), model=config, new_layers="always")
    meta = torch.device("meta")
    monkeypatch.setattr(initialisation, "initialize_parameter", noted)
    with LiveBytes() as live:
        model, report = initial_model(recipe, source, meta, resumed=False)
    assert {parameter.device for parameter in model.parameters()} == {meta}
    assert drawn_on == dict.fromkeys(report.names("new"), "cpu")
    assert {name.split(".")[0] for name in drawn_on} == {"img_in", "cond_in", "final_layer"}
    assert live.peak <= 6 * 2**14 < sum(parameter.nbytes for parameter in model.parameters()) / 10


def test_of_a_resumed_run_nothing_is_drawn_or_read(released_checkpoints, monkeypatch):
    form = released_checkpoints.mmdit_config("open-sora-v2")
    config = MMDiTConfig(**{field.name: form[field.name] for field in dataclasses.fields(MMDiTConfig)})
    recipe = dataclasses.replace(RECIPES["stage1"](), model=config)
    with LiveBytes() as live:
        model, report = initial_model(recipe, None, torch.device("meta"), resumed=True)
    assert report is None
    assert model.config == config
    assert live.peak == 0


def test_a_stage_that_follows_another_takes_only_what_fits(run, flux, options, tmp_path, capsys):
    words = ["train", "demo_stage2", "--out", str(tmp_path / "second"), "--steps", "1", *options]
    assert cli.main([*words, "--init_weights", str(flux)]) == 2
    told = capsys.readouterr().err
    assert "cond_embed is False there and True in the model" in told
    assert "new_layers=auto" in told
    assert cli.main([*words, "--init_weights", str(run)]) == 0
    assert not report_of(tmp_path / "second")["new"]
    assert all(torch.equal(tensor, weights_of(run)[name]) for name, tensor in weights_of(tmp_path / "second").items())


def test_recipes_say_which_of_their_layers_may_be_new():
    recipes = {name: find_recipe(name) for name in RECIPES}
    allowed = {name: recipe.new_layers for name, recipe in recipes.items() if hasattr(recipe, "new_layers")}
    starts = {"stage1": "auto", "dcae_short": "auto", "demo_stage1": "auto"}
    assert allowed == dict.fromkeys(allowed, "none") | starts
