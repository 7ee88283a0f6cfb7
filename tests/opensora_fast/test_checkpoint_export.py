"""`opensora-fast checkpoint export` from one layout to the other and back: every released format, bit for bit.

The files are written by tests/released_checkpoints.py, which uses nothing of the product; what goes to diffusers is
opened by diffusers' own classes.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_fast.checkpoint_export import plan_export
from opensora_fast.cli import main
from opensora_fast.config import MMDIT_PRESETS
from opensora_fast.parameter_source import open_parameters, read_parameters
from opensora_fast.released import load_mmdit_from, read_weights
from opensora_fast.safetensors_file import TensorSpec, header_content, read_header
from opensora_fast.text import load_clip, load_t5
from opensora_fast.weight_files import WeightFiles

# How each is laid out, as options of an export back to it.
FORMS = {
    "open-sora-v2": [],
    "open-sora-v2-dcae": [],
    "flux-dev": ["--fused_qkv", "true", "--use_liger_rope", "false"],
    "flux-dev-fused-rope": [],
}
AUTOENCODERS = {"hunyuan-vae": "diffusers", "video-dc-ae": "released"}


@pytest.fixture(scope="module")
def weights(released_checkpoints, tmp_path_factory):
    """weights(format): the file of a tiny released checkpoint, written once."""
    folder, written = tmp_path_factory.mktemp("weights"), {}

    def of(format: str) -> Path:
        if format not in written:
            written[format] = released_checkpoints.write(format, folder / f"{format}.safetensors")
        return written[format]

    return of


def export(source: Path, to: str, out: Path, *options: str) -> Path:
    assert main(["checkpoint", "export", str(source), "--to", to, "--out", str(out), *options]) == 0
    return out


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        assert torch.equal(found[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), key


@pytest.mark.parametrize("format", FORMS)
def test_a_transformer_goes_to_diffusers_and_back(weights, tmp_path, format):
    source = weights(format)
    folder = export(source, "diffusers", tmp_path / "diffusers", "--shard_gib", "0.0002")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 2
    back = export(folder, "released", tmp_path / "back.safetensors", *FORMS[format])
    assert_same(load_file(back), load_file(source))
    again = export(back, "diffusers", tmp_path / "again")
    assert_same(read_weights(again), read_weights(folder))


@pytest.mark.parametrize("format", FORMS)
@pytest.mark.parametrize("fused", ["true", "false"], ids=["fused", "split"])
@pytest.mark.parametrize("rope", ["true", "false"], ids=["half_split", "interleaved"])
def test_a_transformer_goes_to_every_released_form_and_back(weights, tmp_path, format, fused, rope):
    other = export(weights(format), "released", tmp_path / "shards", "--fused_qkv", fused, "--use_liger_rope", rope)
    back = export(other, "released", tmp_path / "back.safetensors", *FORMS[format])
    assert_same(load_file(back), load_file(weights(format)))


def test_diffusers_own_flux_becomes_the_released_file_and_comes_back(released_folder, tmp_path):
    source = released_folder("diffusers-flux")
    form = FORMS["flux-dev"]
    released = export(source, "released", tmp_path / "flux.safetensors", *form)
    assert "single_blocks.0.linear1.weight" in read_header(released).entries
    back = export(released, "diffusers", tmp_path / "back")
    assert_same(read_weights(back), read_weights(source / "transformer"))


@pytest.mark.parametrize(("format", "to"), AUTOENCODERS.items())
def test_an_autoencoder_keeps_its_names(weights, tmp_path, format, to):
    if format == "hunyuan-vae":
        pytest.importorskip("diffusers")
    expected = load_file(weights(format))
    out = export(weights(format), to, tmp_path / "out")
    assert_same(read_weights(out), expected)
    back = export(out, "released", tmp_path / "back.safetensors")
    assert_same(load_file(back), expected)
    assert open_parameters(back).config == open_parameters(weights(format)).config


@pytest.mark.parametrize("format", ["open-sora-v2", "flux-dev"])
def test_diffusers_opens_the_transformer(weights, tmp_path, capsys, format):
    """Its class takes every tensor, and nothing of the side file; what it saves can be read again."""
    diffusers = pytest.importorskip("diffusers")
    folder = export(weights(format), "diffusers", tmp_path / "out", "--shard_gib", "0.0002")
    assert "FluxTransformer2DModel" in capsys.readouterr().out
    model, told = diffusers.FluxTransformer2DModel.from_pretrained(
        folder, torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(told.values())
    exported = read_weights(folder)
    assert_same(model.state_dict(), {key: exported[key] for key in model.state_dict()})
    model.save_pretrained(tmp_path / "saved")
    ours, expected = (load_mmdit_from(WeightFiles.open(path)) for path in (tmp_path / "saved", folder))
    if format == "open-sora-v2":  # of the two biases that were added only the sum was saved
        total = (expected.img_in.bias + expected.cond_in.bias).detach()
        assert torch.equal(ours.img_in.bias, total)
        assert not ours.cond_in.bias.any()
        expected.img_in.bias.copy_(total)
        expected.cond_in.bias.zero_()
    assert ours.config == expected.config
    assert_same(dict(ours.state_dict()), dict(expected.state_dict()))


def test_diffusers_opens_the_hunyuan_vae(weights, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder = export(weights("hunyuan-vae"), "diffusers", tmp_path / "out", "--dtype", "fp32")
    model, told = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    assert_same(model.state_dict(), {key: tensor.float() for key, tensor in load_file(weights("hunyuan-vae")).items()})
    assert model.config.scaling_factor == 0.476986
    model.save_pretrained(tmp_path / "saved")  # without our metadata: its config.json says the same
    assert open_parameters(tmp_path / "saved").config == open_parameters(weights("hunyuan-vae")).config


def of_released_size(released_checkpoints, format: str, place: Path) -> Path:
    """A file with the names, shapes and length of the released one, and nothing in it."""
    dtype = torch.float32 if format == "flux-ae" else torch.bfloat16
    specs = {key: TensorSpec(dtype, shape) for key, shape in released_checkpoints.released_keys(format).items()}
    header = header_content(specs, {})
    place.write_bytes(header)
    os.truncate(place, len(header) + sum(spec.bytes for spec in specs.values()))
    return place


@pytest.mark.parametrize(
    ("format", "preset"),
    [
        ("open-sora-v2", "open-sora-v2"),
        ("open-sora-v2-dcae", "open-sora-v2-dcae"),
        ("flux-dev", "flux-dev"),
        ("flux-dev-fused-rope", "flux-dev"),
    ],
)
def test_at_released_size_every_tensor_has_its_place(released_checkpoints, tmp_path, format, preset):
    path = of_released_size(released_checkpoints, format, tmp_path / "weights.safetensors")
    source = open_parameters(path)
    assert source.config == MMDIT_PRESETS[preset]
    stored = released_checkpoints.released_keys(format)
    used = {key for name in source.specs for key in source.stored(name)}
    assert used == stored.keys()
    assert sum(math.prod(spec.shape) for spec in source.specs.values()) == sum(map(math.prod, stored.values()))
    form = {"fused_qkv": format == "flux-dev", "use_liger_rope": format != "flux-dev"}
    assert {key: spec.shape for key, spec in plan_export(source, **form).specs.items()} == stored
    theirs = {key: spec.shape for key, spec in plan_export(source, layout="diffusers").specs.items()}
    if preset == "flux-dev":
        diffusers = pytest.importorskip("diffusers")
        with torch.device("meta"):
            flux = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        assert theirs == {key: tuple(tensor.shape) for key, tensor in flux.state_dict().items()}


def test_at_released_size_the_hunyuan_vae_is_that_of_diffusers(released_checkpoints, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    path = of_released_size(released_checkpoints, "hunyuan-vae", tmp_path / "hunyuan_vae.safetensors")
    export = plan_export(open_parameters(path), layout="diffusers")
    with torch.device("meta"):
        model = diffusers.AutoencoderKLHunyuanVideo()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {key: spec.shape for key, spec in export.specs.items()} == shapes
    said = export.translation.class_config
    assert said.pop("_class_name") == type(model).__name__
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in model.config.items() if key in said} == said


def test_an_export_says_what_it_is_of(weights, tmp_path):
    out = export(weights("open-sora-v2-dcae"), "released", tmp_path / "out.safetensors", "--use_liger_rope", "false")
    metadata = read_header(out).metadata
    config = json.loads(metadata["config"])
    assert metadata["source"] == "open-sora-v2-dcae.safetensors"
    assert (config["patch_size"], config["in_channels"], config["use_liger_rope"]) == (1, 8, False)
    source, again = open_parameters(weights("open-sora-v2-dcae")), open_parameters(out)
    assert again.config == source.config
    assert source.assumed.keys() == {"axes_dim", "theta", "use_liger_rope"}
    assert not again.assumed
    assert_same(read_parameters(again, again.specs), read_parameters(source, source.specs))


def test_what_is_no_model_is_refused_in_one_line(weights, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    tensors = load_file(weights("open-sora-v2"))
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(weights("flux-dev").read_bytes()[:-5])
    less = {key: tensor for key, tensor in tensors.items() if key != "single_blocks.1.q_proj.bias"}
    save_file(less, tmp_path / "less.safetensors")
    folder = export(weights("open-sora-v2"), "diffusers", tmp_path / "tampered")
    shard = next(folder.glob("*-00001-of-00001.safetensors"))
    changed = load_file(shard)
    changed["x_embedder.bias"] += 1
    save_file(changed, shard, {"format": "pt"})
    capsys.readouterr()
    out = str(tmp_path / "out")
    for arguments, said in [
        ([weights("flux-dev"), "--weights", "ema"], "is no run and holds one set of weights"),
        ([weights("flux-ae"), "--to", "diffusers"], "has one layout: use --to released"),
        ([weights("video-dc-ae"), "--to", "diffusers"], "AutoencoderDC is of images alone"),
        ([weights("hunyuan-vae"), "--fused_qkv", "true"], "knows no such choice"),
        ([tmp_path / "other.safetensors"], "they begin with x"),
        ([tmp_path / "empty"], "empty holds 0 files"),
        ([torn], "torn.safetensors is damaged"),
        ([tmp_path / "less.safetensors"], "1 missing: single_blocks.1.q_proj.bias"),
        ([folder], "opensora_fast_biases.safetensors: its biases are not those in x_embedder.bias"),
    ]:
        assert main(["checkpoint", "export", *map(str, arguments), "--out", out]) == 2, arguments
        told = capsys.readouterr().err
        assert said in told, told
        assert len(told.splitlines()) == 1
        assert not Path(out).exists()


@pytest.mark.parametrize("format", ["t5", "clip", "flux-ae"])
def test_models_of_one_layout_are_written_as_they_are(format, released_checkpoints, tmp_path):
    """Into a folder that is read as the first one was, and into one file; also whole numbers, of another dtype."""
    source = released_checkpoints.write(format, tmp_path / ("ae.safetensors" if format == "flux-ae" else format))
    stored = released_checkpoints.weights(format)
    copy = export(source, "released", tmp_path / "copy", "--shard_gib", "0.00005")
    assert len(list(copy.glob("*-of-*.safetensors"))) > 1
    assert_same(read_weights(copy), stored)
    assert_same(read_weights(export(copy, "released", tmp_path / "one.safetensors")), stored)
    halved = read_weights(export(source, "released", tmp_path / "halved", "--dtype", "bf16"))
    assert_same(halved, {key: t.bfloat16() if t.is_floating_point() else t for key, t in stored.items()})
    if format == "flux-ae":
        return
    load, most = (load_t5, 24) if format == "t5" else (load_clip, 77)
    weights = "*.safetensors*"
    assert {path.name for path in copy.iterdir() if not path.match(weights)} == {
        path.name for path in source.iterdir() if not path.match(weights)
    }
    read = [load(place, max_length=most, device="cpu", dtype=torch.float32) for place in (source, copy)]
    assert torch.equal(*(encoder(["a rabbit on a meadow"]) for encoder in read))


@pytest.mark.parametrize("format", ["t5", "clip", "flux-ae"])
def test_models_of_one_layout_have_to_be_whole(format, released_checkpoints, tmp_path, capsys):
    source = released_checkpoints.write(format, tmp_path / ("ae.safetensors" if format == "flux-ae" else format))
    file = source if source.is_file() else next(source.glob("*.safetensors"))
    content = load_file(file)
    lost = next(key for key in content if "text_model.encoder" in key or format != "clip")
    del content[lost]
    save_file(content, file, {"format": "pt"})
    assert main(["checkpoint", "export", str(source), "--out", str(tmp_path / "out")]) == 2
    assert lost in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_no_tensor_says_is_said_beside_the_file(weights, released_checkpoints, tmp_path, capsys):
    """A fused file whose heads are half-split looks like FLUX's own; the export tells what it assumes."""
    form = ["--fused_qkv", "true", "--use_liger_rope", "true"]
    mute = tmp_path / "mute.safetensors"
    save_file(load_file(export(weights("open-sora-v2"), "released", tmp_path / "told.safetensors", *form)), mute)
    capsys.readouterr()
    export(mute, "released", tmp_path / "wrong.safetensors")
    assert "nothing says it: axes_dim=(4, 14, 14), theta=10000, use_liger_rope=False" in capsys.readouterr().out
    (tmp_path / "mute.json").write_text('{"use_liger_rope": true, "theta": 10000, "axes_dim": [4, 14, 14]}')
    back = export(mute, "released", tmp_path / "back.safetensors")
    assert "assumed" not in capsys.readouterr().out
    assert_same(load_file(back), load_file(weights("open-sora-v2")))
    assert not torch.equal(
        load_file(tmp_path / "wrong.safetensors")["single_blocks.0.q_proj.weight"],
        load_file(back)["single_blocks.0.q_proj.weight"],
    )


def test_another_dtype_is_that_of_the_side_file_too(weights, tmp_path):
    """Both biases are converted before they are added up: the file beside the weights still belongs to them."""
    source = tmp_path / "fp32.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(t.shape, generator=generator) for key, t in load_file(weights("open-sora-v2")).items()}
    save_file(tensors, source)
    folder = export(source, "diffusers", tmp_path / "bf16", "--dtype", "bf16")
    back = export(folder, "released", tmp_path / "back.safetensors")
    assert_same(load_file(back), {key: tensor.bfloat16() for key, tensor in tensors.items()})


def test_rows_of_several_dtypes_are_named(weights, tmp_path, capsys):
    tensors = load_file(weights("open-sora-v2"))
    tensors["double_blocks.0.img_attn.q_proj.weight"] = tensors["double_blocks.0.img_attn.q_proj.weight"].float()
    save_file(tensors, tmp_path / "mixed.safetensors")
    capsys.readouterr()
    back = export(tmp_path / "mixed.safetensors", "released", tmp_path / "back.safetensors")
    assert "now all of the widest: double_blocks.0.img.qkv.weight\n" in capsys.readouterr().out
    key = "double_blocks.0.img_attn.v_proj.weight"
    assert torch.equal(load_file(back)[key], tensors[key].float())
