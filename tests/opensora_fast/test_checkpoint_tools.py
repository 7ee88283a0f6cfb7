"""`opensora-fast checkpoint inspect|verify|export`, on checkpoints that are written here without the trainer's help."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora_fast import checkpoint_export
from opensora_fast.checkpoint_export import plan_export
from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.cli import main
from opensora_fast.config import MMDIT_PRESETS, MMDiTConfig, VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.diffusers_layout import BIASES, WRITTEN_SUM, diffusers_parts, to_diffusers
from opensora_fast.manifest import FileRecord, Manifest, Piece, TensorRecord, crc32c
from opensora_fast.mmdit import MMDiT
from opensora_fast.parameter_source import open_parameters
from opensora_fast.released import load_released_dc_ae, load_released_mmdit, read_weights
from opensora_fast.safetensors_file import read_header, split
from opensora_fast.train.checkpoint import RunFolder
from opensora_fast.weight_files import BIASES_FILE

TINY = MMDIT_PRESETS["tiny"]
CHUNK = 4096
AUTOENCODER = VideoDCAEConfig(
    latent_channels=4,
    encoder_widths=(32, 32),
    decoder_widths=(32, 32),
    encoder_depths=(1, 1),
    decoder_depths=(1, 1),
    encoder_block_types=("ResBlock", "EViTS5_GLU"),
    decoder_block_types=("ResBlock", "EViTS5_GLU"),
    temporal_downsample=(True, False),
    scaling_factor=0.5,
)


def publish(run: Path, step: int, tensors: dict[str, Tensor], recipe: dict, chunk_bytes: int = CHUNK) -> Path:
    """A checkpoint as two ranks would have saved it: matrices lie in two halves, one in each of their files."""
    folder = run / f"step-{step}"
    folder.mkdir(parents=True)
    contents = {f"rank-{rank}-1.bin": bytearray() for rank in range(2)}
    records = {}
    for name, tensor in tensors.items():
        cut = tensor.shape[0] // 2 if tensor.ndim == 2 else 0
        boxes = [(0, tensor[:cut]), (cut, tensor[cut:])] if cut else [(0, tensor)]
        pieces = []
        for (file, content), (first, box) in zip(contents.items(), boxes, strict=False):
            offsets = (first, *[0] * (box.ndim - 1)) if box.ndim else ()
            pieces.append(Piece(offsets, tuple(box.shape), file, len(content)))
            content += box.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            content += bytes(-len(content) % 64)
        records[name] = TensorRecord(tensor.dtype, tuple(tensor.shape), tuple(pieces) if tensor.numel() else ())
    files = []
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        chunks = [bytes(content[start : start + chunk_bytes]) for start in range(0, len(content), chunk_bytes)]
        files.append(FileRecord(name, len(content), tuple(crc32c(chunk) for chunk in chunks)))
    manifest = Manifest(
        step, chunk_bytes, tuple(files), records, {"ranks": 2}, {"torch": torch.__version__}, recipe, {"step": step}
    )
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    (run / "LATEST").write_text(folder.name)
    return folder


def random_state(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.state_dict().items()}


def training_state(model: torch.nn.Module, *, ema: bool = True) -> dict[str, Tensor]:
    groups = ["model", "first_moment", *(["ema"] if ema else [])]
    state = {
        f"{group}.{name}": tensor
        for seed, group in enumerate(groups)
        for name, tensor in random_state(model, seed).items()
    }
    return state | {"updates.img_in.bias": torch.tensor(3.0), "rng.0.torch": torch.arange(5056).to(torch.uint8)}


def recipe_of(config: MMDiTConfig) -> dict:
    return {"name": "tiny-diffusion", "model": json.loads(json.dumps(asdict(config)))}


@pytest.fixture(scope="module")
def transformer() -> MMDiT:
    return MMDiT(TINY)


@pytest.fixture
def run(tmp_path: Path, transformer: MMDiT) -> Path:
    """A run of two checkpoints, the newer one with a moving average."""
    publish(tmp_path / "run", 4, training_state(transformer, ema=False), recipe_of(TINY))
    publish(tmp_path / "run", 12, training_state(transformer), recipe_of(TINY))
    return tmp_path / "run"


def weights_of(step_folder: Path, group: str, transformer: MMDiT) -> dict[str, Tensor]:
    state = training_state(transformer, ema=step_folder.name == "step-12")
    return {name.partition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"{group}.")}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_inspect_tells_what_a_run_holds(run, capsys):
    assert main(["checkpoint", "inspect", str(run)]) == 0
    said = capsys.readouterr().out
    for words in ("step-4", "step-12", "recipe tiny-diffusion", "ranks 2", f"torch {torch.__version__}"):
        assert words in said
    parameters = sum(p.numel() for p in MMDiT(TINY).parameters())
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("│") and "float32" in line}
    assert rows.keys() == {"model", "ema", "first_moment", "updates"}
    assert f"{parameters:,}" in rows["ema"]
    assert "uint8" in said
    assert "blocks" not in said


def test_inspect_of_one_checkpoint_lists_its_tensors(run, capsys):
    assert main(["checkpoint", "inspect", str(run / "step-4"), "--tensors"]) == 0
    said = capsys.readouterr().out
    assert "step-12" not in said
    assert "model.img_in.weight  float32  [64, 16]  4.00 KiB\n" in said
    assert "updates.img_in.bias  float32  []  4 bytes\n" in said


def test_inspect_shows_a_damaged_manifest_beside_the_good_ones(run, capsys):
    (run / "step-4" / "manifest.json").write_bytes(b"{}")
    assert main(["checkpoint", "inspect", str(run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "damaged: manifest.json" in said
    assert "step 12, recipe" in said


def test_verify_passes_a_good_run_and_reports_what_lies_beside_it(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("every checksum matches") == 2
    assert len(said.splitlines()) == 2
    (run / "step-13.tmp-0123").mkdir()
    (run / "step-3.damaged-4567").mkdir()
    (run / "LATEST").write_text("step-4")
    assert main(["checkpoint", "verify", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{run}/step-13.tmp-0123: unfinished" in said
    assert f"{run}/step-3.damaged-4567: set aside" in said
    assert "LATEST: names 'step-4', and the newest checkpoint is step-12" in said
    (run / "LATEST").unlink()
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert "LATEST: names nothing (No such file or directory)" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(run / "step-4")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["a bit", "its end", "a file", "manifest", "no manifest"])
def test_verify_names_what_is_damaged_and_goes_on(run, capsys, damage):
    file = run / "step-4" / "rank-1-1.bin"
    match damage:
        case "a bit":
            flip(file, 2 * CHUNK + 5)
            said = f"rank-1-1.bin: bytes {2 * CHUNK} to {3 * CHUNK} do not match"
        case "its end":
            os.truncate(file, file.stat().st_size - 1)
            said = "rank-1-1.bin"
        case "a file":
            file.unlink()
            said = "rank-1-1.bin"
        case "manifest":
            flip(run / "step-4" / "manifest.json", 500)
            said = "manifest.json: it does not match its checksum"
        case "no manifest":
            (run / "step-4" / "manifest.json").unlink()
            said = "manifest.json: not readable"
    assert main(["checkpoint", "verify", str(run)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert str(run / "step-4") in lines[0]
    assert said in lines[0]
    assert lines[1].startswith(f"{run}/step-12: 2 files, ")
    assert main(["checkpoint", "verify", str(run / "step-4")]) == 2
    assert main(["checkpoint", "verify", str(run / "step-12")]) == 0


def test_a_run_without_a_finished_checkpoint_does_not_verify(tmp_path, capsys):
    (tmp_path / "run" / "step-1.tmp-ab").mkdir(parents=True)
    (tmp_path / "file").touch()
    for path, said in {"run": "no finished checkpoint", "absent": "no such folder", "file": "no such folder"}.items():
        assert main(["checkpoint", "verify", str(tmp_path / path)]) == 2
        told = capsys.readouterr()
        assert said in told.err
        assert len(told.err.splitlines()) == 1
        assert ("unfinished" in told.out) == (path == "run")


def test_what_the_trainer_saves_verifies_and_is_described(tmp_path, transformer, capsys):
    state = training_state(transformer)
    folder = RunFolder(tmp_path / "run", keep=2, chunk_bytes=CHUNK)
    folder.prepare(state)
    folder.save(3, state, {"loader": {}}, recipe_of(TINY))
    folder.wait()
    folder.close()
    assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 0
    assert main(["checkpoint", "inspect", str(tmp_path / "run")]) == 0
    assert "step 3, recipe tiny-diffusion" in capsys.readouterr().out
    out = tmp_path / "out.safetensors"
    assert main(["checkpoint", "export", str(tmp_path / "run"), "--out", str(out)]) == 0
    model = load_released_mmdit(read_weights(out), json.loads(read_header(out).metadata["config"]))
    assert_same(model.state_dict(), weights_of(Path("step-12"), "ema", transformer))


@pytest.mark.parametrize("rope", ["true", "false"], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("fused", ["true", "false"], ids=["fused", "split"])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
def test_released_weights_come_back_bit_for_bit(run, tmp_path, transformer, monkeypatch, rope, fused, sharded):
    monkeypatch.setattr(checkpoint_export, "READ_BYTES", 20_000)
    out = tmp_path / ("shards" if sharded else "model.safetensors")
    options = ["--fused_qkv", fused, "--use_liger_rope", rope, *(["--shard_gib", "0.0001"] if sharded else [])]
    assert main(["checkpoint", "export", str(run), "--out", str(out), *options]) == 0
    first = sorted(out.glob("*.safetensors"))[0] if sharded else out
    assert not sharded or len(list(out.glob("*.safetensors"))) > 3
    metadata = read_header(first).metadata
    config = json.loads(metadata["config"])
    assert metadata["format"] == "pt"
    assert (metadata["step"], metadata["weights"]) == ("12", "ema")
    assert (config["fused_qkv"], config["use_liger_rope"]) == (fused == "true", rope == "true")
    model = load_released_mmdit(read_weights(out), config)
    assert model.config == TINY
    assert_same(model.state_dict(), weights_of(run / "step-12", "ema", transformer))


def test_the_released_configuration_is_the_default(run, tmp_path, transformer):
    out = tmp_path / "model.safetensors"
    assert main(["checkpoint", "export", str(run / "step-12"), "--out", str(out), "--weights", "model"]) == 0
    assert "double_blocks.0.img_attn.q_proj.weight" in read_header(out).entries
    model = load_released_mmdit(read_weights(out), asdict(TINY) | {"fused_qkv": False, "use_liger_rope": True})
    assert_same(model.state_dict(), weights_of(run / "step-12", "model", transformer))


@pytest.mark.parametrize(
    ("name", "preset", "fused_qkv"),
    [
        ("opensora_mmdit_keys", "open-sora-v2", False),
        ("opensora_mmdit_keys_fused", "open-sora-v2", True),
        ("opensora_mmdit_keys_dcae", "open-sora-v2-dcae", False),
    ],
)
def test_of_the_released_size_only_the_manifest_is_needed_to_plan(tmp_path, name, preset, fused_qkv):
    """Its data files are not even there."""
    with torch.device("meta"):
        shapes = {f"model.{key}": tuple(p.shape) for key, p in MMDiT(MMDIT_PRESETS[preset]).state_dict().items()}
    tensors, end = {}, 0
    for key, shape in shapes.items():
        tensors[key] = TensorRecord(torch.float32, shape, (Piece((0,) * len(shape), shape, "rank-0-1.bin", end),))
        end += tensors[key].bytes
    file = FileRecord("rank-0-1.bin", end, (0,))
    manifest = Manifest(1, 2**40, (file,), tensors, {}, {}, recipe_of(MMDIT_PRESETS[preset]), {})
    (tmp_path / "manifest.json").write_bytes(manifest.to_bytes())
    export = plan_export(open_parameters(tmp_path), fused_qkv=fused_qkv, dtype=torch.bfloat16)
    lines = (Path(__file__).parents[1] / "released_keys" / f"{name}.txt").read_text().splitlines()
    expected = dict(line.split("\t") for line in lines if line and not line.startswith("#"))
    assert {key: str(spec.shape) for key, spec in export.specs.items()} == expected
    assert export.bytes == end // 2
    assert len(split(export.specs, 5 * 2**30)) == 5  # 22.1 GiB


def test_a_run_without_an_average_exports_its_weights(run, tmp_path, transformer):
    out = tmp_path / "new" / "model.safetensors"
    assert main(["checkpoint", "export", str(run / "step-4"), "--out", str(out), "--dtype", "bf16"]) == 0
    model = load_released_mmdit(read_weights(out), json.loads(read_header(out).metadata["config"]))
    expected = {name: tensor.bfloat16() for name, tensor in weights_of(run / "step-4", "model", transformer).items()}
    assert_same(model.state_dict(), expected)


def test_an_autoencoder_comes_back_bit_for_bit(tmp_path):
    autoencoder = VideoDCAE(AUTOENCODER)
    recipe = {"name": "tiny-ae", "autoencoder": {"config": json.loads(json.dumps(asdict(AUTOENCODER)))}}
    publish(tmp_path / "run", 2, training_state(autoencoder, ema=False), recipe)
    assert main(["checkpoint", "export", str(tmp_path / "run"), "--out", str(tmp_path / "ae.safetensors")]) == 0
    config = json.loads(read_header(tmp_path / "ae.safetensors").metadata["config"])
    model = load_released_dc_ae(read_weights(tmp_path / "ae.safetensors"), config)
    assert model.config == AUTOENCODER
    assert_same(model.state_dict(), random_state(autoencoder, 0))


@pytest.mark.parametrize("config", [TINY, replace(TINY, cond_embed=False, guidance_embed=True)], ids=["cond", "flux"])
def test_diffusers_folder_holds_what_its_class_loads(tmp_path, capsys, config):
    model = MMDiT(config)
    publish(tmp_path / "run", 2, training_state(model), recipe_of(config))
    out = tmp_path / "transformer"
    assert main(["checkpoint", "export", str(tmp_path / "run"), "--out", str(out), "--to", "diffusers"]) == 0
    assert ("x_embedder takes 16 channels" in capsys.readouterr().out) == config.cond_embed
    ours = random_state(model, 2)
    expected: dict[str, Tensor] = {}
    for part in diffusers_parts(ours):
        expected |= to_diffusers({name: ours[name] for name in part}, config)
    biases = {}
    if config.cond_embed:
        biases = {name: ours[name] for name in BIASES} | {WRITTEN_SUM: expected["x_embedder.bias"]}
    assert_same(read_weights(out), expected | biases)
    assert json.loads((out / "config.json").read_text())["_class_name"] == "FluxTransformer2DModel"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model-00001-of-00001.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        *([BIASES_FILE] if config.cond_embed else []),
    ]


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(run, tmp_path, capsys):
    autoencoder = {"name": "tiny-ae", "autoencoder": {"config": asdict(AUTOENCODER)}}
    publish(tmp_path / "ae", 2, training_state(VideoDCAE(AUTOENCODER), ema=False), autoencoder)
    publish(tmp_path / "other", 2, {"model.x": torch.zeros(2)}, {"name": "other"})
    steep = replace(TINY, mlp_ratio=2.0)
    publish(tmp_path / "steep", 2, training_state(MMDiT(steep), ema=False), recipe_of(steep))
    publish(tmp_path / "empty", 2, {}, recipe_of(TINY))
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    out = str(tmp_path / "out")
    for arguments, said in [
        ([str(tmp_path / "ae"), "--out", out, "--to", "diffusers"], "AutoencoderDC is of images alone"),
        ([str(tmp_path / "steep"), "--out", out, "--to", "diffusers"], "mlp_ratio=2.0"),
        ([str(tmp_path / "other"), "--out", out], "neither a transformer nor an autoencoder"),
        ([str(tmp_path / "empty"), "--out", out], "lacks"),
        ([str(run / "step-4"), "--out", out, "--weights", "ema"], "keeps no moving average"),
        ([str(run), "--out", str(tmp_path / "taken")], "exists"),
        ([str(run), "--out", str(tmp_path / "file" / "out")], "not written"),
        ([str(run), "--out", f"{out}.safetensors", "--to", "diffusers"], "name a folder"),
        ([str(run), "--out", f"{out}.safetensors", "--shard_gib", "1"], "name a folder"),
        ([str(run), "--out", out, "--shard_gib", "0"], "above 0"),
        ([str(run), "--out", out, "--shard_gib", "nan"], "above 0"),
        ([str(run), "--out", out, "--to", "diffusers", "--fused_qkv", "true"], "no such choice"),
        ([str(tmp_path / "ae"), "--out", out, "--use_liger_rope", "true"], "no such choice"),
        ([str(run), "--out", out, "--to", "onnx"], "invalid choice"),
        ([str(tmp_path / "absent"), "--out", out], "no such file or folder"),
        ([str(run)], "--out"),
    ]:
        before = sorted(tmp_path.iterdir())
        assert main(["checkpoint", "export", *arguments]) == 2, arguments
        told = capsys.readouterr().err
        assert said in told, told
        assert len(told.splitlines()) == 1
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_damaged_tensor_is_found_and_nothing_is_left(run, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(checkpoint_export, "READ_BYTES", 20_000)
    record = CheckpointReader(run / "step-12").manifest.tensors["ema.final_layer.linear.weight"]
    flip(run / "step-12" / record.pieces[1].file, record.pieces[1].start)
    assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / name)]) == 2
    assert "rank-1-1.bin: bytes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_full_disk_is_one_line_and_nothing_is_left(run, tmp_path, capsys, name):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # no file may become larger
    try:
        assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / name)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr().err
    assert f"--out {tmp_path / name}: not written (File too large)" in told
    assert len(told.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


MEASURE = """
import sys
from pathlib import Path
from opensora_fast import checkpoint_export
from opensora_fast.parameter_source import open_parameters
run, out, layout, read_bytes = sys.argv[1:]
checkpoint_export.READ_BYTES = int(read_bytes)
source = open_parameters(Path(run), "model" if (Path(run) / "manifest.json").exists() else None)
export = checkpoint_export.plan_export(source, layout=layout)
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = peak()
export.write(Path(out), shard_bytes=2**24)
print(export.bytes // 1024, peak() - before)
"""


def test_the_model_is_never_in_memory(tmp_path):
    """In processes of their own, where no memory was freed before: from a run to diffusers' layout, and on from there.

    Both translations are of one parameter at a time; these two also read from both kinds of source.
    """
    config = replace(TINY, hidden_size=256, num_heads=8, depth=6, depth_single_blocks=12)
    model = MMDiT(config)
    state = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    folder = publish(tmp_path / "run", 1, state, recipe_of(config), chunk_bytes=2**18)
    there, back = tmp_path / "there", tmp_path / "back"
    for source, out, to in [(folder, there, "diffusers"), (there, back, "released")]:
        command = [sys.executable, "-P", "-c", MEASURE, str(source), str(out), to, str(2**22)]
        measured = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        model_kib, peak_kib = map(int, measured.stdout.split())
        assert model_kib > 90 * 1024
        assert peak_kib < 32 * 1024
