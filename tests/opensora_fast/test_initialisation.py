"""A model that begins with other weights: every format, what is kept, turned, drawn anew and left out; and the report.

What the released files hold is written by tests/released_checkpoints.py; the order that ours must have is worked out
here from the released description, row by row.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_fast.checkpoint_export import plan_export
from opensora_fast.config import MMDiTConfig, config_from_dict
from opensora_fast.errors import UserError
from opensora_fast.initialisation import InitialisationReport, initialise_mmdit
from opensora_fast.mmdit import MMDiT
from opensora_fast.parameter_source import open_parameters, read_parameters
from opensora_fast.positions import position_ids_THW
from opensora_fast.released import load_released_mmdit, to_released_state_dict
from opensora_fast.weight_files import WeightFiles

FORM = ("fused_qkv", "use_liger_rope")
NEW_AND_IGNORED = (
    {"cond_in.weight", "cond_in.bias"},
    {f"guidance_in.{i}_layer.{leaf}" for i in ("in", "out") for leaf in ("weight", "bias")},
)


@pytest.fixture(scope="module")
def config(released_checkpoints):
    """config(format): the architecture of a tiny released checkpoint."""

    def of(format: str) -> MMDiTConfig:
        fields = released_checkpoints.mmdit_config(format)
        return config_from_dict(MMDiTConfig, {key: value for key, value in fields.items() if key not in FORM})

    return of


@pytest.fixture(scope="module")
def weights(released_checkpoints, tmp_path_factory):
    """weights(format): the file or folder of a tiny released checkpoint, written once."""
    folder, written = tmp_path_factory.mktemp("weights"), {}

    def of(format: str) -> Path:
        if format not in written:
            place = folder / format
            if format == "diffusers":
                written[format] = released_checkpoints.write_diffusers_flux(place)
            else:
                written[format] = released_checkpoints.write(format, place.with_suffix(".safetensors"))
        return written[format]

    return of


def undefined(config: MMDiTConfig) -> MMDiT:
    """A model as training makes it before its weights are there; what is not filled stays NaN."""
    with torch.device("meta"):
        model = MMDiT(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    return model


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of rotated heads, interleaved, in our order: in every head [0, 2, 4, ..., 1, 3, 5, ...]."""
    order = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    return torch.stack([rows[head + channel] for head in range(0, len(rows), head_dim) for channel in order])


def names(report: InitialisationReport) -> dict[str, set[str]]:
    return {outcome: set(report.names(outcome)) for outcome in ("loaded", "converted", "new", "ignored")}


@pytest.mark.parametrize("format", ["flux-dev", "flux-dev-fused-rope", "diffusers"])
def test_flux_becomes_a_video_model(weights, config, format):
    model = undefined(config("open-sora-v2"))
    report = initialise_mmdit(model, weights(format))
    found = names(report)
    assert (found["new"], found["ignored"]) == NEW_AND_IGNORED
    assert found["loaded"] | found["converted"] | found["new"] == {name for name, _ in model.named_parameters()}
    turned = {name for name in model.state_dict() if "qk" in name}
    assert found["converted"] == turned | (
        {"final_layer.modulation.weight", "final_layer.modulation.bias"} if format == "diffusers" else set()
    )
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32  # masters
        assert parameter.requires_grad
        assert parameter.isfinite().all()
    assert not model.cond_in.weight.any()
    assert not model.cond_in.bias.any()


def test_flux_rows_and_scales_are_turned_together(weights, config):
    stored = {key: tensor.float() for key, tensor in load_file(weights("flux-dev")).items()}
    model = undefined(config("open-sora-v2"))
    initialise_mmdit(model, weights("flux-dev"))
    K, D = model.config.head_dim, model.config.hidden_size
    ours = model.state_dict()
    for block, (our_matrix, their_matrix, our_scale, their_norm) in {
        "double_blocks.1": ("img.qkv", "img_attn.qkv", "img.qk_scale", "img_attn.norm"),
        "double_blocks.0": ("txt.qkv", "txt_attn.qkv", "txt.qk_scale", "txt_attn.norm"),
        "single_blocks.2": ("qkv_mlp", "linear1", "qk_scale", "norm"),
    }.items():
        for leaf in ("weight", "bias"):
            q, k, rest = stored[f"{block}.{their_matrix}.{leaf}"].tensor_split([D, 2 * D])
            expected = torch.cat((half_split(q, K), half_split(k, K), rest))
            assert torch.equal(ours[f"{block}.{our_matrix}.{leaf}"], expected)
        scales = [half_split(stored[f"{block}.{their_norm}.{kind}_norm.scale"], K) for kind in ("query", "key")]
        assert torch.equal(ours[f"{block}.{our_scale}"], torch.stack(scales))
    for ours_is, theirs_is in {
        "img_in": "img_in",
        "double_blocks.0.txt.mlp_in": "double_blocks.0.txt_mlp.0",
        "final_layer.modulation": "final_layer.adaLN_modulation.1",
    }.items():
        assert torch.equal(ours[f"{ours_is}.weight"], stored[f"{theirs_is}.weight"])


def test_the_three_files_of_flux_give_one_model(weights, config, tmp_path):
    """Each is the same model in another layout, when it holds the same values."""
    pytest.importorskip("diffusers")
    from diffusers import FluxTransformer2DModel

    flux = config("flux-dev")
    model = undefined(flux)
    initialise_mmdit(model, weights("diffusers"), new_layers="none")
    theirs = FluxTransformer2DModel.from_pretrained(weights("diffusers") / "transformer", torch_dtype=torch.float32)
    torch.manual_seed(0)
    img, txt, vec = (
        torch.randn(2, 12, flux.in_channels),
        torch.randn(2, 3, flux.context_in_dim),
        torch.randn(2, flux.vec_in_dim),
    )
    ids, time, guidance = position_ids_THW(3, 2, 2), torch.tensor([0.75, 0.25]), torch.tensor([4.0, 2.0])
    with torch.no_grad():
        ours = model(img, ids.expand(2, -1, -1), txt, torch.zeros(2, 3, 3), time, vec, guidance=guidance)
        reference = theirs(img, txt, vec, time, ids, torch.zeros(3, 3), guidance=guidance).sample
    assert (ours - reference).norm() / reference.norm() < 1e-4  # sinusoids of up to 4000 radians


def test_the_weights_of_a_whole_model_fit_exactly(weights, config):
    for format in ("open-sora-v2", "open-sora-v2-dcae"):
        model = undefined(config(format))
        report = initialise_mmdit(model, WeightFiles.open(weights(format)), new_layers="none")
        found = names(report)
        assert not found["new"]
        assert not found["ignored"]
        stored = {key: tensor.float() for key, tensor in load_file(weights(format)).items()}
        expected = load_released_mmdit(stored, {**vars(config(format)), "fused_qkv": False, "use_liger_rope": True})
        assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


IN_AND_OUT = {f"{layer}.{leaf}" for layer in ("img_in", "cond_in", "final_layer.linear") for leaf in ("weight", "bias")}


def test_another_autoencoder_keeps_all_but_input_and_output(weights, config):
    source = read_parameters(open_parameters(weights("open-sora-v2")), open_parameters(weights("open-sora-v2")).specs)
    model = undefined(config("open-sora-v2-dcae"))
    torch.manual_seed(7)
    report = initialise_mmdit(model, weights("open-sora-v2"))
    found = names(report)
    assert found["new"] == found["ignored"] == IN_AND_OUT
    for name, tensor in model.state_dict().items():
        if name not in IN_AND_OUT:
            assert torch.equal(tensor, source[name].float())
    torch.manual_seed(7)
    drawn = torch.nn.init.xavier_uniform_(torch.empty_like(model.img_in.weight))
    assert torch.equal(model.img_in.weight, drawn)
    for name in IN_AND_OUT - {"img_in.weight"}:
        assert not model.state_dict()[name].any()
    assert report.origins["img_in.weight"].note == "drawn: the weights are for in_channels=64, patch_size=2"
    assert report.origins["cond_in.weight"].note.startswith("zero: ")


def test_layers_start_anew_when_asked_for(weights, config):
    """An autoencoder of the same sizes is another one, which no shape can tell."""
    model = undefined(config("open-sora-v2"))
    report = initialise_mmdit(model, weights("open-sora-v2"), new_layers="always")
    assert names(report)["new"] == IN_AND_OUT
    assert report.origins["img_in.bias"].note == "zero: as asked for"


def test_other_patches_than_the_assumed_ones_start_anew(weights, config):
    """FLUX's file does not say that its tokens are patches of 2 x 2; a model of as many channels may have others."""
    model = undefined(replace(config("open-sora-v2"), patch_size=1))
    report = initialise_mmdit(model, weights("flux-dev"))
    assert {"img_in.weight", "img_in.bias", "final_layer.linear.weight"} <= set(report.names("new"))
    assert "the weights are for patch_size=2" in report.origins["img_in.weight"].note
    assert "patch_size=2" in report.assumed


def test_nothing_is_read_into_a_model_that_does_not_fit(weights, config, released_checkpoints, tmp_path):
    wide = replace(config("open-sora-v2"), hidden_size=128, num_heads=4)
    deep = replace(config("open-sora-v2"), depth=3)
    for model_config, source, new_layers, said in [
        (wide, "open-sora-v2", "auto", "hidden_size is 64 there and 128 in the model, num_heads is 2"),
        (deep, "flux-dev", "auto", "depth is 2 there and 3 in the model"),
        (replace(config("open-sora-v2"), mlp_ratio=2.0), "open-sora-v2", "always", "mlp_ratio is 4.0 there and 2.0"),
        (config("open-sora-v2"), "flux-dev", "none", "cond_embed is False there and True in the model"),
        (config("open-sora-v2-dcae"), "open-sora-v2", "none", "in_channels is 64 there and 8.*new_layers=auto"),
        (config("open-sora-v2"), "hunyuan-vae", "auto", "are no transformer's"),
        (
            replace(config("open-sora-v2"), theta=256),
            "flux-dev",
            "auto",
            "theta is 10000 there and 256 .*flux-dev.json",
        ),
        (
            replace(config("open-sora-v2"), axes_dim=(8, 12, 12)),
            "flux-dev",
            "auto",
            "axes_dim is .*assumed, as released",
        ),
        (config("open-sora-v2"), "flux-ae", "auto", "are no transformer's"),
    ]:
        model = undefined(model_config)
        with pytest.raises(UserError, match=said) as failure:
            initialise_mmdit(model, weights(source), new_layers=new_layers)
        assert len(str(failure.value).splitlines()) == 1
        assert str(weights(source)) in str(failure.value)
        assert all(parameter.isnan().all() for parameter in model.parameters())
    with pytest.raises(UserError, match="no such file or folder"):
        initialise_mmdit(undefined(config("open-sora-v2")), tmp_path / "nowhere")


@pytest.mark.parametrize("wrong", ["missing", "unexpected", "misshapen"])
@pytest.mark.parametrize("format", ["flux-dev", "open-sora-v2"])
def test_a_file_that_is_no_whole_model_is_refused_by_name(weights, config, tmp_path, format, wrong):
    tensors = load_file(weights(format))
    key = "double_blocks.1.txt_mlp.2.weight"
    if wrong == "missing":
        del tensors[key]
    elif wrong == "unexpected":
        key = "double_blocks.1.extra.weight"
        tensors[key] = torch.zeros(2)
    else:
        tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=f"wrong.safetensors.*1 {wrong}: {key}"):
        initialise_mmdit(undefined(config("open-sora-v2")), tmp_path / "wrong.safetensors")


def test_the_report_is_printed_and_kept(weights, config, tmp_path, capsys):
    report = initialise_mmdit(undefined(config("open-sora-v2")), weights("flux-dev"))
    report.print()
    Console(width=1000).print(report.table())
    said = " ".join(capsys.readouterr().out.split())
    elements = sum(parameter.numel() for parameter in undefined(config("open-sora-v2")).parameters())
    new = sum(report.origins[name].elements for name in report.names("new"))
    assert f"2 new ({new:,} elements), 4 ignored" in said
    assert sum(origin.elements for origin in report.origins.values()) == elements
    for words in ("loaded", "converted", "interleaved", "bfloat16 to float32", "guidance_in.in_layer, guidance_in.out"):
        assert words in said
    report.save(tmp_path)
    kept = json.loads((tmp_path / "initialisation.json").read_text())
    for outcome in ("loaded", "converted", "new", "ignored"):
        assert list(kept[outcome]) == report.names(outcome)
    turned = kept["converted"]["single_blocks.0.qkv_mlp.weight"]
    assert turned["stored"] == ["single_blocks.0.linear1.weight"]
    assert turned["note"] == "head channels from interleaved to half-split pairs"
    assert kept["ignored"]["guidance_in.in_layer.bias"]["note"] == "the model has no such layer"
    assert kept["source"].startswith(str(weights("flux-dev")))
    with pytest.raises(UserError, match="initialisation.json: not written"):
        report.save(tmp_path / "nowhere")


MEASURE = """
import json, sys
from pathlib import Path
import torch
from opensora_fast import streamed_loading
from opensora_fast.config import MMDiTConfig
from opensora_fast.initialisation import initialise_mmdit
from opensora_fast.mmdit import MMDiT
streamed_loading.BLOCK_BYTES = 2**21
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
for path, fields in zip(sys.argv[1::2], map(json.loads, sys.argv[2::2])):
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(**fields))
    model.to_empty(device="cpu")
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = peak()
    initialise_mmdit(model, Path(path))
    print(sum(p.nbytes for p in model.parameters()) // 1024, peak() - before)
"""


def test_the_file_is_never_whole_in_memory(config, tmp_path):
    """In a process of its own, after a small file: what it takes beside the model is less than a third of the file."""
    command = [sys.executable, "-P", "-c", MEASURE]
    for name, sizes in {
        "small": {},
        "large": {"hidden_size": 256, "num_heads": 8, "depth": 6, "depth_single_blocks": 12},
    }.items():
        fields = vars(config("open-sora-v2")) | sizes
        with torch.device("meta"):
            model = MMDiT(MMDiTConfig(**fields))
        flux = to_released_state_dict(model, {"fused_qkv": True, "use_liger_rope": False})
        stored = {key: torch.zeros(tensor.shape, dtype=torch.bfloat16) for key, tensor in flux.items()}
        save_file(stored, tmp_path / f"{name}.safetensors")
        command += [str(tmp_path / f"{name}.safetensors"), json.dumps(fields)]
    measured = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    model_kib, peak_kib = map(int, measured.stdout.splitlines()[1].split())
    file_kib = (tmp_path / "large.safetensors").stat().st_size // 1024
    assert file_kib > 45 * 1024
    assert peak_kib - model_kib < file_kib // 3


def test_a_condition_that_was_exported_to_diffusers_comes_back(weights, config, tmp_path):
    """With its side file bit for bit; without it as the same function of its input."""
    whole = undefined(config("open-sora-v2"))
    initialise_mmdit(whole, weights("open-sora-v2"))
    plan_export(open_parameters(weights("open-sora-v2")), layout="diffusers").write(tmp_path / "d", shard_bytes=2**30)
    model = undefined(config("open-sora-v2"))
    report = initialise_mmdit(model, tmp_path / "d", new_layers="none")
    assert report.origins["cond_in.weight"].note == "columns 64 to 132"
    assert report.origins["cond_in.bias"].outcome == "loaded"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    (tmp_path / "d" / "opensora_fast_biases.safetensors").unlink()
    report = initialise_mmdit(model, tmp_path / "d", new_layers="none")
    assert report.origins["cond_in.bias"].note == "zeros, its share being in img_in.bias"
    assert not model.cond_in.bias.any()
    total = (whole.img_in.bias.bfloat16() + whole.cond_in.bias.bfloat16()).float()
    assert torch.equal(model.img_in.bias, total)
