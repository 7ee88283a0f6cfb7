"""Every released format: read, run, written back without changing a bit, and refused by name when something is wrong.

The checkpoints are those of tests/released_checkpoints.py, which knows the formats from their key lists alone.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_fast.cli import main
from opensora_fast.errors import UserError
from opensora_fast.flux_autoencoder import FluxAutoencoder
from opensora_fast.mmdit import MMDiT
from opensora_fast.positions import position_ids_THW
from opensora_fast.released import (
    load_dc_ae_from,
    load_hunyuan_vae_from,
    load_mmdit_from,
    load_released_mmdit,
    read_weights,
    to_released_state_dict,
)
from opensora_fast.released_form import kind_of, mmdit_form, vae_form
from opensora_fast.safetensors_file import SafetensorsFiles
from opensora_fast.text import load_clip, load_t5
from opensora_fast.weight_files import WeightFiles

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CPU = torch.device("cpu")
SAFETENSORS_READ = SafetensorsFiles.read
MMDITS = ("open-sora-v2", "open-sora-v2-dcae", "flux-dev", "flux-dev-fused-rope")
AUTOENCODERS = ("hunyuan-vae", "video-dc-ae", "flux-ae")
TEXT = ("t5", "clip")
FILES = MMDITS + AUTOENCODERS
KINDS = {"hunyuan-vae": "hunyuan_vae", "video-dc-ae": "video_dc_ae", "flux-ae": "flux_ae"}


def load(format: str, place: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What the product makes of a file or folder of this format."""
    if format in TEXT:
        reader, length = (load_t5, 24) if format == "t5" else (load_clip, 77)
        return reader(place, max_length=length, device=CPU, dtype=dtype)
    return load_files(format, WeightFiles.open(place), dtype)


def load_files(format: str, files: WeightFiles, dtype: torch.dtype = torch.bfloat16) -> Any:
    if format == "flux-ae":
        return FluxAutoencoder.from_released(files, device=CPU, dtype=dtype)
    loaders: dict[str, Callable[..., Any]] = {"hunyuan-vae": load_hunyuan_vae_from, "video-dc-ae": load_dc_ae_from}
    return loaders.get(format, load_mmdit_from)(files, device=CPU, dtype=dtype)


def run(format: str, model: Any) -> torch.Tensor:
    """Outputs of two different inputs, behind each other."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if format in TEXT:
        return model(["a rabbit on a meadow", "raining, sea"])
    with torch.no_grad():
        if isinstance(model, MMDiT):
            config, dtype = model.config, model.img_in.weight.dtype
            more = {"cond": noise(2, 8, config.cond_channels).to(dtype)} if config.cond_embed else {}
            if config.guidance_embed:
                more["guidance"] = torch.tensor([4.0, 4.0])
            return model(
                img=noise(2, 8, config.in_channels).to(dtype),
                img_ids=position_ids_THW(2, 2, 2).expand(2, -1, -1),
                txt=noise(2, 3, config.context_in_dim).to(dtype),
                txt_ids=torch.zeros(2, 3, 3),
                timesteps=torch.tensor([0.9, 0.2]),
                y_vec=noise(2, config.vec_in_dim).to(dtype),
                **more,
            )
        dtype = next(model.parameters()).dtype
        pixels = {"hunyuan-vae": (5, 16, 24), "video-dc-ae": (8, 64, 64), "flux-ae": (16, 24)}[format]
        latent = model.encode(noise(2, 3, *pixels).to(dtype))
        decoded = model.decode(latent)
        assert decoded.shape == (2, 3, *pixels)
        return decoded


def written_back(format: str, model: Any, released_checkpoints: Any) -> dict[str, torch.Tensor]:
    """A loaded model's tensors under the names of the release."""
    if format in TEXT:
        prefix = "text_model." if format == "clip" else ""
        return {prefix + key.removeprefix(prefix): t for key, t in model.model.named_parameters()}
    if format == "flux-ae":
        return model.released_state_dict()
    form = released_checkpoints.mmdit_config(format) if format in MMDITS else {}
    return to_released_state_dict(model, form)


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        key: f"{t.dtype} {tuple(t.shape)} ".encode()
        + t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for key, t in tensors.items()
    }


@pytest.fixture(scope="module")
def release(released_checkpoints, tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """release(format): a checkpoint of that format, where a release has it; not to be changed."""
    root = tmp_path_factory.mktemp("ckpts")

    def place(format: str) -> Path:
        target = root / released_checkpoints.PLACES[format]
        return target if target.exists() else released_checkpoints.write(format, target)

    return place


# --- the writer itself, against its own sources ---------------------------------------------------------------------


@pytest.mark.parametrize("format", [*FILES, *TEXT])
def test_tiny_checkpoints_have_names_and_ranks_of_the_released_ones(format, released_checkpoints):
    released, tiny = released_checkpoints.released_keys(format), released_checkpoints.shapes(format)
    renumbered = "op_list" if format == "video-dc-ae" else None
    for key, shape in tiny.items():
        assert key in released or renumbered in key, key
        full = released.get(key, shape)
        assert len(shape) == len(full), key
        assert all(small <= large for small, large in zip(shape, full, strict=True)), key
    kinds = {re.sub(r"\d+", "N", key) for key in released}
    assert {re.sub(r"\d+", "N", key) for key in tiny} == kinds
    dtypes = {t.dtype for key, t in released_checkpoints.weights(format).items() if not key.endswith("position_ids")}
    assert dtypes == {torch.float32 if format in ("clip", "flux-ae") else torch.bfloat16}


def test_libraries_take_the_tiny_checkpoints_for_their_own(release, released_checkpoints, released_folder):
    """What diffusers has classes for: nothing missing, nothing left over."""
    import diffusers
    from diffusers.loaders import single_file_utils

    widths = {"block_out_channels": (32, 64, 96, 96), "layers_per_block": 1}
    with torch.device("meta"):
        video = diffusers.AutoencoderKLHunyuanVideo(**widths)
    video.load_state_dict(load_file(release("hunyuan-vae")), assign=True)
    image = diffusers.AutoencoderKL.from_config(
        diffusers.AutoencoderKL.load_config(released_folder("diffusers-flux") / "vae")
    )
    renamed = single_file_utils.convert_ldm_vae_checkpoint(load_file(release("flux-ae")), image.config)
    image.load_state_dict(renamed)


# --- as it should be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FILES)
def test_files_say_what_they_are(format, release, released_checkpoints):
    files = WeightFiles.open(release(format))
    assert kind_of(files.specs) == KINDS.get(format, "mmdit")
    assert "config" not in files.metadata
    if format in MMDITS:
        assert {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in mmdit_form(files.specs, files.metadata).items()
        } == released_checkpoints.mmdit_config(format)
    elif format == "hunyuan-vae":
        kind, form = vae_form(files.specs, files.metadata)
        assert kind == "hunyuan"
        assert (tuple(form["block_out_channels"]), form["layers_per_block"]) == ((32, 64, 96, 96), 1)
        assert (form["latent_channels"], form["scaling_factor"]) == (16, 0.476986)
    elif format == "video-dc-ae":
        kind, form = vae_form(files.specs, files.metadata)
        assert kind == "video_dc_ae"
        assert tuple(form["encoder_widths"]) == tuple(form["decoder_widths"]) == (8, 16, 32, 32, 64, 64)
        assert tuple(form["encoder_depths"]) == tuple(form["decoder_depths"]) == (1,) * 6
        assert (form["latent_channels"], tuple(form["temporal_downsample"])[3:5]) == (8, (True, True))


@pytest.mark.parametrize("format", [*FILES, *TEXT])
def test_loaded_run_and_written_back_without_changing_a_bit(format, release, released_checkpoints):
    stored = released_checkpoints.weights(format)
    dtype = torch.float32 if format in ("clip", "flux-ae") else torch.bfloat16
    model = load(format, release(format), dtype)
    outputs = run(format, load(format, release(format), torch.float32))
    assert outputs.isfinite().all()
    assert 1e-2 < outputs.std() < 1e2
    assert (outputs[0] - outputs[1]).norm() > 0.1 * outputs[0].norm()

    back = written_back(format, model, released_checkpoints)
    if format == "clip":  # of which the text model is loaded, and positions are counted, not stored
        stored = {key: t for key, t in stored.items() if key.startswith("text_model.") and "position_ids" not in key}
    assert bits(back) == bits(stored)


def test_a_model_read_in_a_stream_computes_what_one_read_at_once_does(release, released_checkpoints):
    for format in MMDITS:
        streamed = load(format, release(format), torch.float32)
        tensors = {key: tensor.float() for key, tensor in released_checkpoints.weights(format).items()}
        at_once = load_released_mmdit(tensors, released_checkpoints.mmdit_config(format))
        assert streamed.config == at_once.config
        torch.testing.assert_close(run(format, streamed), run(format, at_once), rtol=0, atol=0)


def test_converted_flux_is_flux(release, released_checkpoints, tmp_path):
    """FLUX.1-dev by the published recipe: rows split, even channels of a head before odd ones, scales with them."""
    head, hidden = released_checkpoints.HEAD_DIM, released_checkpoints.HIDDEN
    order = [*range(0, head, 2), *range(1, head, 2)]

    def turned(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([part[order] for part in rows.split(head)])

    converted = {}
    for key, tensor in released_checkpoints.weights("flux-dev").items():
        if ".qkv." in key:
            q, k, v = tensor.split(hidden)
            for kind, rows in {"q": turned(q), "k": turned(k), "v": v}.items():
                converted[key.replace("qkv", f"{kind}_proj")] = rows
        elif ".linear1." in key:
            q, k, v_mlp = tensor.tensor_split([hidden, 2 * hidden])
            for kind, rows in {"q_proj": turned(q), "k_proj": turned(k), "v_mlp": v_mlp}.items():
                converted[key.replace("linear1", kind)] = rows
        else:
            converted[key] = turned(tensor) if key.endswith("norm.scale") else tensor
    assert converted.keys() == released_checkpoints.shapes("flux-dev-fused-rope").keys()
    save_file({key: t.contiguous() for key, t in converted.items()}, tmp_path / "flux1-dev-fused-rope.safetensors")
    flux, again = load("flux-dev", release("flux-dev")), load("flux-dev-fused-rope", next(tmp_path.iterdir()))
    assert flux.config == again.config
    assert bits(flux.state_dict()) == bits(again.state_dict())


def test_flux_as_diffusers_has_it_computes_what_diffusers_computes(released_folder):
    import diffusers

    folder = released_folder("diffusers-flux")
    files = WeightFiles.open(folder / "transformer")
    assert kind_of(files.specs) == "mmdit_diffusers"
    model = load_mmdit_from(files, device=CPU, dtype=torch.float32)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    img, txt, vec = (torch.randn(shape, generator=generator) for shape in ((1, 8, 64), (1, 3, 48), (1, 32)))
    ids = position_ids_THW(2, 2, 2)[None]
    with torch.no_grad():
        ours = model(img, ids, txt, torch.zeros(1, 3, 3), torch.tensor([0.75]), vec, guidance=torch.tensor([4.0]))
        expected = theirs(
            hidden_states=img,
            img_ids=ids[0].float(),
            encoder_hidden_states=txt,
            txt_ids=torch.zeros(3, 3),
            timestep=torch.tensor([0.75]),
            pooled_projections=vec,
            guidance=torch.tensor([4.0]),
        ).sample
    assert (ours - expected).norm() < 1e-4 * expected.norm()

    autoencoder = FluxAutoencoder.from_diffusers(folder / "vae", dtype=torch.bfloat16)
    assert bits(autoencoder.network.state_dict()) == bits(load_file(folder / "vae/diffusion_pytorch_model.safetensors"))


def layout_options(format: str, released_checkpoints: Any) -> list[str]:
    """What `checkpoint export` has to be told to write the layout of this format."""
    form = released_checkpoints.mmdit_config(format) if format in MMDITS else {}
    return [f"--{name}={str(form[name]).lower()}" for name in ("fused_qkv", "use_liger_rope") if form]


@pytest.mark.parametrize("format", [*MMDITS, "hunyuan-vae"])
def test_the_command_takes_it_to_diffusers_and_back_without_changing_a_bit(
    format, release, released_checkpoints, tmp_path
):
    theirs, back = tmp_path / "theirs", tmp_path / "back.safetensors"
    assert main(["checkpoint", "export", str(release(format)), "--to", "diffusers", "--out", str(theirs)]) == 0
    options = layout_options(format, released_checkpoints)
    assert main(["checkpoint", "export", str(theirs), "--to", "released", "--out", str(back), *options]) == 0
    assert bits(load_file(back)) == bits(released_checkpoints.weights(format))


@pytest.mark.parametrize("format", [*FILES, *TEXT])
def test_the_command_writes_the_released_layout_again(format, release, released_checkpoints, tmp_path):
    out, options = tmp_path / "again.safetensors", layout_options(format, released_checkpoints)
    out = out.with_suffix("") if format in TEXT else out
    assert main(["checkpoint", "export", str(release(format)), "--to", "released", "--out", str(out), *options]) == 0
    assert bits(read_weights(out)) == bits(released_checkpoints.weights(format))
    if format in TEXT:
        assert torch.equal(run(format, load(format, out)), run(format, load(format, release(format))))


def test_t5_loads_beside_its_decoder_and_from_the_pickle_of_the_first_release(release, released_checkpoints, tmp_path):
    tensors = released_checkpoints.weights("t5")
    released_checkpoints.write("t5", tmp_path / "t5")
    more = {"lm_head.weight": torch.zeros(256, 48), "decoder.final_layer_norm.weight": torch.ones(48)}
    released_checkpoints.write_shards(tmp_path / "t5", tensors | more, 2)
    expected = run("t5", load("t5", release("t5")))
    assert torch.equal(run("t5", load("t5", tmp_path / "t5")), expected)
    for path in (tmp_path / "t5").glob("model*"):
        path.unlink()
    torch.save(tensors | more, tmp_path / "t5" / "pytorch_model.bin")
    assert torch.equal(run("t5", load("t5", tmp_path / "t5")), expected)


# --- wrong in each way ----------------------------------------------------------------------------------------------


def refused(load_it: Callable[[], Any]) -> str:
    """The message of the UserError that loading ends with: one line."""
    with pytest.raises(UserError) as refusal:
        load_it()
    message = str(refusal.value)
    assert "\n" not in message
    return message


def spaced(keys: list[str], count: int) -> list[str]:
    """That many of the names, over all of them, the first and the last among them."""
    return [keys[i * (len(keys) - 1) // (count - 1)] for i in range(count)]


def rewrite(format: str, source: Path, place: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a checkpoint whose tensors `change` has changed."""
    if format not in TEXT:
        tensors = load_file(source)
        change(tensors)
        save_file(tensors, place.with_suffix(".safetensors"))
        return place.with_suffix(".safetensors")
    place.mkdir()
    for path in source.iterdir():
        if not path.name.startswith("model"):
            (place / path.name).write_bytes(path.read_bytes())
    tensors = {key: t for path in sorted(source.glob("*.safetensors")) for key, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def used(format: str, keys: Iterator[str]) -> list[str]:
    """The tensors that are loaded: of CLIP its text model's."""
    return [key for key in keys if format != "clip" or key.startswith("text_model.") and "position_ids" not in key]


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", [*FILES, *TEXT])
def test_a_missing_tensor_is_named(format, count, release, released_checkpoints, tmp_path):
    keys = used(format, released_checkpoints.shapes(format))
    for i, key in enumerate(spaced(keys, count)):
        place = rewrite(format, release(format), tmp_path / f"{i}", lambda tensors, key=key: tensors.pop(key))
        assert key in refused(lambda place=place: load(format, place)), key


@pytest.mark.parametrize("format", [*FILES, *TEXT])
def test_an_extra_tensor_is_named(format, release, released_checkpoints, tmp_path):
    """One of an adapter, one of no model, and one of a block that is not there."""
    block = next(
        key for key in reversed(used(format, released_checkpoints.shapes(format))) if re.search(r"\.\d\.", key)
    )
    for i, key in enumerate(["lora_A.weight", f"{block}.lora_B", re.sub(r"\.\d\.", ".7.", block, count=1)]):
        place = rewrite(
            format, release(format), tmp_path / f"{i}", lambda tensors, key=key: tensors.update({key: torch.zeros(2)})
        )
        assert key in refused(lambda place=place: load(format, place)), key


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", [*FILES, *TEXT])
def test_a_tensor_of_another_shape_is_named(format, count, release, released_checkpoints, tmp_path):
    keys = used(format, released_checkpoints.shapes(format))
    for i, key in enumerate(spaced(keys, count)):

        def grow(tensors: dict[str, torch.Tensor], key: str = key) -> None:
            tensors[key] = torch.cat([tensors[key], tensors[key][:1]])

        place = rewrite(format, release(format), tmp_path / f"{i}", grow)
        assert key in refused(lambda place=place: load(format, place)), key


@pytest.fixture(scope="module")
def exported(release, released_checkpoints, tmp_path_factory) -> Callable[[str], WeightFiles]:
    """exported(format): the checkpoint as the product writes it, which says its configuration; not to be changed."""
    folder = tmp_path_factory.mktemp("exported")

    def files(format: str) -> WeightFiles:
        out = folder / f"{format}.safetensors"
        if not out.exists():
            command = ["checkpoint", "export", str(release(format)), "--to", "released", "--out", str(out)]
            assert main([*command, *layout_options(format, released_checkpoints)]) == 0
        return WeightFiles.open(out)

    return files


@pytest.mark.parametrize("count", [8, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", FILES[:-1])
def test_where_weights_say_their_configuration_every_axis_is_checked(format, count, exported):
    """One row, column, ... more or fewer, of each kind of tensor."""
    files = exported(format)
    whole = dict(files.specs)
    of_kind = {re.sub(r"\d+", "N", key): key for key in whole}
    for key in spaced(list(of_kind.values()), min(count, len(of_kind))) + [
        "txt_in.weight",
        "vector_in.in_layer.weight",
    ]:
        for axis, size in enumerate(whole[key].shape if key in whole else ()):
            for other in {size + 1, max(size - 1, 1)} - {size}:
                shape = (*whole[key].shape[:axis], other, *whole[key].shape[axis + 1 :])
                files.specs = whole | {key: whole[key]._replace(shape=shape)}
                assert key in refused(lambda: load_files(format, files)), (key, axis, other)


@pytest.mark.parametrize("format", FILES[:-1])
def test_where_weights_say_their_configuration_no_last_block_may_be_missing(format, exported):
    """Nor may that of any stage: the others are a smaller model's, and nothing is missing of it."""
    files = exported(format)
    whole = dict(files.specs)
    rule = r"(.*?(?:double_blocks|single_blocks|down_blocks|up_blocks|stages|op_list|resnets)\.)(\d+)\."
    lists: dict[str, int] = {}
    for key in whole:
        for nested in (rule, r".*" + rule):
            if match := re.match(nested, key):
                lists[match[0][: match.end(1)]] = max(int(match[2]), lists.get(match[0][: match.end(1)], 0))
    assert lists
    for prefix, last in lists.items():
        files.specs = {key: spec for key, spec in whole.items() if not key.startswith(f"{prefix}{last}.")}
        assert len(files.specs) < len(whole)
        assert prefix.removesuffix(".") in refused(lambda: load_files(format, files)), (prefix, last)


@pytest.mark.parametrize("format", [*FILES, *TEXT])
def test_a_cut_file_is_named(format, release, tmp_path):
    source = release(format) if format in FILES else sorted(release(format).glob("*.safetensors"))[0]
    whole = source.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for i, length in enumerate([0, 4, 8, header // 2, header, header + 1, (header + len(whole)) // 2, len(whole) - 1]):
        place = tmp_path / f"{i}" / source.name
        place.parent.mkdir()
        if format in TEXT:
            for path in release(format).iterdir():
                (place.parent / path.name).write_bytes(path.read_bytes())
        place.write_bytes(whole[:length])
        subject = place.parent if format in TEXT else place
        assert str(subject) in refused(lambda subject=subject: load(format, subject)), length


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("as_zip", [True, False], ids=["torch.save", "bare pickle"])
@pytest.mark.parametrize("format", [*FILES, *TEXT])
def test_pickled_code_is_not_run_and_the_file_is_named(format, as_zip, released_checkpoints, tmp_path):
    marker = tmp_path / "was run"
    content = dict(released_checkpoints.weights(format)) | {"evil": Evil(marker)}
    names = ["weights.pt", "weights.pth", "weights.safetensors"] if format in FILES else ["pytorch_model.bin"]
    for name in names:
        place = tmp_path / "checkpoint"
        if format in TEXT:
            released_checkpoints.write(format, place)
            for path in place.glob("model*"):
                path.unlink()
        place.mkdir(exist_ok=True)
        with (place / name).open("wb") as file:
            torch.save(content, file) if as_zip else pickle.dump(content, file)
        subject = place if format in TEXT else place / name
        assert str(subject) in refused(lambda subject=subject: load(format, subject))
        assert not marker.exists()
        (place / name).unlink()


@pytest.mark.parametrize("format", FILES)
def test_what_a_download_leaves_behind_is_no_checkpoint(format, tmp_path):
    """A pointer of Git LFS, a web page and an empty file under the name of weights."""
    place = tmp_path / "Open_Sora_v2.safetensors"
    for content in (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 23783037688\n",
        b"<!DOCTYPE html><html><head><title>Access denied</title></head></html>",
        b"",
    ):
        place.write_bytes(content)
        assert str(place) in refused(lambda: load(format, place))


@pytest.mark.parametrize("format", ["open-sora-v2", "hunyuan-vae", "t5"])
def test_shards_must_be_whole(format, released_checkpoints, tmp_path):
    tensors = released_checkpoints.weights(format)

    def shards(name: str) -> Path:
        folder = tmp_path / name
        if format == "t5":
            released_checkpoints.write("t5", folder)
        released_checkpoints.write_shards(folder, tensors, 2)
        return folder

    assert bits(written_back(format, load(format, shards("whole")), released_checkpoints)) == bits(tensors)

    folder = shards("one is away")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refused(lambda: load(format, folder))

    folder = shards("index is cut")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:100])
    assert str(folder) in refused(lambda: load(format, folder))

    folder = shards("shard lacks one")
    shard = folder / "model-00001-of-00002.safetensors"
    content = load_file(shard)
    lost = sorted(content)[1]
    del content[lost]
    save_file(content, shard, {"format": "pt"})
    assert lost in refused(lambda: load(format, folder))

    folder = shards("index leaves the folder")
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"][lost] = "../whole/model-00001-of-00002.safetensors"
    index.write_text(json.dumps(value))
    message = refused(lambda: load(format, folder))
    assert str(index) in message
    assert "'../whole/model-00001-of-00002.safetensors'" in message


@pytest.mark.parametrize("format", TEXT)
def test_a_text_encoder_without_its_vocabulary_or_configuration_is_named(format, released_checkpoints, tmp_path):
    for name in {"t5": ("spiece.model", "config.json"), "clip": ("vocab.json", "merges.txt", "config.json")}[format]:
        folder = released_checkpoints.write(format, tmp_path / name)
        (folder / name).unlink()
        assert str(folder) in refused(lambda folder=folder: load(format, folder)), name
        (folder / name).write_bytes(b"\x00\xff damaged")
        assert str(folder) in refused(lambda folder=folder: load(format, folder)), name


def test_one_kind_of_weights_is_not_taken_for_another(release):
    """Each file given to each reader: its own is read, every other is refused by one line that names the file."""
    for reader in FILES:
        for format in FILES:
            if reader == format or {reader, format} <= set(MMDITS):
                continue
            assert str(release(format)) in refused(lambda reader=reader, format=format: load(reader, release(format)))


# --- a whole release, from the command line -------------------------------------------------------------------------


def without_one(path: Path) -> str:
    """Take a tensor out of a file that the sampler needs; its name."""
    tensors = load_file(path)
    key = sorted(tensors)[1]
    del tensors[key]
    save_file(tensors, path, {"format": "pt"})
    return key


def cut(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-1])
    return path.name


def removed(path: Path) -> str:
    path.unlink()
    return path.name


@pytest.mark.parametrize("damage", [without_one, cut, removed])
@pytest.mark.parametrize(
    "part",
    [
        "Open_Sora_v2.safetensors",
        "hunyuan_vae.safetensors",
        "flux1-dev.safetensors",
        "flux1-dev-ae.safetensors",
        "google/t5-v1_1-xxl/model-00002-of-00002.safetensors",
        "openai/clip-vit-large-patch14/model.safetensors",
    ],
)
def test_the_sampler_names_what_is_wrong_before_it_reads_a_transformer(
    part, damage, released_folder, tmp_path, monkeypatch, capsys
):
    """Whatever part of a release is damaged: exit code 2, one line that names it, no transformer's weights read."""
    folder = tmp_path / "ckpts"
    shutil.copytree(released_folder("open-sora-v2"), folder)
    named = damage(folder / part)
    files_read = set()

    def noted(files: SafetensorsFiles, wanted: Any) -> None:
        files_read.update(Path(path).name for path in files.headers)
        SAFETENSORS_READ(files, wanted)

    monkeypatch.setattr(SafetensorsFiles, "read", noted)
    command = ["sample", "--checkpoint", str(folder), "--flux", str(folder), "--prompt", "rain", "--steps", "1"]
    small = ["--frames", "9", "--height", "32", "--width", "32", "--flux-resolution", "256px"]
    assert main([*command, *small, "--out", str(tmp_path / "rain.mp4")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert not files_read & {"Open_Sora_v2.safetensors", "flux1-dev.safetensors"}
    assert not (tmp_path / "rain.mp4").exists()
