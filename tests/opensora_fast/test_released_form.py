"""What tensors say of their configuration: the released models' is read off their names and shapes alone."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

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


def check(specs: dict[str, TensorSpec], layout: dict[str, bool], told: dict[str, Any] | None = None) -> None:
    """What loading these tensors would check."""
    form = mmdit_form(specs, {} if told is None else {"config": json.dumps(told)})
    config = MMDiTConfig(**{key: value for key, value in form.items() if key not in layout})
    if kind_of(specs) == "mmdit_diffusers":
        expected = diffusers_shapes(config)
    else:
        tensors = to_released_state_dict(on_meta(config), layout)
        expected = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    check_tensors(specs, expected, Path("file"))


def problem(specs: dict[str, TensorSpec], layout: dict[str, bool], told: dict[str, Any] | None = None) -> str:
    with pytest.raises(UserError) as refusal:
        check(specs, layout, told)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def widened(specs: dict[str, TensorSpec], key: str) -> Iterator[tuple[TensorSpec, dict[str, TensorSpec]]]:
    """One tensor longer along each of its axes, and all of them with it."""
    dtype, shape = specs[key]
    for axis in range(len(shape)):
        wrong = TensorSpec(dtype, tuple(size + (number == axis) for number, size in enumerate(shape)))
        yield wrong, specs | {key: wrong}


@LAYOUTS
def test_of_told_sizes_a_wrong_shape_along_any_axis_is_named_and_no_other(layout):
    right = specs_of(on_meta(TINY), layout)
    told = asdict(TINY) | layout
    check(right, layout, told)
    for key, spec in right.items():
        for wrong, specs in widened(right, key):
            expected = f"(1 misshapen: {key} is {list(wrong.shape)}, expected {list(spec.shape)})"
            assert expected in problem(specs, layout, told)


@pytest.mark.parametrize("name", ["opensora_mmdit_keys", "opensora_mmdit_keys_dcae", "flux_dev_keys"])
def test_of_the_released_size_a_wrong_shape_along_any_axis_is_named_and_no_other(name):
    """One tensor of each kind. Nothing tells, and one tensor alone says the width of the text."""
    right = released_specs(name)
    kinds = {re.sub(r"\d+", "N", key): key for key in right}
    for key in kinds.values():
        for wrong, specs in widened(right, key):
            form = mmdit_form(specs)
            assert form == mmdit_form(right), (key, wrong)


def test_missing_last_blocks_are_not_taken_for_a_smaller_model():
    def without(specs: dict[str, TensorSpec], block: str) -> dict[str, TensorSpec]:
        less = {key: spec for key, spec in specs.items() if not key.startswith(block)}
        assert len(less) < len(specs)
        return less

    v2, tiny = released_specs("opensora_mmdit_keys"), specs_of(on_meta(TINY), SPLIT)
    theirs = as_specs(diffusers_shapes(TINY))
    told = {"config": json.dumps(asdict(TINY))}
    for specs, metadata, block, said in (
        (v2, {}, "double_blocks.18.", "depth is 19, and the tensors double_blocks.18 to double_blocks.18 are missing"),
        (v2, {}, "single_blocks.37.", "depth_single_blocks is 38, and the tensors single_blocks.37"),
        (tiny, told, "single_blocks.1.", "depth_single_blocks is 2, and the tensors single_blocks.1"),
        (
            theirs,
            {"config": json.dumps(diffusers_config(TINY))},
            "single_transformer_blocks.1.",
            "is 2, and the tensors",
        ),
        (theirs, told, "transformer_blocks.0.", "depth is 1, and the tensors transformer_blocks.0"),
    ):
        with pytest.raises(UserError, match=said):
            mmdit_form(without(specs, block), metadata)

    dc_ae, hunyuan = released_specs("opensora_dcae_keys"), released_specs("opensora_hunyuan_vae_keys")
    small = VideoDCAEConfig(
        latent_channels=4,
        encoder_widths=(16, 32),
        decoder_widths=(16, 32),
        encoder_depths=(2, 1),
        decoder_depths=(1, 1),
        encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2,
        temporal_downsample=(True, False),
    )
    with torch.device("meta"):
        smaller = specs_of(VideoDCAE(small), {})
    lost = {key: spec for key, spec in smaller.items() if not key.startswith("encoder.stages.0.op_list.1.")}
    told = {"config": json.dumps(asdict(small))}
    vae_form(smaller, told)
    for specs, metadata, said in (
        (without(dc_ae, "encoder.stages.5.op_list.2."), {}, r"encoder_depths\[5\] is 3, .* encoder.stages.5.op_list.2"),
        (lost, told, r"encoder_depths\[0\] is 2"),
    ):
        with pytest.raises(UserError, match=said):
            vae_form(specs, metadata)
    form = vae_form(without(hunyuan, "encoder.down_blocks.0.resnets.1."))[1]
    assert form["layers_per_block"] == 2  # whoever loads them names what is missing


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 5},
        {"num_single_layers": 1},
        {"attention_head_dim": 64, "axes_dims_rope": [8, 28, 28]},
        {"guidance_embeds": True},
        {"in_channels": 128},
        {"out_channels": None},
        {"joint_attention_dim": 7},
        {"pooled_projection_dim": 7},
        {"axes_dims_rope": [2, 2, 24]},
        {"_class_name": "ChromaTransformer2DModel"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_diffusers_configuration_says_has_to_agree_with_the_tensors(change):
    config = diffusers_config(TINY)
    specs = as_specs(diffusers_shapes(TINY))
    check(specs, FLUX, config)
    problem(specs, FLUX, config | change)


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
    for key in right:
        for _, wrong in widened(right, key):
            with pytest.raises(UserError, match=rf"\(1 misshapen: {re.escape(key)} is "):
                check_dc_ae(wrong)
        with pytest.raises(UserError, match=rf"\(1 missing: {re.escape(key)}\)"):
            check_dc_ae({name: spec for name, spec in right.items() if name != key})


def test_what_cannot_be_told_is_one_line():
    tiny = specs_of(on_meta(TINY), SPLIT)
    odd = specs_of(on_meta(MMDiTConfig(**asdict(TINY) | {"num_heads": 4, "axes_dim": (4, 6, 6)})), SPLIT)
    for specs, metadata, said in (
        ({}, {}, "no tensor says hidden_size, as img_in.bias would"),
        (odd, {}, "heads have 16 channels, and no tensor says .*: say axes_dim in NAME.json beside the file"),
        (tiny, {"config": "{"}, "is no JSON"),
        (tiny, {"config": "[" * 100_000}, "is no JSON"),
        (tiny, {"config": "[1]"}, "is no JSON object"),
        (tiny, {"config": '{"theta": "x"}'}, "has theta='x', where a value like 10000 belongs"),
        (tiny, {"config": '{"axes_dim": [4, 14, "14"]}'}, r"has axes_dim=\[4, 14, '14'\], where a value like"),
        (tiny, {"config": '{"use_liger_rope": 1}'}, "has use_liger_rope=1, where a value like true belongs"),
        (tiny, {"config": '{"mlp_ratio": NaN}'}, "has mlp_ratio=nan, where a value like 4.0 belongs"),
        (tiny, {"config": '{"mlp_ratio": 1e999}'}, "has mlp_ratio=inf"),
        (tiny, {"config": '{"hidden_size": %s}' % ("9" * 400)}, "has hidden_size=9999"),
        (tiny, {"config": '{"_class_name": "ChromaTransformer2DModel"}'}, "of the class 'Chroma.*', not of FluxTrans"),
        (tiny, {"config": '{"hidden_size": 0}'}, "has hidden_size=0, which must be positive"),
        (tiny, {"config": '{"_class_name": 5}'}, "has _class_name=5, where a value like"),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            mmdit_form(specs, metadata)
        assert "\n" not in str(refusal.value)
