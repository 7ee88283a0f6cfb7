"""diffusers' layout: the names it loads, rows that can be put back, and a model of that class giving our velocity."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_fast.config import MMDIT_PRESETS, HunyuanVAEConfig, MMDiTConfig
from opensora_fast.diffusers_layout import (
    BIASES,
    WRITTEN_SUM,
    biases_file,
    check_biases,
    diffusers_config,
    diffusers_parts,
    diffusers_segments,
    diffusers_shapes,
    diffusers_vae_config,
    to_diffusers,
)
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT
from opensora_fast.positions import position_ids_THW
from opensora_fast.released import load_mmdit_from, load_released_mmdit, to_released_state_dict
from opensora_fast.released_form import mmdit_form
from opensora_fast.safetensors_file import TensorSpec
from opensora_fast.streamed_loading import Target, load_segments
from opensora_fast.weight_files import BIASES_FILE, WeightFiles

FLUX = replace(MMDIT_PRESETS["tiny"], cond_embed=False, guidance_embed=True)
CONDITIONED = MMDIT_PRESETS["tiny"]
INTERLEAVED = {"fused_qkv": True, "use_liger_rope": False}

# What FluxTransformer2DModel(num_layers=1, num_single_layers=2, guidance_embeds=True, ...) has: 2 heads of 32 channels.
KEYS = {
    "time_text_embed.timestep_embedder.linear_1": (64, 256),
    "time_text_embed.timestep_embedder.linear_2": (64, 64),
    "time_text_embed.guidance_embedder.linear_1": (64, 256),
    "time_text_embed.guidance_embedder.linear_2": (64, 64),
    "time_text_embed.text_embedder.linear_1": (64, 32),
    "time_text_embed.text_embedder.linear_2": (64, 64),
    "context_embedder": (64, 48),
    "x_embedder": (64, 16),
    "transformer_blocks.0.norm1.linear": (384, 64),
    "transformer_blocks.0.norm1_context.linear": (384, 64),
    "transformer_blocks.0.attn.norm_q": (32,),
    "transformer_blocks.0.attn.norm_k": (32,),
    "transformer_blocks.0.attn.norm_added_q": (32,),
    "transformer_blocks.0.attn.norm_added_k": (32,),
    "transformer_blocks.0.attn.to_q": (64, 64),
    "transformer_blocks.0.attn.to_k": (64, 64),
    "transformer_blocks.0.attn.to_v": (64, 64),
    "transformer_blocks.0.attn.add_q_proj": (64, 64),
    "transformer_blocks.0.attn.add_k_proj": (64, 64),
    "transformer_blocks.0.attn.add_v_proj": (64, 64),
    "transformer_blocks.0.attn.to_out.0": (64, 64),
    "transformer_blocks.0.attn.to_add_out": (64, 64),
    "transformer_blocks.0.ff.net.0.proj": (256, 64),
    "transformer_blocks.0.ff.net.2": (64, 256),
    "transformer_blocks.0.ff_context.net.0.proj": (256, 64),
    "transformer_blocks.0.ff_context.net.2": (64, 256),
    "norm_out.linear": (128, 64),
    "proj_out": (16, 64),
} | {
    f"single_transformer_blocks.{block}.{layer}": shape
    for block in range(2)
    for layer, shape in {
        "norm.linear": (192, 64),
        "attn.norm_q": (32,),
        "attn.norm_k": (32,),
        "attn.to_q": (64, 64),
        "attn.to_k": (64, 64),
        "attn.to_v": (64, 64),
        "proj_mlp": (256, 64),
        "proj_out": (64, 320),
    }.items()
}


def random_model(config: MMDiTConfig) -> MMDiT:
    generator = torch.Generator().manual_seed(0)
    model = MMDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights would hide mistakes behind their many zeros
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def translated(model: MMDiT) -> dict[str, Tensor]:
    ours = {name: parameter.detach() for name, parameter in model.state_dict().items()}
    theirs: dict[str, Tensor] = {}
    for part in diffusers_parts(ours):
        theirs |= to_diffusers({name: ours[name] for name in part}, model.config)
    return theirs


def test_names_and_shapes_are_those_of_the_class():
    expected = {}
    for layer, shape in KEYS.items():
        expected[f"{layer}.weight"] = shape
        if len(shape) == 2:
            expected[f"{layer}.bias"] = shape[:1]
    assert shapes(FLUX) == expected
    unguided = {key: shape for key, shape in expected.items() if "guidance_embedder" not in key}
    assert shapes(CONDITIONED) == unguided | {"x_embedder.weight": (64, 16 + 20)}


def shapes(config: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in translated(random_model(config)).items()}


def test_the_configuration_is_that_of_the_class():
    assert diffusers_config(MMDIT_PRESETS["open-sora-v2"]) == {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64 + 68,
        "out_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
    }
    flux = diffusers_config(MMDIT_PRESETS["flux-dev"])
    assert (flux["in_channels"], flux["out_channels"], flux["guidance_embeds"]) == (64, 64, True)


@pytest.mark.parametrize(
    "change", [{"mlp_ratio": 2.0}, {"theta": 500}, {"qkv_bias": False}], ids=lambda c: next(iter(c))
)
def test_what_the_class_has_no_place_for_is_refused(change):
    with pytest.raises(UserError, match=f"{next(iter(change))}=.*FluxTransformer2DModel has .*--to released"):
        diffusers_config(replace(FLUX, **change))


def put_back(theirs: dict[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """The inverse, written from the other end: FLUX's own tensors from those of diffusers."""
    theirs = dict(theirs)
    flux: dict[str, Tensor] = {}

    def move(flux_layer: str, *layers: str) -> None:
        for leaf in ("weight", "bias"):
            flux[f"{flux_layer}.{leaf}"] = torch.cat([theirs.pop(f"{layer}.{leaf}") for layer in layers])

    def scale(flux_norm: str, norm: str) -> None:
        flux[f"{flux_norm}.scale"] = theirs.pop(f"{norm}.weight")

    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    for flux_name, name in embedders.items() | (
        {("guidance_in", "guidance_embedder")} if config.guidance_embed else set()
    ):
        move(f"{flux_name}.in_layer", f"time_text_embed.{name}.linear_1")
        move(f"{flux_name}.out_layer", f"time_text_embed.{name}.linear_2")
    move("txt_in", "context_embedder")
    move("img_in", "x_embedder")
    if config.cond_embed:
        image, condition = flux["img_in.weight"].split([config.in_channels, config.cond_channels], dim=1)
        flux |= {"img_in.weight": image, "cond_in.weight": condition, "cond_in.bias": torch.zeros(config.hidden_size)}
    for i in range(config.depth):
        block, ours = f"transformer_blocks.{i}", f"double_blocks.{i}"
        move(f"{ours}.img_mod.lin", f"{block}.norm1.linear")
        move(f"{ours}.txt_mod.lin", f"{block}.norm1_context.linear")
        move(f"{ours}.img_attn.qkv", *(f"{block}.attn.to_{kind}" for kind in "qkv"))
        move(f"{ours}.txt_attn.qkv", *(f"{block}.attn.add_{kind}_proj" for kind in "qkv"))
        move(f"{ours}.img_attn.proj", f"{block}.attn.to_out.0")
        move(f"{ours}.txt_attn.proj", f"{block}.attn.to_add_out")
        for stream, added in (("img", ""), ("txt", "added_")):
            scale(f"{ours}.{stream}_attn.norm.query_norm", f"{block}.attn.norm_{added}q")
            scale(f"{ours}.{stream}_attn.norm.key_norm", f"{block}.attn.norm_{added}k")
        for stream, mlp in (("img", "ff"), ("txt", "ff_context")):
            move(f"{ours}.{stream}_mlp.0", f"{block}.{mlp}.net.0.proj")
            move(f"{ours}.{stream}_mlp.2", f"{block}.{mlp}.net.2")
    for i in range(config.depth_single_blocks):
        block, ours = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        move(f"{ours}.modulation.lin", f"{block}.norm.linear")
        move(f"{ours}.linear1", *(f"{block}.attn.to_{kind}" for kind in "qkv"), f"{block}.proj_mlp")
        move(f"{ours}.linear2", f"{block}.proj_out")
        scale(f"{ours}.norm.query_norm", f"{block}.attn.norm_q")
        scale(f"{ours}.norm.key_norm", f"{block}.attn.norm_k")
    move("final_layer.linear", "proj_out")
    move("final_layer.adaLN_modulation.1", "norm_out.linear")
    for leaf in ("weight", "bias"):
        rows = flux[f"final_layer.adaLN_modulation.1.{leaf}"]
        flux[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat(rows.chunk(2)[::-1])
    assert not theirs, f"not put back: {list(theirs)}"
    return flux


@pytest.mark.parametrize("config", [FLUX, CONDITIONED], ids=["flux", "conditioned"])
def test_the_translation_can_be_undone_bit_for_bit(config):
    model = random_model(config)
    summed = {}
    if config.cond_embed:  # the one thing that is computed
        summed = {"img_in.bias": (model.img_in.bias + model.cond_in.bias).detach()}
        summed["cond_in.bias"] = torch.zeros_like(summed["img_in.bias"])
    flux = put_back(translated(model), config)
    expected = to_released_state_dict(model, INTERLEAVED) | summed
    assert flux.keys() == expected.keys()
    assert all(torch.equal(flux[key], expected[key]) for key in expected)
    again = load_released_mmdit(flux, asdict(config) | INTERLEAVED).state_dict()
    assert all(torch.equal(again[name], (model.state_dict() | summed)[name]) for name in again)


def specs(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def written(model: MMDiT, folder: Path, *, biases: bool = True) -> WeightFiles:
    """A model as diffusers' folder of one file."""
    folder.mkdir(exist_ok=True)
    theirs = {key: tensor.contiguous() for key, tensor in translated(model).items()}
    save_file(theirs, folder / "diffusion_pytorch_model.safetensors")
    if biases and model.config.cond_embed:
        ours = {name: model.state_dict()[name] for name in BIASES}
        save_file(biases_file(ours, model.config), folder / BIASES_FILE)
    return WeightFiles.open(folder)


def read_back(files: WeightFiles, config: MMDiTConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = MMDiT(config).state_dict()
    ours = {name: torch.full(tensor.shape, torch.nan) for name, tensor in shapes.items()}
    load_segments(files, [Target(ours[name], diffusers_segments(name, config, files.specs)) for name in ours])
    return ours


@settings(max_examples=12)
@given(
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 16]),
    depth=st.integers(0, 2),
    single=st.integers(1, 2),
    channels=st.integers(1, 3),
    patch=st.integers(1, 3),
    cond=st.booleans(),
    guidance=st.booleans(),
)
def test_every_tensor_comes_back_bit_for_bit(
    tmp_path_factory, heads, head_dim, depth, single, channels, patch, cond, guidance
):
    config = MMDiTConfig(
        in_channels=channels * patch**2,
        vec_in_dim=5,
        context_in_dim=7,
        hidden_size=heads * head_dim,
        num_heads=heads,
        depth=depth,
        depth_single_blocks=single,
        axes_dim=(head_dim // 2, head_dim // 4, head_dim // 4),
        guidance_embed=guidance,
        cond_embed=cond,
        patch_size=patch,
    )
    model = random_model(config)
    files = written(model, tmp_path_factory.mktemp("d"))
    shapes = {key: spec.shape for key, spec in specs(translated(model)).items()}
    assert diffusers_shapes(config) == shapes
    if cond:
        check_biases(files)
    found = read_back(files, config)
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(found[name], tensor)} == set()
    form = mmdit_form(files.specs, {"config": json.dumps(diffusers_config(config))})
    read = {field: value for field, value in form.items() if hasattr(config, field)}
    expected = asdict(config) if cond else asdict(config) | {"patch_size": 2}  # which then nothing says
    assert read == expected


def test_without_the_side_file_one_bias_has_the_sum(tmp_path):
    model = random_model(CONDITIONED)
    found = read_back(written(model, tmp_path, biases=False), CONDITIONED)
    assert not found["cond_in.bias"].any()
    assert torch.equal(found["img_in.bias"], model.img_in.bias + model.cond_in.bias)


def test_a_side_file_of_other_weights_is_refused(tmp_path):
    files = written(random_model(CONDITIONED), tmp_path)
    check_biases(files)
    with torch.no_grad():
        changed = random_model(CONDITIONED)
        changed.img_in.bias[3] += 1
    theirs = {key: tensor.contiguous() for key, tensor in translated(changed).items()}
    save_file(theirs, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=f"{BIASES_FILE}: .*changed since: remove this file"):
        check_biases(WeightFiles.open(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda side: side.pop("cond_in.bias"), "1 missing: cond_in.bias"),
        (lambda side: side.pop(WRITTEN_SUM), f"1 missing: {WRITTEN_SUM}"),
        (lambda side: side.update({"img_in.bias": torch.zeros(67)}), r"1 misshapen: img_in.bias is \[67\]"),
        (lambda side: side.update({"img_in.bias": torch.zeros(3)}), r"1 misshapen: img_in.bias is \[3\]"),
        (lambda side: side["cond_in.bias"].add_(1), "changed since: remove this file"),
        (lambda side: side.update({WRITTEN_SUM: side[WRITTEN_SUM].bfloat16()}), "changed since: remove this file"),
    ],
    ids=["no cond_in", "no sum", "longer", "shorter", "changed", "other dtype"],
)
def test_a_side_file_that_is_not_whole_or_was_changed_is_refused(change, said, tmp_path):
    written(random_model(CONDITIONED), tmp_path)
    side = load_file(tmp_path / BIASES_FILE)
    change(side)
    save_file(side, tmp_path / BIASES_FILE)
    with pytest.raises(UserError, match=said):
        load_mmdit_from(WeightFiles.open(tmp_path))


def test_the_configuration_of_the_autoencoder_is_that_of_its_class():
    config = HunyuanVAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1)
    theirs = diffusers_vae_config(config)
    assert (theirs["block_out_channels"], theirs["layers_per_block"]) == ([32, 32, 64, 64], 1)
    with pytest.raises(UserError, match=r"shift_factor=0\.5, but AutoencoderKLHunyuanVideo .*--to released"):
        diffusers_vae_config(replace(config, shift_factor=0.5))


def flux_transformer(p: dict[str, Tensor], config: dict, x: Tensor, txt: Tensor, ids: Tensor, vec: dict) -> Tensor:
    """The forward of the class, from its definition: attention over text then image, pairs (2i, 2i + 1) rotated."""
    heads = config["num_attention_heads"]

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(value: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], eps=1e-6)

    def qkv(names: tuple[str, str, str], norms: tuple[str, str], value: Tensor) -> list[Tensor]:
        q, k, v = (linear(name, value).unflatten(-1, (heads, -1)).transpose(1, 2) for name in names)
        scales = (p[f"{name}.weight"] for name in norms)
        q, k = (F.rms_norm(part, part.shape[-1:], weight, 1e-6) for part, weight in zip((q, k), scales, strict=True))
        return [q, k, v]

    axes = zip(config["axes_dims_rope"], ids.unbind(-1), strict=True)
    angles = [place[..., None] * 10000 ** -(torch.arange(0, dim, 2).double() / dim) for dim, place in axes]
    turn = torch.polar(torch.ones(()), torch.cat(angles, -1).float())[:, None]

    def rotate(value: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(rotate(q), rotate(k), v).transpose(1, 2).flatten(2)

    def time(value: Tensor) -> Tensor:
        angle = 1000 * value[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
        return torch.cat((angle.cos(), angle.sin()), -1)

    def embed(name: str, value: Tensor) -> Tensor:
        layer = f"time_text_embed.{name}_embedder.linear_"
        return linear(f"{layer}2", F.silu(linear(f"{layer}1", value)))

    temb = embed("timestep", time(vec["timesteps"])) + embed("text", vec["y_vec"])
    if config["guidance_embeds"]:
        temb = temb + embed("guidance", time(vec["guidance"]))
    temb = F.silu(temb)[:, None]
    x, txt = linear("x_embedder", x), linear("context_embedder", txt)
    L = txt.shape[1]
    for i in range(config["num_layers"]):
        b = f"transformer_blocks.{i}"
        streams = {}
        for stream, value in (("norm1_context", txt), ("norm1", x)):
            shift, scale, *rest = linear(f"{b}.{stream}.linear", temb).chunk(6, -1)
            streams[stream] = norm(value) * (1 + scale) + shift, rest
        added = [f"{b}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
        own = [f"{b}.attn.{name}" for name in ("to_q", "to_k", "to_v")]
        text = qkv(added, [f"{b}.attn.norm_added_q", f"{b}.attn.norm_added_k"], streams["norm1_context"][0])
        image = qkv(own, [f"{b}.attn.norm_q", f"{b}.attn.norm_k"], streams["norm1"][0])
        joint = attend(*(torch.cat(pair, 2) for pair in zip(text, image, strict=True)))
        results = []
        for value, attention, out, mlp, stream in (
            (x, joint[:, L:], "to_out.0", "ff", "norm1"),
            (txt, joint[:, :L], "to_add_out", "ff_context", "norm1_context"),
        ):
            gate, shift_mlp, scale_mlp, gate_mlp = streams[stream][1]
            value = value + gate * linear(f"{b}.attn.{out}", attention)
            hidden = linear(f"{b}.{mlp}.net.0.proj", norm(value) * (1 + scale_mlp) + shift_mlp)
            results.append(value + gate_mlp * linear(f"{b}.{mlp}.net.2", F.gelu(hidden, approximate="tanh")))
        x, txt = results
    x = torch.cat((txt, x), 1)
    for i in range(config["num_single_layers"]):
        b = f"single_transformer_blocks.{i}"
        shift, scale, gate = linear(f"{b}.norm.linear", temb).chunk(3, -1)
        normed = norm(x) * (1 + scale) + shift
        own = [f"{b}.attn.{name}" for name in ("to_q", "to_k", "to_v")]
        attention = attend(*qkv(own, [f"{b}.attn.norm_q", f"{b}.attn.norm_k"], normed))
        hidden = F.gelu(linear(f"{b}.proj_mlp", normed), approximate="tanh")
        x = x + gate * linear(f"{b}.proj_out", torch.cat((attention, hidden), -1))
    scale, shift = linear("norm_out.linear", temb).chunk(2, -1)
    return linear("proj_out", norm(x[:, L:]) * (1 + scale) + shift)


@pytest.mark.parametrize("config", [FLUX, CONDITIONED], ids=["flux", "conditioned"])
def test_the_class_computes_our_velocity_from_the_translated_weights(config):
    model = random_model(config)
    torch.manual_seed(1)
    img, txt = torch.randn(2, 12, config.in_channels), torch.randn(2, 3, config.context_in_dim)
    img_ids, txt_ids = position_ids_THW(3, 2, 2).expand(2, -1, -1), torch.zeros(2, 3, 3)
    vec = {"timesteps": torch.tensor([0.9, 0.2]), "y_vec": torch.randn(2, config.vec_in_dim)}
    vec |= {"guidance": torch.tensor([4.0, 1.0])} if config.guidance_embed else {}
    cond = torch.randn(2, 12, config.cond_channels) if config.cond_embed else None
    with torch.no_grad():
        ours = model(img, img_ids, txt, txt_ids, cond=cond, **vec)
        x = img if cond is None else torch.cat((img, cond), -1)
        ids = torch.cat((txt_ids, img_ids), 1)
        theirs = flux_transformer(translated(model), diffusers_config(config), x, txt, ids, vec)
    assert (theirs - ours).norm() / ours.norm() < 1e-4  # sinusoids of up to 4000 radians
