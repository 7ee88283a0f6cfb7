"""Released checkpoints: the released model's numbers, names and shapes; exact round trips; files not to be trusted."""

import ast
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from opensora_fast.config import MMDIT_PRESETS, MMDiTConfig, VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.mmdit import DoubleBlock, MMDiT, SingleBlock
from opensora_fast.positions import position_ids_THW
from opensora_fast.profiling import eager_block
from opensora_fast.released import load_released_dc_ae, load_released_mmdit, read_weights, to_released_state_dict

TESTS = Path(__file__).parents[1]
TINY = asdict(MMDIT_PRESETS["tiny"])
LAYOUTS = [
    {"fused_qkv": fused, "use_liger_rope": half_split} for fused in (True, False) for half_split in (True, False)
]


def random_weights(config: MMDiTConfig, layout: dict[str, bool]) -> dict[str, torch.Tensor]:
    """A checkpoint in this layout; fresh weights would hide mistakes behind their many zeros."""
    with torch.device("meta"):
        expected = to_released_state_dict(MMDiT(config), layout)
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(t.shape, generator=generator) / t.shape[-1] ** 0.5 for key, t in expected.items()}


def random_inputs(config: MMDiTConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "img": torch.randn(2, 12, config.in_channels),
        "img_ids": position_ids_THW(3, 2, 2).expand(2, -1, -1),
        "txt": torch.randn(2, 3, config.context_in_dim),
        "txt_ids": torch.zeros(2, 3, 3),
        "timesteps": torch.tensor([0.9, 0.2]),
        "y_vec": torch.randn(2, config.vec_in_dim),
    }


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_velocity_and_gradients_are_the_released_models(golden):
    released_config, tensors = golden("mmdit_tiny_split")
    model = load_released_mmdit(tensors["weight"], released_config)
    target = tensors["input"].pop("target")
    velocity = model(**tensors["input"])
    loss = (velocity - target).square().mean()
    loss.backward()
    assert relative(velocity.detach(), tensors["output"]["velocity"]) < 1e-4
    assert relative(loss.detach(), tensors["output"]["loss"]) < 1e-4

    holder = MMDiT(model.config)
    holder.load_state_dict({name: parameter.grad for name, parameter in model.named_parameters()})
    gradients = to_released_state_dict(holder, released_config)
    for key, expected in tensors["grad"].items():
        assert relative(gradients[key], expected) < 1e-3, key


def released_keys(name: str) -> dict[str, tuple[int, ...]]:
    lines = (TESTS / "released_keys" / f"{name}.txt").read_text().splitlines()
    pairs = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return {key: ast.literal_eval(shape) for key, shape in pairs}


@pytest.mark.parametrize(
    ("name", "model_class", "config", "fused_qkv"),
    [
        ("opensora_mmdit_keys", MMDiT, MMDIT_PRESETS["open-sora-v2"], False),
        ("opensora_mmdit_keys_fused", MMDiT, MMDIT_PRESETS["open-sora-v2"], True),
        ("opensora_mmdit_keys_dcae", MMDiT, MMDIT_PRESETS["open-sora-v2-dcae"], False),
        ("opensora_dcae_keys", VideoDCAE, VideoDCAEConfig(), None),
    ],
)
@pytest.mark.parametrize("half_split", [True, False])
def test_names_and_shapes_are_the_released_ones(name, model_class, config, fused_qkv, half_split):
    with torch.device("meta"):
        model = model_class(config)
    exported = to_released_state_dict(model, {"fused_qkv": fused_qkv, "use_liger_rope": half_split})
    assert {key: tuple(tensor.shape) for key, tensor in exported.items()} == released_keys(name)


@settings(max_examples=20)
@given(
    layout=st.sampled_from(LAYOUTS),
    axes_dim=st.sampled_from([(2, 2, 2), (4, 6, 2)]),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("qkv_bias", "guidance_embed", "cond_embed")}),
    sizes=st.fixed_dictionaries({name: st.integers(1, 2) for name in ("num_heads", "depth", "depth_single_blocks")}),
)
def test_round_trips_keep_every_bit(layout, axes_dim, options, sizes):
    hidden_size = sum(axes_dim) * sizes["num_heads"]
    config = MMDiTConfig(
        hidden_size=hidden_size, axes_dim=axes_dim, vec_in_dim=5, context_in_dim=6, in_channels=4, **options, **sizes
    )
    weights = random_weights(config, layout)
    model = load_released_mmdit(weights, asdict(config) | layout)
    assert model.config == config
    exported = to_released_state_dict(model, layout)
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[key], weights[key]) for key in weights)
    for other in LAYOUTS:
        again = load_released_mmdit(to_released_state_dict(model, other), asdict(config) | other)
        assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_interleaved_weights_give_what_interleaved_rotation_gives(monkeypatch):
    """The conversion against its meaning: the weights as they are, in a model that rotates the pairs (2i, 2i + 1)."""

    def rotate_interleaved(qk, rope):
        turn = torch.complex(*rope)[:, :, None, None]
        return torch.view_as_real(torch.view_as_complex(qk.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    config, interleaved = MMDIT_PRESETS["tiny"], {"fused_qkv": False, "use_liger_rope": False}
    weights, inputs = random_weights(config, interleaved), random_inputs(config)
    converted = load_released_mmdit(weights, TINY | interleaved)
    unconverted = load_released_mmdit(weights, TINY | interleaved | {"use_liger_rope": True})
    with torch.no_grad():
        velocity = converted(**inputs)
        assert relative(unconverted(**inputs), velocity) > 1e-3
        monkeypatch.setattr(eager_block, "rotate", rotate_interleaved)
        for kind, eager in ((DoubleBlock, eager_block.double_block), (SingleBlock, eager_block.single_block)):
            # the last argument is the ranks that share the sequence, which the eager form knows nothing of
            monkeypatch.setattr(kind, "forward", lambda block, *inputs, eager=eager: eager(block, *inputs[:-1]))
        assert relative(unconverted(**inputs), velocity) < 1e-5


def test_silent_fields_mean_what_the_released_code_assumes():
    flux = TINY | {"cond_embed": False, "type": "flux", "from_pretrained": "flux1-dev.safetensors"}
    weights = random_weights(MMDiTConfig(**TINY | {"cond_embed": False}), {"fused_qkv": True, "use_liger_rope": False})
    del flux["cond_embed"]
    silent = load_released_mmdit(weights, flux)
    explicit = load_released_mmdit(weights, flux | {"fused_qkv": True, "use_liger_rope": False, "cond_embed": False})
    assert silent.config == explicit.config
    assert all(map(torch.equal, silent.state_dict().values(), explicit.state_dict().values()))


def test_loading_takes_tensors_over_in_their_dtype():
    layout = {"fused_qkv": True, "use_liger_rope": True}
    weights = {key: tensor.bfloat16() for key, tensor in random_weights(MMDIT_PRESETS["tiny"], layout).items()}
    model = load_released_mmdit(weights, TINY | layout)
    exported = to_released_state_dict(model, layout)
    copied = [key for key in weights if exported[key].data_ptr() != weights[key].data_ptr()]
    assert all(key.endswith("norm.scale") for key in copied)
    assert all(parameter.dtype == torch.bfloat16 and parameter.requires_grad for parameter in model.parameters())


def test_every_tensor_that_does_not_fit_is_named():
    layout = {"fused_qkv": False, "use_liger_rope": True}
    weights = random_weights(MMDIT_PRESETS["tiny"], layout)
    del weights["img_in.bias"], weights["single_blocks.1.k_proj.weight"]
    weights["lora.a"] = weights["lora.b"] = torch.zeros(1)
    weights["txt_in.weight"] = torch.zeros(64, 47)
    with pytest.raises(UserError) as refusal:
        load_released_mmdit(weights, TINY | layout)
    message = str(refusal.value)
    assert "2 missing: img_in.bias, single_blocks.1.k_proj.weight;" in message
    assert "2 unexpected: lora.a, lora.b;" in message
    assert "1 misshapen: txt_in.weight is [64, 47], expected [64, 48]" in message
    assert "\n" not in message


def test_dc_ae_round_trips_and_names_what_does_not_fit():
    released_config = {
        "type": "dc_ae",  # no field of the architecture: ignored
        "latent_channels": 4,
        "encoder_widths": [32, 32],
        "decoder_widths": [32, 32],
        "encoder_depths": [1, 1],
        "decoder_depths": [1, 1],
        "encoder_block_types": ["ResBlock", "EViTS5_GLU"],
        "decoder_block_types": ["ResBlock", "EViTS5_GLU"],
        "temporal_downsample": [True, False],
    }
    config = VideoDCAEConfig(**{key: value for key, value in released_config.items() if key != "type"})
    weights = VideoDCAE(config).state_dict()
    model = load_released_dc_ae(weights, released_config)
    assert model.config == config
    exported = to_released_state_dict(model, released_config)
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[key], weights[key]) for key in weights)
    del weights["encoder.project_in.conv.bias"]
    with pytest.raises(UserError, match="1 missing: encoder.project_in.conv.bias"):
        load_released_dc_ae(weights, released_config)


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder.mkdir()
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_every_kind_of_file_is_read_alike(tmp_path):
    with torch.no_grad():
        weights = to_released_state_dict(MMDiT(MMDIT_PRESETS["tiny"]).bfloat16(), {"fused_qkv": False})
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "model.pt")
    keys = list(weights)
    halves = {"1.safetensors": keys[::2], "2.safetensors": keys[1::2]}
    write_shards(tmp_path / "shards", {name: {key: weights[key] for key in part} for name, part in halves.items()})
    for path in ("model.safetensors", "model.pt", "shards"):
        found = read_weights(tmp_path / path)
        assert found.keys() == weights.keys()
        assert all(found[key].dtype == torch.bfloat16 and torch.equal(found[key], weights[key]) for key in keys)


class Payload:
    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    tensors = {"a": torch.zeros(100)}
    save_file(tensors, tmp_path / "cut.safetensors")
    torch.save(tensors, tmp_path / "cut.pt")
    for name in ("cut.safetensors", "cut.pt"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)))
    (tmp_path / "empty.pth").touch()
    torch.save({"a": Payload()}, tmp_path / "code.pt")
    torch.save({"model": tensors}, tmp_path / "nested.pt")
    (tmp_path / "weights.onnx").touch()
    (tmp_path / "folder").mkdir()
    write_shards(tmp_path / "torn", {"1.safetensors": tensors, "2.safetensors": {"b": torch.zeros(1)}})
    (tmp_path / "torn" / "2.safetensors").unlink()
    write_shards(tmp_path / "lost", {"1.safetensors": tensors})
    (tmp_path / "lost" / "model.safetensors.index.json").write_text('{"weight_map": {"b": "1.safetensors"}}')
    write_shards(tmp_path / "garbled", {"1.safetensors": tensors})
    (tmp_path / "garbled" / "model.safetensors.index.json").write_text('{"weight_map": []}')

    for name, said in {
        "absent.safetensors": "do not exist",
        "cut.safetensors": "damaged",
        "cut.pt": "damaged",
        "noise.pt": "no file of tensors",
        "empty.pth": "damaged",
        "code.pt": "pickled code, which is not run",
        "nested.pt": "not a flat state dict",
        "weights.onnx": "suffix '.onnx'",
        "folder": "0 .safetensors files",
        "torn": "lacks 2.safetensors",
        "lost": "lack b",
        "garbled": "damaged",
    }.items():
        with pytest.raises(UserError, match=said) as refusal:
            read_weights(tmp_path / name)
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert not Payload.ran
