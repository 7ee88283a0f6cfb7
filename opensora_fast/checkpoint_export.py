"""Weights as safetensors in the released layout or in diffusers', from a run or from either, without them in memory.

    plan     what every tensor of the result will be, from the source's names and shapes and the architecture on the
             meta device: so the files' headers are known before anything is read
    write    groups of our parameters are read (those of a run verified against its manifest) and translated, and their
             tensors go into the files in this order. At most READ_BYTES of parameters, or one that is larger, are in
             memory, with a reordered and a converted copy of one of them.

Both directions are exact: exported to the other layout and back, every tensor has its bits again. (One thing is
computed, and undone through a side file: see `diffusers_layout`. And tensors that are of several dtypes, and rows of
one parameter, all come back in the widest: `promoted` names them.)

T5, CLIP and FLUX's image autoencoder have one layout. They are written as they are; into a folder with the other files
that theirs is read with.

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

from opensora_fast.config import HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig
from opensora_fast.diffusers_layout import (
    BIASES,
    biases_file,
    diffusers_config,
    diffusers_parts,
    diffusers_vae_config,
    to_diffusers,
)
from opensora_fast.errors import UserError
from opensora_fast.native import native
from opensora_fast.parameter_source import ParameterSource, StoredTensors, read_parameters
from opensora_fast.released import StateDict, to_released
from opensora_fast.safetensors_file import TensorSpec, write_file, write_json, write_shards
from opensora_fast.weight_files import BIASES_FILE

Layout = Literal["released", "diffusers"]
Part = tuple[str, ...]  # our parameters that are translated together

READ_BYTES = 2**28
STEMS: dict[Layout, str] = {"released": "model", "diffusers": "diffusion_pytorch_model"}
RELEASED_LAYOUT = {"fused_qkv": False, "use_liger_rope": True}  # of the released Open-Sora 2.0


class Translation(NamedTuple):
    """From our parameters to the tensors of a layout."""

    config: dict[str, Any] | None  # the architecture, and how this layout holds it: each file's metadata has it
    class_config: dict[str, Any] | None  # diffusers' config.json
    parts: list[Part]
    translate: Callable[[Mapping[str, Tensor]], StateDict]  # of one part


@dataclass(frozen=True)
class Export:
    """What will be written; nothing of it was read."""

    source: ParameterSource
    layout: Layout
    translation: Translation
    specs: dict[str, TensorSpec]  # of the result, in the order in which its tensors are made
    dtype: torch.dtype | None

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.specs.values())

    def write(self, out: Path, *, shard_bytes: int, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Make `out`: one file where its name ends in .safetensors, otherwise a folder of shards with their index.

        The configuration is in the metadata of each file, under "config"; diffusers' is config.json besides.
        `on_bytes` is called with the bytes of every tensor that was written. Raises UserError when `out` exists, when a
        tensor cannot be read or does not match its checksum, or with the system's reason; `out` is then as it was.
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
                if self.translation.class_config is not None:
                    write_json(temporary / "config.json", self.translation.class_config)
                    self._write_biases(temporary / BIASES_FILE)
                for path in self._beside():
                    shutil.copyfile(path, temporary / path.name)
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

    def _write_biases(self, path: Path) -> None:
        """The two biases of which diffusers' layout has the sum; nothing of other models."""
        config = self.source.config
        if not isinstance(config, MMDiTConfig) or not config.cond_embed:
            return
        biases = read_parameters(self.source, BIASES)
        tensors = biases_file({name: self._converted(tensor) for name, tensor in biases.items()}, config)
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_file(path, specs, iter(tensors.items()), {"format": "pt"})

    def _beside(self) -> tuple[Path, ...]:
        return self.source.beside if isinstance(self.source, StoredTensors) else ()

    def _metadata(self) -> dict[str, str]:
        """What each file says of itself; "format" is what other readers ask for."""
        config = self.translation.config
        return {"format": "pt"} | self.source.origin | ({} if config is None else {"config": json.dumps(config)})

    def _tensors(self, on_bytes: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
        for group in _groups(self.translation.parts, self.source.specs):
            ours = read_parameters(self.source, [name for part in group for name in part])
            for part in group:
                theirs = self.translation.translate({name: self._converted(ours.pop(name)) for name in part})
                for key in list(theirs):
                    yield key, theirs.pop(key)  # held by whoever asked, and by nobody else
                    on_bytes(self.specs[key].bytes)

    def _converted(self, tensor: Tensor) -> Tensor:
        """In the dtype of the result: before it is translated, so that both biases add up to their sum there, too."""
        return tensor.to(_dtype(tensor, self.dtype))


def plan_export(
    source: ParameterSource,
    *,
    layout: Layout = "released",
    dtype: torch.dtype | None = None,
    fused_qkv: bool = RELEASED_LAYOUT["fused_qkv"],
    use_liger_rope: bool = RELEASED_LAYOUT["use_liger_rope"],
) -> Export:
    """What exporting the parameters of `open_parameters` will write; nothing more of them is read.

    `dtype` None keeps the stored one. `fused_qkv` and `use_liger_rope` are those of `load_released_mmdit`; an
    autoencoder, and diffusers' layout, have no such choice. Raises UserError when the model does not fit the layout.
    """
    form = {"fused_qkv": fused_qkv, "use_liger_rope": use_liger_rope}
    translation = _to_diffusers(source) if layout == "diffusers" else _to_released(source, form)
    specs = {}
    for part in translation.parts:
        ours = {
            name: torch.empty(source.specs[name].shape, dtype=source.specs[name].dtype, device="meta") for name in part
        }
        for key, tensor in translation.translate(ours).items():
            specs[key] = TensorSpec(_dtype(tensor, dtype), tuple(tensor.shape))
    return Export(source, layout, translation, specs, dtype)


def check_out(out: Path, layout: Layout) -> None:
    """Raises UserError when nothing can be written there."""
    if out.exists():
        raise UserError(f"--out {out}: exists; remove it, or name another place")
    if layout == "diffusers" and out.suffix == ".safetensors":
        raise UserError(f"--out {out}: diffusers reads a folder with a config.json; name a folder")


def _dtype(tensor: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor is written in: whole numbers (positions) as they are."""
    return wanted if wanted is not None and tensor.is_floating_point() else tensor.dtype


def _to_released(source: ParameterSource, form: dict[str, bool]) -> Translation:
    parts: list[Part] = [(name,) for name in source.specs]
    config = source.config
    if config is None:
        return Translation(None, None, parts, dict)
    if not isinstance(config, MMDiTConfig):  # autoencoders, whose names are the released ones
        return Translation(asdict(config), None, parts, dict)

    def translate(part: Mapping[str, Tensor]) -> StateDict:
        ((name, tensor),) = part.items()
        return to_released(name, tensor, config, form)

    return Translation(asdict(config) | form, None, parts, translate)


def _to_diffusers(source: ParameterSource) -> Translation:
    config = source.config
    if config is None:
        raise UserError(f"--to diffusers: {source.title} has one layout: use --to released")
    if isinstance(config, VideoDCAEConfig):
        raise UserError(
            "--to diffusers: the checkpoint holds a Video DC-AE, and diffusers' AutoencoderDC is of images alone: use "
            "--to released"
        )
    if isinstance(config, HunyuanVAEConfig):  # which has the class's own names
        return Translation(asdict(config), diffusers_vae_config(config), [(name,) for name in source.specs], dict)
    return Translation(
        asdict(config), diffusers_config(config), diffusers_parts(source.specs), lambda part: to_diffusers(part, config)
    )


def _groups(parts: list[Part], specs: Mapping[str, TensorSpec]) -> Iterator[list[Part]]:
    """The parts in order, in groups of at most READ_BYTES bytes, or of one part that is larger."""
    group: list[Part] = []
    filled = 0
    for part in parts:
        part_bytes = sum(specs[name].bytes for name in part)
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
