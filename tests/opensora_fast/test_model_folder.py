"""What a folder of released weights holds: the parts are found among files that are none of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_fast.checkpoint_export import plan_export
from opensora_fast.errors import UserError
from opensora_fast.model_folder import find_model
from opensora_fast.parameter_source import open_parameters

pytest.importorskip("transformers")
V2, DC_AE = "Open_Sora_v2.safetensors", "F32T4C128_AE.safetensors"


@pytest.fixture
def ckpts(released_folder, tmp_path) -> Path:
    return Path(shutil.copytree(released_folder("open-sora-v2"), tmp_path / "ckpts"))


def test_files_that_are_no_models_do_no_harm(ckpts):
    lora = {f"double_blocks.0.img_attn.qkv.lora_{side}.weight": torch.zeros(4, 64) for side in "AB"}
    save_file(lora, ckpts / "lora.safetensors")
    (ckpts / "other.safetensors").write_bytes(b"damaged")
    (ckpts / ".hidden.safetensors").write_bytes(b"damaged")
    (ckpts / "folder.safetensors").mkdir()
    (ckpts / V2).rename(ckpts / "opensora_fast_v2.safetensors")  # as one may call an export
    model = find_model(ckpts)
    assert model.path == ckpts / "opensora_fast_v2.safetensors"
    assert model.autoencoder["weights"] == str(ckpts / "hunyuan_vae.safetensors")


@pytest.mark.parametrize(
    ("lost", "named"),
    [(V2, "lora.safetensors: no tensor says"), ("hunyuan_vae.safetensors", "other.safetensors is damaged")],
)
def test_they_are_named_where_a_part_is_missing(ckpts, lost, named):
    save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 64)}, ckpts / "lora.safetensors")
    (ckpts / "other.safetensors").write_bytes(b"damaged")
    (ckpts / lost).unlink()
    with pytest.raises(UserError, match=named) as refusal:
        find_model(ckpts)
    assert "\n" not in str(refusal.value)


def test_flux_schnell_makes_no_videos(ckpts):
    """It has neither guidance nor a condition."""
    tensors = load_file(ckpts / "flux1-dev.safetensors")
    schnell = {key: tensor for key, tensor in tensors.items() if not key.startswith("guidance_in")}
    save_file(schnell, ckpts / "flux1-schnell.safetensors")
    assert find_model(ckpts).path.name == V2
    with pytest.raises(UserError, match=r"flux1-schnell.safetensors makes pictures \(FLUX\)"):
        find_model(ckpts / "flux1-schnell.safetensors")


def test_an_export_without_a_condition_that_says_so_makes_videos(ckpts):
    fields = open_parameters(ckpts / V2).config
    tensors = {key: tensor for key, tensor in load_file(ckpts / V2).items() if not key.startswith("cond_in")}
    save_file(tensors, ckpts / V2, {"config": json.dumps({"cond_embed": False})})
    assert find_model(ckpts).path == ckpts / V2
    assert fields != find_model(ckpts).config


@pytest.mark.parametrize(
    ("told", "scale", "tiling"),
    [
        (None, 0.493, True),
        ({"scaling_factor": 1.7, "use_temporal_tiling": False}, 1.7, False),
        ({"scaling_factor": None, "use_temporal_tiling": False}, 0.493, False),
    ],
    ids=["nothing", "all", "no scale"],
)
def test_what_a_video_dc_ae_tells_of_itself_counts(told, scale, tiling, released_folder, tmp_path):
    ckpts = Path(shutil.copytree(released_folder("dcae"), tmp_path / "ckpts"))
    if told is not None:
        save_file(load_file(ckpts / DC_AE), ckpts / DC_AE, {"config": json.dumps(told)})
    config = find_model(ckpts).autoencoder["config"]
    assert (config["scaling_factor"], config["use_temporal_tiling"]) == (scale, tiling)


def test_a_text_encoder_that_was_exported_serves_in_its_place(ckpts, tmp_path):
    plan_export(open_parameters(ckpts / "google/t5-v1_1-xxl")).write(tmp_path / "t5", shard_bytes=10**5)
    assert find_model(ckpts, t5=tmp_path / "t5").text["t5"] == str(tmp_path / "t5")
