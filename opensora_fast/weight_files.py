"""A checkpoint's files as named tensors of which nothing is read before it is asked for.

    NAME.safetensors            one file
    FOLDER                      shards that one *.safetensors.index.json names, or exactly one .safetensors file
    NAME.pt, .pth, .bin         a flat state dict that torch.save wrote; pickled code in it is never run

Opening reads names, dtypes and shapes. Reading goes to given memory, row by row if asked, so that whoever loads a model
decides how much of a file is in memory at once. A .pt file is mapped: its pages are the system's, as those of any file
that is read. But what a map costs is this: cut while it is being read, it ends the process (SIGBUS), where a
.safetensors file is refused. So nothing may write to a .pt file in use.

Beside the shards of a folder may lie opensora_fast_biases.safetensors: tensors of ours that the folder's layout has no
place for. They are part of the checkpoint.

What weights say of themselves under "config" of their metadata can be said beside them, too, where they say nothing: in
config.json of the folder, or in NAME.json beside NAME.safetensors.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.safetensors_file import Rows, SafetensorsFiles, TensorSpec

INDEX = "*.safetensors.index.json"
BIASES_FILE = "opensora_fast_biases.safetensors"


class Store(Protocol):
    """Where tensors are read from."""

    specs: dict[str, TensorSpec]

    def read(self, wanted: Sequence[Rows]) -> None: ...


class WeightFiles:
    """One checkpoint; see the module.

    path      what was opened
    specs     dtype and shape of every tensor, in the order of the files
    metadata  what the files say of themselves; "config" also what is said beside them
    """

    def __init__(self, path: Path, store: Store, metadata: dict[str, str]) -> None:
        self.path = path
        self.specs = store.specs
        self.metadata = metadata
        self._store = store

    @classmethod
    def open(cls, path: Path | str) -> WeightFiles:
        """Read what the files say they hold. Raises UserError when they are absent, incomplete, cut or no tensors."""
        path = Path(path)
        if not path.exists():
            raise UserError(
                f"weights {path} do not exist: pass a .safetensors, .pt or .pth file, or a folder of shards"
            )
        if path.is_dir():
            return _open_folder(path)
        if path.suffix == ".safetensors":
            return _with_config(_open_files(path, [path]), path.with_suffix(".json"))
        if path.suffix in (".pt", ".pth", ".bin"):
            return _with_config(cls(path, _PickledTensors(path), {}), path.with_suffix(".json"))
        raise UserError(f"weights {path} have the suffix {path.suffix!r}: pass a .safetensors, .pt or .pth file")

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Read whole tensors into CPU memory of their shapes; another dtype is converted to, one tensor at a time.

        Raises UserError naming a tensor that is not there or has another shape.
        """
        direct: list[Rows] = []
        for name, tensor in tensors.items():
            spec = self.spec(name)
            if tuple(tensor.shape) != spec.shape:
                raise UserError(
                    f"weights {self.path}: {name} is {list(spec.shape)}, expected {list(tensor.shape)}: pass weights "
                    "of this model"
                )
            if tensor.dtype == spec.dtype and tensor.is_contiguous():
                direct.append(Rows(name, 0, tensor.detach()))
            else:
                tensor.detach().copy_(self.read(name))
        self.read_into(direct)

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, in its stored dtype. Raises UserError as `fill`."""
        spec = self.spec(name)
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        self.read_into([Rows(name, 0, tensor)])
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor's first axis; no other byte of it is read. Raises UserError as `fill`."""
        spec = self.spec(name)
        if not spec.shape or not 0 <= start <= stop <= spec.shape[0]:
            raise UserError(f"weights {self.path}: {name} is {list(spec.shape)}: rows {start} to {stop} are not in it")
        rows = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        self.read_into([Rows(name, start, rows)])
        return rows

    def read_into(self, wanted: Sequence[Rows]) -> None:
        """Fill rows of several tensors at once. Raises UserError when a file was changed, or cannot be read."""
        self._store.read(wanted)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor. Raises UserError when it is not there."""
        if name not in self.specs:
            raise UserError(f"weights {self.path} lack {name}: pass weights of this model")
        return self.specs[name]


class _PickledTensors:
    """The state dict of a .pt or .pth file, mapped where the file's form allows it."""

    def __init__(self, path: Path) -> None:
        self._tensors = _load_pickle(path)
        self.specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, wanted: Sequence[Rows]) -> None:
        for name, start, target in wanted:
            tensor = self._tensors[name].detach()
            target.copy_(tensor[start : start + target.shape[0]] if tensor.ndim else tensor)


def _open_files(path: Path, files: list[Path]) -> WeightFiles:
    store = SafetensorsFiles(files)
    metadata: dict[str, str] = {}
    for header in store.headers.values():
        metadata = header.metadata | metadata
    return WeightFiles(path, store, metadata)


def _open_folder(folder: Path) -> WeightFiles:
    side_files = sorted(folder.glob(BIASES_FILE))
    indices = sorted(folder.glob(INDEX))
    if len(indices) == 1:
        shards = _indexed_shards(folder, indices[0])
    else:
        shards = [path for path in sorted(folder.glob("*.safetensors")) if path not in side_files]
        if indices or len(shards) != 1:
            raise UserError(
                f"folder {folder} holds {len(indices)} files {INDEX} and {len(shards)} .safetensors files: one index "
                "of all shards, or one file without an index is needed; name a file"
            )
    files = _open_files(folder, [*shards, *side_files])
    if indices:
        lost = [name for name in _weight_map(indices[0]) if name not in files.specs]
        if lost:
            raise UserError(f"the shards of {folder} lack {listed(lost)}, which the index names: download them again")
    return _with_config(files, folder / "config.json")


def _with_config(files: WeightFiles, config: Path) -> WeightFiles:
    if "config" not in files.metadata and config.is_file():
        try:
            files.metadata["config"] = config.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{config} cannot be read ({error}): download or write it again") from error
    return files


def _indexed_shards(folder: Path, index: Path) -> list[Path]:
    shards = {name: folder / name for name in sorted(set(_weight_map(index).values()))}
    absent = [name for name, shard in shards.items() if not shard.is_file()]
    if absent:
        raise UserError(f"folder {folder} lacks {listed(absent)}, which its index names: download them again")
    return list(shards.values())


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor. Raises UserError for what is no index, or names a file outside its folder."""
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"index {index} is damaged, {error!r}: download it again") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"index {index} is damaged, it names the file {shard!r}: download it again")
    return weight_map


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:  # files of old versions of torch are no zip archives, and cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower():
            raise UserError(f"weights {path} hold pickled code, which is not run: save the tensors alone") from error
        raise UserError(f"weights {path} are no file of tensors: download or convert it again") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"weights {path} are damaged, {type(error).__name__}: download or copy the file again"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"  # one on the meta device holds nothing
        for name, tensor in tensors.items()
    ):
        raise UserError(f"weights {path} are not a flat state dict: save the dict of names and tensors alone")
    return tensors


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names on one line: all of them, or the first `most` and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
