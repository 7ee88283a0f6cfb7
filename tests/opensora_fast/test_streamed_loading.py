"""Weights from files into models: bitwise what loading them whole gives, a block at a time, each rank its part."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from opensora_fast import streamed_loading
from opensora_fast.config import MMDIT_PRESETS, HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.diffusers_layout import diffusers_config, diffusers_parts, to_diffusers
from opensora_fast.errors import UserError
from opensora_fast.hunyuan_vae import HunyuanVAE
from opensora_fast.mmdit import MMDiT
from opensora_fast.released import (
    load_dc_ae_from,
    load_hunyuan_vae_from,
    load_mmdit_from,
    load_released_hunyuan_vae,
    load_released_mmdit,
    to_released_state_dict,
)
from opensora_fast.safetensors_file import TensorSpec, write_shards
from opensora_fast.streamed_loading import Segment, Target, load_segments
from opensora_fast.weight_files import WeightFiles

TINY = MMDIT_PRESETS["tiny"]
LAYOUTS = [
    {"fused_qkv": fused, "use_liger_rope": half_split} for fused in (True, False) for half_split in (True, False)
]
DC_AE = VideoDCAEConfig(
    latent_channels=4,
    encoder_widths=(32, 32),
    decoder_widths=(32, 32),
    encoder_depths=(1, 1),
    decoder_depths=(1, 1),
    encoder_block_types=("ResBlock", "EViTS5_GLU"),
    decoder_block_types=("ResBlock", "EViTS5_GLU"),
    temporal_downsample=(True, False),
)


def weights(config: MMDiTConfig, layout: dict[str, bool], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    with torch.device("meta"):
        expected = to_released_state_dict(MMDiT(config), layout)
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(tensor.shape, generator=generator).to(dtype) for key, tensor in expected.items()}


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        here = found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
        assert torch.equal(here, tensor.to(here.dtype)), name


@settings(max_examples=10)
@given(
    layout=st.sampled_from(LAYOUTS),
    block_bytes=st.sampled_from([1, 500, 4096, 2**25]),
    stored=st.sampled_from([torch.bfloat16, torch.float32]),
    dtype=st.sampled_from([None, torch.bfloat16, torch.float32]),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("qkv_bias", "guidance_embed", "cond_embed")}),
)
def test_any_layout_in_blocks_of_any_size_is_what_loading_it_whole_gives(
    tmp_path_factory, layout, block_bytes, stored, dtype, options
):
    config = MMDiTConfig(**asdict(TINY) | options)
    tensors = weights(config, layout, stored)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(tensors, path)
    expected = load_released_mmdit(tensors, asdict(config) | layout)
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_loading, "BLOCK_BYTES", block_bytes)
        model = load_mmdit_from(
            WeightFiles.open(path), dtype=dtype, released_config=asdict(config) | layout, on_bytes=read.append
        )
    assert_same(model, expected)
    assert sum(read) == sum(tensor.nbytes for tensor in tensors.values())
    assert not model.training
    for parameter in model.parameters():
        assert (parameter.dtype, parameter.requires_grad) == (dtype or stored, False)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[2]], ids=["flux", "open-sora"])
@pytest.mark.parametrize("form", ["file", "shards", "pt"])
def test_a_released_file_needs_no_configuration(tmp_path, layout, form):
    tensors = weights(TINY, layout)
    path = tmp_path / f"model.{form}"
    if form == "pt":
        torch.save(tensors, path)
    elif form == "file":
        save_file(tensors, path := path.with_suffix(".safetensors"))
    else:
        path.mkdir()
        specs = {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        write_shards(path, "model", specs, iter(tensors.items()), {}, 100_000)
        assert len(list(path.glob("*.safetensors"))) > 2
    model = load_mmdit_from(WeightFiles.open(path))
    assert model.config == TINY
    assert_same(model, load_released_mmdit(tensors, asdict(TINY) | layout))
    exported = to_released_state_dict(model, layout)
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("cond_embed", [True, False])
def test_diffusers_layout_is_streamed_too(tmp_path, cond_embed):
    config = MMDiTConfig(**asdict(TINY) | {"cond_embed": cond_embed})
    expected = load_released_mmdit(weights(config, LAYOUTS[0]), asdict(config) | LAYOUTS[0])
    ours = {name: tensor.detach() for name, tensor in expected.state_dict().items()}
    if cond_embed:
        ours["cond_in.bias"].zero_()  # without the side file img_in has the whole bias
    theirs: dict[str, Tensor] = {}
    for part in diffusers_parts(ours):
        theirs |= to_diffusers({name: ours[name] for name in part}, config)
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file({key: t.contiguous() for key, t in theirs.items()}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(diffusers_config(config)))
    model = load_mmdit_from(WeightFiles.open(folder))
    assert model.config == config
    assert_same(model, expected)


def test_a_model_that_is_there_is_filled_where_it_is(tmp_path):
    tensors = weights(TINY, LAYOUTS[2])
    save_file(tensors, tmp_path / "model.safetensors")
    model = MMDiT(TINY)
    before = {name: (tensor.data_ptr(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    filled = load_mmdit_from(WeightFiles.open(tmp_path / "model.safetensors"), device="meta", into=model)
    assert filled is model
    assert model.training
    assert {name: (tensor.data_ptr(), tensor.requires_grad) for name, tensor in model.named_parameters()} == before
    assert_same(model, load_released_mmdit(tensors, asdict(TINY) | LAYOUTS[2]))
    other = MMDiT(MMDiTConfig(**asdict(TINY) | {"depth": 2}))
    with pytest.raises(UserError, match=r"model.safetensors do not fit their configuration \(\d+ missing: double_blo"):
        load_mmdit_from(WeightFiles.open(tmp_path / "model.safetensors"), into=other)


def test_parameters_may_lie_on_several_devices(tmp_path):
    """As those of a model of which a part is streamed to the device; the meta device stands for it."""
    tensors = weights(TINY, LAYOUTS[2])
    save_file(tensors, tmp_path / "model.safetensors")
    model = MMDiT(TINY)
    model.double_blocks.to("meta")
    load_mmdit_from(WeightFiles.open(tmp_path / "model.safetensors"), into=model)
    expected = load_released_mmdit(tensors, asdict(TINY) | LAYOUTS[2]).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta == name.startswith("double_blocks")
        assert tensor.is_meta or torch.equal(tensor, expected[name].float()), name


def test_autoencoders_are_streamed_and_written_back_bitwise(tmp_path):
    model = VideoDCAE(DC_AE)
    released = model.state_dict()
    save_file(released, tmp_path / "ae.safetensors", metadata={"config": json.dumps(asdict(DC_AE))})
    files = WeightFiles.open(tmp_path / "ae.safetensors")
    loaded = load_dc_ae_from(files)
    assert loaded.config == DC_AE
    assert_same(loaded, model)
    assert_same(load_dc_ae_from(files, into=VideoDCAE(DC_AE)), model)
    exported = to_released_state_dict(loaded, {})
    assert list(exported) == list(released)
    assert all(torch.equal(exported[key], released[key]) for key in released)
    for load in (load_hunyuan_vae_from, load_mmdit_from):
        with pytest.raises(UserError, match=r"weights .*ae.safetensors: they are of a Video DC-AE, not of a "):
            load(files)
    wrong = {key: value for key, value in released.items() if key != "encoder.project_in.conv.bias"}
    save_file(wrong, tmp_path / "wrong.safetensors", metadata={"config": json.dumps(asdict(DC_AE))})
    with pytest.raises(UserError, match=r"wrong.safetensors do not .* \(1 missing: encoder.project_in.conv.bias\)"):
        load_dc_ae_from(WeightFiles.open(tmp_path / "wrong.safetensors"))


def test_the_hunyuan_vae_is_streamed_and_written_back_bitwise(tmp_path):
    config = HunyuanVAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, use_spatial_tiling=True)
    with torch.device("meta"):
        model = HunyuanVAE(config).bfloat16()
    model = model.to_empty(device="cpu")
    for index, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index)))
    released = model.state_dict()
    save_file(released, tmp_path / "vae.safetensors")
    files = WeightFiles.open(tmp_path / "vae.safetensors")
    loaded = load_hunyuan_vae_from(files, dtype=torch.float32)
    assert loaded.config == config
    assert_same(loaded, model)
    exported = to_released_state_dict(load_hunyuan_vae_from(files), {})
    assert list(exported) == list(released)
    assert all(torch.equal(exported[key], released[key]) for key in released)
    whole = load_released_hunyuan_vae(released, asdict(config) | {"type": "hunyuan_vae"})
    assert whole.config == config
    assert to_released_state_dict(whole, {})["decoder.conv_in.conv.bias"] is not None
    assert_same(whole, model)
    with pytest.raises(UserError, match="they are of a Hunyuan VAE, not of a Video DC-AE"):
        load_dc_ae_from(files)
    del released["quant_conv.bias"]
    with pytest.raises(UserError, match="1 missing: quant_conv.bias"):
        load_released_hunyuan_vae(released, asdict(config))


def test_segments_take_columns_rows_and_zeros(tmp_path):
    stored = torch.arange(60.0).view(6, 10)
    save_file({"a": stored, "b": stored + 100}, tmp_path / "file.safetensors")
    parameter = torch.full((9, 4), -1.0)
    segments = [Segment("a", 4, 2, columns=(3, 7)), Segment(None, 0, 3), Segment("b", 2, columns=(6, 10))]
    load_segments(WeightFiles.open(tmp_path / "file.safetensors"), [Target(parameter, segments)])
    assert torch.equal(parameter, torch.cat((stored[4:, 3:7], torch.zeros(3, 4), stored[2:, 6:] + 100)))


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(weights(TINY, LAYOUTS[2]), path)
    files = WeightFiles.open(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        load_mmdit_from(files)


# Several ranks


def load_sharded(path: str, released_config: dict, replicas: int) -> tuple[int, int, int]:
    """On every rank: bytes that were read, that are here, and of the whole model. The weights are compared."""
    size = torch.distributed.get_world_size()
    names = ("replica", "shard")
    mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=names) if replicas > 1 else None
    config = MMDiTConfig(**{key: released_config[key] for key in asdict(TINY)})
    with torch.device("meta"):
        model = MMDiT(config)
    for block in (*model.double_blocks, *model.single_blocks):
        fully_shard(block, mesh=mesh or init_device_mesh("cpu", (size,)))
    fully_shard(model, mesh=mesh or init_device_mesh("cpu", (size,)))
    model.to_empty(device="cpu")
    read: list[int] = []
    files = WeightFiles.open(path)
    load_mmdit_from(files, released_config=released_config, into=model, on_bytes=read.append)
    local = sum(parameter.to_local().numel() for parameter in model.parameters())  # type: ignore[attr-defined]
    assert_same(model, load_mmdit_from(files, released_config=released_config))
    return sum(read), 2 * local, sum(spec.bytes for spec in files.specs.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(f"{value}" for value in layout.values()))
@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (3, 1), (4, 2)])
def test_each_rank_reads_its_part(ranks, tmp_path, layout, size, replicas):
    """With three ranks shards cut heads: where these are reordered, their other rows are read, too."""
    path = tmp_path / "model.safetensors"
    save_file(weights(TINY, layout), path)
    results = ranks(size).run(
        "opensora_fast/test_streamed_loading.py:load_sharded", str(path), asdict(TINY) | layout, replicas
    )
    for read, local, _ in results:
        if size == 3 and not layout["use_liger_rope"]:
            assert local <= read < 1.2 * local + 5_000
        else:
            assert read == local
    total = results[0][2]
    assert sum(local for _, local, _ in results) == total * replicas
    assert max(read for read, _, _ in results) < 0.7 * total


def load_columns(path: str) -> None:
    """On every rank: parameters that are sharded along their second axis, or not at all."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    files = WeightFiles.open(path)
    stored = files.read("a")
    for placement in (Shard(1), Replicate()):
        parameter = distribute_tensor(torch.zeros(7, 4), mesh, [placement])
        load_segments(files, [Target(parameter, [Segment("a", 1, columns=(2, 6))])])
        assert torch.equal(parameter.full_tensor(), stored[1:, 2:6])


def test_shards_of_another_axis_are_filled_too(ranks, tmp_path):
    save_file({"a": torch.randn(8, 9)}, tmp_path / "file.safetensors")
    ranks(3).run("opensora_fast/test_streamed_loading.py:load_columns", str(tmp_path / "file.safetensors"))


# Host memory


def synthetic_checkpoint(folder: Path, config: MMDiTConfig, shard_bytes: int) -> int:
    """A sharded checkpoint in the released layout, never in memory as a whole; the bytes of its largest shard."""
    with torch.device("meta"):
        expected = to_released_state_dict(MMDiT(config), LAYOUTS[2])
    specs = {key: TensorSpec(torch.bfloat16, tuple(tensor.shape)) for key, tensor in expected.items()}
    tensors = ((key, torch.full(spec.shape, 0.01, dtype=torch.bfloat16)) for key, spec in specs.items())
    folder.mkdir()
    write_shards(folder, "model", specs, tensors, {}, shard_bytes)
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def check_host_memory(folder: Path, largest_shard: int, block_bytes: int, cases: list[str]) -> None:
    """On top of the model, where this is on the host: at most 1.15 times the largest shard, which would be one that is
    read whole; and at most two slots, with what allocators and the buffers of reading take."""
    script = Path(__file__).with_name("streamed_memory.py")
    command = [sys.executable, "-P", str(script), str(folder), str(block_bytes), *cases]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for case, used in zip(cases, json.loads(done.stdout), strict=True):
        beyond = used["grown"] - used["model"]
        assert beyond <= 1.15 * largest_shard, (case, used)
        assert beyond <= 2 * block_bytes + 48 * 2**20, (case, used)


def test_loading_has_no_second_copy_in_host_memory(tmp_path):
    config = MMDiTConfig(hidden_size=768, num_heads=6, depth=2, depth_single_blocks=3)
    largest = synthetic_checkpoint(tmp_path / "weights", config, 70 * 2**20)
    assert largest > 60 * 2**20
    check_host_memory(tmp_path / "weights", largest, 2**22, ["meta:bfloat16", "cpu:float32"])


@pytest.mark.slow
def test_loading_2_gb_has_no_second_copy_in_host_memory(tmp_path):
    config = MMDiTConfig(hidden_size=1536, num_heads=12, depth=6, depth_single_blocks=14)
    largest = synthetic_checkpoint(tmp_path / "weights", config, 500_000_000)
    assert sum(path.stat().st_size for path in (tmp_path / "weights").glob("*.safetensors")) > 2e9
    cases = ["meta:bfloat16", "cpu:bfloat16", "cpu:float32"]
    check_host_memory(tmp_path / "weights", largest, streamed_loading.BLOCK_BYTES, cases)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pinned slots and a copying stream")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(f"{value}" for value in layout.values()))
def test_a_cuda_device_gets_the_same_weights(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(streamed_loading, "BLOCK_BYTES", 4096)  # so that slots are used again
    tensors = weights(TINY, layout)
    save_file(tensors, tmp_path / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float32):
        model = load_mmdit_from(
            WeightFiles.open(tmp_path / "model.safetensors"),
            device="cuda",
            dtype=dtype,
            released_config=asdict(TINY) | layout,
        )
        assert all(parameter.is_cuda for parameter in model.parameters())
        assert_same(model.cpu(), load_released_mmdit(tensors, asdict(TINY) | layout))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pinned slots and a copying stream")
def test_a_model_partly_on_a_cuda_device_is_filled_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_loading, "BLOCK_BYTES", 4096)
    tensors = weights(TINY, LAYOUTS[2])
    save_file(tensors, tmp_path / "model.safetensors")
    model = MMDiT(TINY)
    model.double_blocks.to("cuda")
    load_mmdit_from(WeightFiles.open(tmp_path / "model.safetensors"), into=model)
    assert model.double_blocks[0].img.qkv.weight.is_cuda
    assert not model.img_in.weight.is_cuda
    assert_same(model.cpu(), load_released_mmdit(tensors, asdict(TINY) | LAYOUTS[2]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, which has the weights")
def test_a_cuda_device_is_reached_without_a_copy_in_host_memory(tmp_path):
    config = MMDiTConfig(hidden_size=768, num_heads=6, depth=4, depth_single_blocks=8)
    largest = synthetic_checkpoint(tmp_path / "weights", config, 200 * 2**20)
    check_host_memory(tmp_path / "weights", largest, streamed_loading.BLOCK_BYTES, ["cuda:bfloat16", "cuda:float32"])
