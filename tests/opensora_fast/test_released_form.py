"""What tensors say of their configuration: the released models' is read off their names and shapes alone."""

import ast
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.config import MMDIT_PRESETS, HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.diffusers_layout import diffusers_config, diffusers_shapes
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT
from opensora_fast.released import check_tensors, to_released_state_dict
from opensora_fast.released_form import kind_of, mmdit_form, vae_form
from opensora_fast.safetensors_file import TensorSpec

KEYS = Path(__file__).parents[1] / "released_keys"
SPLIT = {"fused_qkv": False, "use_liger_rope": True}
FLUX = {"fused_qkv": True, "use_liger_rope": False}
TINY = MMDIT_PRESETS["tiny"]


def released_specs(name: str) -> dict[str, TensorSpec]:
    lines = (KEYS / f"{name}.txt").read_text().splitlines()
    pairs = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return {key: TensorSpec(torch.bfloat16, ast.literal_eval(shape)) for key, shape in pairs}


def specs_of(model: torch.nn.Module, layout: dict[str, bool]) -> dict[str, TensorSpec]:
    return as_specs({key: tuple(t.shape) for key, t in to_released_state_dict(model, layout).items()})


def as_specs(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {key: TensorSpec(torch.bfloat16, shape) for key, shape in shapes.items()}


def on_meta(config: MMDiTConfig) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(config)


@pytest.mark.parametrize(
    ("name", "preset", "layout"),
    [
        ("opensora_mmdit_keys", "open-sora-v2", SPLIT),
        ("opensora_mmdit_keys_dcae", "open-sora-v2-dcae", SPLIT),
        ("opensora_mmdit_keys_fused", "open-sora-v2", FLUX),
        ("flux_dev_keys", "flux-dev", FLUX),
        ("flux_dev_fused_rope_keys", "flux-dev", SPLIT),
    ],
)
def test_released_transformers_say_what_they_are(name, preset, layout):
    specs = released_specs(name)
    assert kind_of(specs) == "mmdit"
    assert mmdit_form(specs) == asdict(MMDIT_PRESETS[preset]) | layout


def test_released_autoencoders_say_what_they_are():
    kind, form = vae_form(released_specs("opensora_dcae_keys"))
    assert (kind, VideoDCAEConfig(**form)) == ("video_dc_ae", VideoDCAEConfig())
    kind, form = vae_form(released_specs("opensora_hunyuan_vae_keys"))
    assert (kind, HunyuanVAEConfig(**form)) == ("hunyuan", HunyuanVAEConfig(use_spatial_tiling=True))
    assert kind_of(released_specs("flux_ae_keys")) == "flux_ae"
    for text_encoder in ("t5_v1_1_xxl_encoder_keys", "clip_vit_large_patch14_keys"):
        assert kind_of(released_specs(text_encoder)) is None
        with pytest.raises(UserError, match="neither a Hunyuan VAE's nor a Video DC-AE's"):
            vae_form(released_specs(text_encoder))


@settings(max_examples=20)
@given(
    fused=st.booleans(),
    head_dim=st.sampled_from([32, 64, 128]),
    patch=st.integers(1, 3),
    mlp_size=st.integers(1, 200),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("qkv_bias", "guidance_embed", "cond_embed")}),
    sizes=st.fixed_dictionaries({name: st.integers(1, 2) for name in ("num_heads", "depth", "depth_single_blocks")}),
)
def test_any_transformer_says_what_it_is(fused, head_dim, patch, mlp_size, options, sizes):
    """All but what no shape says, which are the released values; with the metadata of an export, also that."""
    hidden_size = head_dim * sizes["num_heads"]
    ratio = ratio_of(mlp_size, hidden_size)
    patch = patch if options["cond_embed"] else 2
    config = MMDiTConfig(
        hidden_size=hidden_size,
        axes_dim=(head_dim // 8, head_dim // 16 * 7, head_dim // 16 * 7),
        vec_in_dim=5,
        context_in_dim=6,
        in_channels=3 * patch**2,
        patch_size=patch,
        mlp_ratio=ratio,
        **options,
        **sizes,
    )
    layout = {"fused_qkv": fused, "use_liger_rope": not fused}
    specs = specs_of(on_meta(config), layout)
    form = mmdit_form(specs)
    assert MMDiTConfig(**{key: form[key] for key in asdict(config) if key != "mlp_ratio"}, mlp_ratio=ratio) == config
    assert int(hidden_size * form["mlp_ratio"]) == mlp_size
    assert {key: form[key] for key in layout} == layout

    other = asdict(config) | {"theta": 7, "axes_dim": [head_dim - 4, 2, 2], "use_liger_rope": fused}
    said = mmdit_form(specs, {"config": json.dumps(other)})
    assert (said["theta"], said["axes_dim"], said["use_liger_rope"]) == (7, (head_dim - 4, 2, 2), fused)
    assert said["fused_qkv"] is fused


def ratio_of(size: int, hidden_size: int) -> float:
    """A ratio for which the MLP has exactly this size."""
    return (size + 0.5) / hidden_size


@pytest.mark.parametrize("cond_embed", [True, False])
def test_diffusers_layout_says_what_it_is(cond_embed):
    config = MMDiTConfig(**asdict(TINY) | {"cond_embed": cond_embed, "guidance_embed": not cond_embed})
    specs = as_specs(diffusers_shapes(config))
    assert kind_of(specs) == "mmdit_diffusers"
    for metadata in ({}, {"config": json.dumps(diffusers_config(config))}, {"config": json.dumps(asdict(config))}):
        form = mmdit_form(specs, metadata)
        assert MMDiTConfig(**{key: form[key] for key in asdict(config)}) == config


def test_a_video_dc_ae_of_other_stages():
    config = VideoDCAEConfig(
        latent_channels=4,
        encoder_widths=(16, 32, 32),
        decoder_widths=(32, 16, 64),
        encoder_depths=(1, 0, 2),
        decoder_depths=(1, 2, 1),
        encoder_block_types=("ResBlock", "ResBlock", "EViTS5_GLU"),
        decoder_block_types=("EViTS5_GLU", "ResBlock", "EViTS5_GLU"),
        temporal_downsample=(True, True, False),
        heads_dim=16,
    )
    with torch.device("meta"):
        specs = specs_of(VideoDCAE(config), {})
    kind, form = vae_form(specs)
    assert (kind, VideoDCAEConfig(**form)) == ("video_dc_ae", config)
    said = {"temporal_downsample": [False, True, False], "scaling_factor": 0.493, "use_spatial_tiling": True}
    _, form = vae_form(specs, {"config": json.dumps(said)})
    assert VideoDCAEConfig(**form) == VideoDCAEConfig(**asdict(config) | said)


def test_a_hunyuan_vae_of_other_widths_takes_the_rest_from_metadata():
    widths = {128: 8, 256: 16, 512: 24}
    keys = released_specs("opensora_hunyuan_vae_keys")
    specs = as_specs({key: tuple(widths.get(n, n) for n in spec.shape) for key, spec in keys.items()})
    _, form = vae_form(specs, {"config": json.dumps({"norm_num_groups": 8, "use_temporal_tiling": True})})
    config = HunyuanVAEConfig(**form)
    assert config.block_out_channels == (8, 16, 24, 24)
    assert (config.layers_per_block, config.latent_channels, config.norm_num_groups) == (2, 16, 8)
    assert config.use_temporal_tiling


LAYOUTS = pytest.mark.parametrize("layout", [SPLIT, FLUX], ids=["split", "fused"])


def check(specs: dict[str, TensorSpec], layout: dict[str, bool]) -> None:
    """What loading these tensors would check."""
    config = MMDiTConfig(**{key: value for key, value in mmdit_form(specs).items() if key not in layout})
    expected = to_released_state_dict(on_meta(config), layout)
    check_tensors(specs, {key: tuple(tensor.shape) for key, tensor in expected.items()}, Path("file"))


def problem(specs: dict[str, TensorSpec], layout: dict[str, bool]) -> str:
    with pytest.raises(UserError) as refusal:
        check(specs, layout)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@LAYOUTS
def test_a_tensor_of_a_wrong_shape_is_named_and_no_other(layout):
    right = specs_of(on_meta(TINY), layout)
    for key, spec in right.items():
        wrong = right | {key: TensorSpec(spec.dtype, (spec.shape[0] + 2, *spec.shape[1:]))}
        assert f"(1 misshapen: {key} is {list(wrong[key].shape)}, expected {list(spec.shape)})" in problem(
            wrong, layout
        )


@LAYOUTS
def test_a_tensor_that_is_missing_is_named_and_no_other(layout):
    right = specs_of(on_meta(TINY), layout)
    for key in right:
        said = problem({name: spec for name, spec in right.items() if name != key}, layout)
        assert f"(1 missing: {key})" in said or f"as {key} would" in said


@LAYOUTS
def test_a_tensor_too_many_and_one_of_whole_numbers_are_named(layout):
    right = specs_of(on_meta(TINY), layout)
    extra = right | {"double_blocks.0.lora": TensorSpec(torch.float32, (2,))}
    assert "(1 unexpected: double_blocks.0.lora)" in problem(extra, layout)
    quantised = right | {"txt_in.weight": TensorSpec(torch.int8, right["txt_in.weight"].shape)}
    assert "(1 no floating point: txt_in.weight is torch.int8)" in problem(quantised, layout)


def check_dc_ae(specs: dict[str, TensorSpec]) -> None:
    with torch.device("meta"):
        model = VideoDCAE(VideoDCAEConfig(**vae_form(specs)[1]))
    check_tensors(specs, {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}, Path("file"))


def test_a_wrong_tensor_of_an_autoencoder_is_named_and_no_other():
    widths = (32, 32, 64)
    kinds = ("ResBlock", "EViTS5_GLU", "EViTS5_GLU")
    with torch.device("meta"):
        right = specs_of(
            VideoDCAE(
                VideoDCAEConfig(
                    latent_channels=4,
                    encoder_widths=widths,
                    decoder_widths=widths,
                    encoder_depths=(1, 1, 1),
                    decoder_depths=(1, 1, 1),
                    encoder_block_types=kinds,
                    decoder_block_types=kinds,
                    temporal_downsample=(True, True, False),
                )
            ),
            {},
        )
    check_dc_ae(right)
    for key, spec in right.items():
        wrong = right | {key: TensorSpec(spec.dtype, (spec.shape[0] + 1, *spec.shape[1:]))}
        with pytest.raises(UserError, match=rf"\(1 misshapen: {re.escape(key)} is "):
            check_dc_ae(wrong)
        with pytest.raises(UserError, match=rf"\(1 missing: {re.escape(key)}\)"):
            check_dc_ae({name: spec for name, spec in right.items() if name != key})


def test_what_cannot_be_told_is_one_line():
    tiny = specs_of(on_meta(TINY), SPLIT)
    odd = specs_of(on_meta(MMDiTConfig(**asdict(TINY) | {"num_heads": 4, "axes_dim": (4, 6, 6)})), SPLIT)
    for specs, metadata, said in (
        ({}, {}, "no tensor says in_channels, as img_in.weight would"),
        (odd, {}, "heads have 16 channels, of which no tensor says axes_dim: pass released_config"),
        (tiny, {"config": "{"}, "is no JSON"),
        (tiny, {"config": "[" * 100_000}, "is no JSON"),
        (tiny, {"config": "[1]"}, "is no JSON object"),
        (tiny, {"config": '{"theta": "x"}'}, "has theta='x', where a value like 10000 belongs"),
        (tiny, {"config": '{"axes_dim": [4, 14, "14"]}'}, r"has axes_dim=\[4, 14, '14'\], where a value like"),
        (tiny, {"config": '{"use_liger_rope": 1}'}, "has use_liger_rope=1, where a value like false belongs"),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            mmdit_form(specs, metadata)
        assert "\n" not in str(refusal.value)
