"""A checkpoint's weights as safetensors, in the released layout or in diffusers', without the model in memory.

    plan     what every tensor of the result will be, from the manifest and the architecture on the meta device: names,
             shapes, sizes and so the files' headers are known before anything is read
    write    groups of our parameters are read (verified against the manifest) and translated, and their tensors go
             into the files in this order. At most READ_BYTES of parameters, or one that is larger, are in memory, with
             a reordered and a converted copy of one of them.

Everything is written under a temporary name beside `out`, synced, and renamed: `out` is whole or not there.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from opensora_fast.checkpoint_folder import Weights
from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.config import MMDiTConfig, VideoDCAEConfig, config_from_dict
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.diffusers_layout import diffusers_config, diffusers_parts, to_diffusers
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT
from opensora_fast.native import native
from opensora_fast.released import StateDict, to_released
from opensora_fast.safetensors_file import TensorSpec, write_file, write_json, write_shards

Layout = Literal["released", "diffusers"]
Part = tuple[str, ...]  # our parameters that are translated together

READ_BYTES = 2**28
STEMS: dict[Layout, str] = {"released": "model", "diffusers": "diffusion_pytorch_model"}
RELEASED_LAYOUT = {"fused_qkv": False, "use_liger_rope": True}  # of the released Open-Sora 2.0


class Translation(NamedTuple):
    """From our parameters to the tensors of a layout."""

    config: dict[str, Any]  # as load_released_mmdit and load_released_dc_ae take it, or diffusers' config.json
    parts: list[Part]
    translate: Callable[[Mapping[str, Tensor]], StateDict]  # of one part


@dataclass(frozen=True)
class Export:
    """What will be written; nothing of it was read."""

    reader: CheckpointReader
    weights: Weights
    layout: Layout
    translation: Translation
    specs: dict[str, TensorSpec]  # of the result, in the order in which its tensors are made

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.specs.values())

    def write(self, out: Path, *, shard_bytes: int, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Make `out`: one file where its name ends in .safetensors, otherwise a folder of shards with their index.

        A released layout's configuration is in the metadata of each file, under "config"; diffusers' is config.json.
        `on_bytes` is called with the bytes of every tensor that was written. Raises UserError when `out` exists, when a
        tensor does not match its checksum, or with the system's reason; `out` is then as it was.
        """
        check_out(out, self.layout)
        temporary = out.with_name(f"{out.name}.partial-{uuid.uuid4().hex[:8]}")
        files, tensors = native().FileSystem(), self._tensors(on_bytes)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if out.suffix == ".safetensors":
                write_file(temporary, self.specs, tensors, self._metadata())
            else:
                temporary.mkdir()
                write_shards(temporary, STEMS[self.layout], self.specs, tensors, self._metadata(), shard_bytes)
                if self.layout == "diffusers":
                    write_json(temporary / "config.json", self.translation.config)
                files.sync_folder(str(temporary))
            files.rename(str(temporary), str(out))
            files.sync_folder(str(out.parent))
        except BaseException as error:
            _remove(temporary)
            if not isinstance(error, OSError):
                raise
            raise UserError(
                f"--out {out}: not written ({error.strerror or error}): free space, or name another place"
            ) from error

    def _metadata(self) -> dict[str, str]:
        """What each file says of itself; "format" is what other readers ask for."""
        origin = {"format": "pt", "step": str(self.reader.manifest.step), "weights": self.weights}
        return origin | ({"config": json.dumps(self.translation.config)} if self.layout == "released" else {})

    def _tensors(self, on_bytes: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
        stored = {name: self.reader.manifest.tensors[f"{self.weights}.{name}"] for name in self._names()}
        for group in _groups(self.translation.parts, {name: record.bytes for name, record in stored.items()}):
            ours = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype) for part in group for name in part}
            self.reader.read({f"{self.weights}.{name}": tensor for name, tensor in ours.items()})
            for part in group:
                theirs = self.translation.translate({name: ours.pop(name) for name in part})
                for key in list(theirs):
                    yield key, theirs.pop(key).to(self.specs[key].dtype)  # held by whoever asked, and by nobody else
                    on_bytes(self.specs[key].bytes)

    def _names(self) -> list[str]:
        return [name for part in self.translation.parts for name in part]


def plan_export(
    step_folder: Path,
    *,
    weights: Weights | None = None,
    layout: Layout = "released",
    dtype: torch.dtype | None = None,
    fused_qkv: bool = RELEASED_LAYOUT["fused_qkv"],
    use_liger_rope: bool = RELEASED_LAYOUT["use_liger_rope"],
) -> Export:
    """What exporting a checkpoint will write; of the checkpoint its manifest alone is read.

    `weights` None takes the moving average if there is one; `dtype` None keeps the stored one. `fused_qkv` and
    `use_liger_rope` are those of `load_released_mmdit`; an autoencoder, and diffusers' layout, have no such choice.
    Raises UserError when the checkpoint cannot be read, lacks these weights, or does not fit the layout.
    """
    reader = CheckpointReader(step_folder)
    stored = reader.manifest.tensors
    averaged = any(name.startswith("ema.") for name in stored)
    if weights == "ema" and not averaged:
        raise UserError(f"--weights ema: checkpoint {step_folder} keeps no moving average; use --weights model")
    weights = weights or ("ema" if averaged else "model")
    model = _on_meta(reader)
    if layout == "diffusers":
        translation = _to_diffusers(model)
    else:
        translation = _to_released(model, {"fused_qkv": fused_qkv, "use_liger_rope": use_liger_rope})
    reader.check_fit({f"{weights}.{name}": tensor for name, tensor in model.state_dict().items()})
    specs = {}
    for part in translation.parts:
        records = {name: stored[f"{weights}.{name}"] for name in part}
        ours = {name: torch.empty(r.shape, dtype=r.dtype, device="meta") for name, r in records.items()}
        for key, tensor in translation.translate(ours).items():
            specs[key] = TensorSpec(dtype or tensor.dtype, tuple(tensor.shape))
    return Export(reader, weights, layout, translation, specs)


def check_out(out: Path, layout: Layout) -> None:
    """Raises UserError when nothing can be written there."""
    if out.exists():
        raise UserError(f"--out {out}: exists; remove it, or name another place")
    if layout == "diffusers" and out.suffix == ".safetensors":
        raise UserError(f"--out {out}: diffusers reads a folder with a config.json; name a folder")


def _on_meta(reader: CheckpointReader) -> MMDiT | VideoDCAE:
    recipe = reader.manifest.recipe
    with torch.device("meta"):
        if "model" in recipe:
            return MMDiT(config_from_dict(MMDiTConfig, recipe["model"]))
        if "autoencoder" in recipe:
            return VideoDCAE(config_from_dict(VideoDCAEConfig, recipe["autoencoder"]["config"]))
    raise UserError(
        f"checkpoint {reader.step_folder} (recipe {recipe.get('name')}) holds neither a transformer nor an "
        "autoencoder: name another one"
    )


def _to_released(model: MMDiT | VideoDCAE, form: dict[str, bool]) -> Translation:
    parts: list[Part] = [(name,) for name in model.state_dict()]
    if isinstance(model, VideoDCAE):  # whose names are the released ones
        return Translation(asdict(model.config), parts, dict)
    config = model.config

    def translate(part: Mapping[str, Tensor]) -> StateDict:
        ((name, tensor),) = part.items()
        return to_released(name, tensor, config, form)

    return Translation(asdict(config) | form, parts, translate)


def _to_diffusers(model: MMDiT | VideoDCAE) -> Translation:
    if isinstance(model, VideoDCAE):
        raise UserError(
            "--layout diffusers: the checkpoint holds a Video DC-AE, and diffusers' AutoencoderDC is of images alone: "
            "use --layout released"
        )
    config = model.config
    return Translation(
        diffusers_config(config), diffusers_parts(model.state_dict()), lambda part: to_diffusers(part, config)
    )


def _groups(parts: list[Part], sizes: Mapping[str, int]) -> Iterator[list[Part]]:
    """The parts in order, in groups of at most READ_BYTES bytes, or of one part that is larger."""
    group: list[Part] = []
    filled = 0
    for part in parts:
        part_bytes = sum(sizes[name] for name in part)
        if group and filled + part_bytes > READ_BYTES:
            yield group
            group, filled = [], 0
        group.append(part)
        filled += part_bytes
    yield group


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with suppress(OSError):  # was never made
            temporary.unlink()
