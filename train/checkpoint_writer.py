"""Writes a checkpoint beneath torch.distributed.checkpoint: its data, its manifest, and the moment it begins to exist.

    all ranks      rank-R-I.bin, each synced            in RUN/step-N.tmp-ID, whose name comes with the global plan
    rank 0         manifest.json, synced; sync of the folder; rename to RUN/step-N; sync of RUN;
                   LATEST.tmp-ID, synced; rename to LATEST; sync of RUN;
                   only then older checkpoints: rename to step-K.tmp-ID, sync of RUN, removal

At a cut anywhere, by a kill or a power loss, what has the name step-N is whole. A step that is published already is
replaced inside its folder: data under new names, and a manifest that replaces the old one in one rename, after which
the old data go. So the step is never nowhere, and a cut leaves at most files that no manifest names.

A tensor handed in starts at a page of host memory, and owns it to the end of its last page: what lies between tensors
is written too, so that the kernel takes long runs of pages straight from where they were staged.
"""

from __future__ import annotations

import functools
import os
import platform
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from opensora_fast.checkpoint_folder import STEP_FOLDER, step_folders
from opensora_fast.checkpoint_reader import PAGE, FileSystem, paged
from opensora_fast.errors import UserError
from opensora_fast.manifest import (
    FILE_NAME,
    FILE_RULE,
    MANIFEST,
    CheckpointError,
    FileRecord,
    Manifest,
    Piece,
    TensorRecord,
    read_manifest,
)

_FILES_PER_RANK = 4
WRITER_THREADS = 2
DEPTH = 4  # chunks in flight
_OURS = (STEP_FOLDER.format("*"), "LATEST", "recipe.json")


@dataclass(frozen=True)
class Target:
    """Where the ranks write: rank 0 decides, and the global plan carries it to the others."""

    folder: Path
    first_number: int  # of a rank's files
    replaces: bool  # the folder is published, and its manifest is replaced


@dataclass(frozen=True)
class Stored:
    """Where a written item lies."""

    file: FileRecord
    start: int


class PublishingError(OSError):
    """The step is published, and is what a run resumes from; what comes after that has failed."""


class ImageWriter(StorageWriter):
    """Saves one step of a run with `dcp.save(staged, storage_writer=..., process_group=...)`, once.

    progress, recipe: go into the manifest.  keep: how many checkpoints stay.  ready: returns once the tensors have
    their values.  say: told, in one line, what the run should know though the save succeeds.
    `dcp.save` raises CheckpointException on all ranks when one of them fails; nothing that was published is touched.
    The failure is a PublishingError when the step is published all the same.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        *,
        files: FileSystem,
        chunk_bytes: int,
        keep: int,
        progress: dict,
        recipe: dict,
        rank: int,
        ranks: int,
        ready: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.final = run / STEP_FOLDER.format(step)
        self._run, self._step, self._files, self._chunk_bytes, self._keep = run, step, files, chunk_bytes, keep
        self._progress, self._recipe, self._rank, self._ranks = progress, recipe, rank, ranks
        self._ready, self._say = ready, say
        self._target: Target | None = None
        self._published = False

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """The folder is the one that the writer was made for."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Everything was given when the writer was made."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise TypeError(f"{item.index.fqn} is no tensor: what is none belongs into progress")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._remove_unfinished()
        if self.final.is_dir():
            names = [FILE_RULE.fullmatch(path.name) for path in self.final.iterdir()]
            self._target = Target(self.final, max((int(n[2]) for n in names if n), default=0) + 1, replaces=True)
        else:
            self._target = Target(temporary_name(self.final), 1, replaces=False)
            self._files.make_folder(str(self._target.folder))
        return [replace(plan, storage_data=self._target) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        target: Target = plan.storage_data
        items, extents = _by_address(plan, planner)
        parts = _in_parts([bytes for _, bytes in extents], self._chunk_bytes)
        names = [FILE_NAME.format(self._rank, target.first_number + part) for part in range(len(parts))]
        images = [(str(target.folder / name), _merged(extents[part])) for name, part in zip(names, parts, strict=True)]
        self._ready()
        report = self._files.write_images(images, chunk_bytes=self._chunk_bytes, depth=DEPTH, threads=WRITER_THREADS)
        if report.fallback:
            self._say(f"checkpoints of {self._run} are written with {report.engine}: {report.fallback}")
        results = []
        for name, part, checksums in zip(names, parts, report.crc32c, strict=True):
            file = FileRecord(name, sum(bytes for _, bytes in extents[part]), tuple(checksums))
            start = 0
            for item, (_, bytes) in zip(items[part], extents[part], strict=True):
                results.append(WriteResult(item.index, bytes, Stored(file, start)))
                start += bytes
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self._target is not None
        folder = self._target.folder
        manifest = self._manifest(metadata, [result for of_rank in results for result in of_rank])
        written = temporary_name(folder / MANIFEST) if self._target.replaces else folder / MANIFEST
        self._files.write_file(str(written), manifest.to_bytes())
        self._files.sync_folder(str(folder))
        try:
            if self._target.replaces:
                self._publish(written, folder / MANIFEST)
            else:
                self._publish(folder, self.final)
            replace_file(self._files, self._run / "LATEST", self.final.name.encode())
        except OSError as error:
            if self._published:
                raise PublishingError(error.errno, error.strerror, error.filename) from error
            raise
        try:
            if self._target.replaces:
                self._remove_unnamed(manifest)
            self._prune()
        except OSError as error:
            self._say(f"an old checkpoint of {self._run} cannot be removed ({reason(error)}): remove it by hand")

    def abandon(self) -> None:
        """After a save that failed: remove what was written of it, as far as the system lets us."""
        if self._rank or self._target is None or self._published:
            return
        try:
            if self._target.replaces:
                self._files.sync_folder(str(self.final))  # the manifest may be of a process that was cut off
                self._remove_unnamed(read_manifest(self.final))
            else:
                remove_folder(self._files, self._target.folder)
        except (OSError, UserError):
            return  # the next save, or the removal of that step, tries again

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False  # the writer is named, not found by a path

    def _manifest(self, metadata: Metadata, results: list[WriteResult]) -> Manifest:
        pieces: dict[str, list[Piece]] = {name: [] for name in metadata.state_dict_metadata}
        files: dict[str, FileRecord] = {}
        tensors = {}
        for result in results:
            described, stored = metadata.state_dict_metadata[result.index.fqn], result.storage_data
            assert isinstance(described, TensorStorageMetadata)
            assert result.index.index is not None
            box = described.chunks[result.index.index]
            files[stored.file.name] = stored.file
            pieces[result.index.fqn].append(Piece(tuple(box.offsets), tuple(box.sizes), stored.file.name, stored.start))
        for name, described in metadata.state_dict_metadata.items():
            assert isinstance(described, TensorStorageMetadata)
            tensors[name] = TensorRecord(described.properties.dtype, tuple(described.size), tuple(pieces[name]))
        return Manifest(
            step=self._step,
            chunk_bytes=self._chunk_bytes,
            files=tuple(files[name] for name in sorted(files)),
            tensors=tensors,
            world={"ranks": self._ranks},
            versions=_versions(),
            recipe=self._recipe,
            progress={**self._progress, "step": self._step},
        )

    def _publish(self, old: Path, new: Path) -> None:
        self._files.rename(str(old), str(new))
        self._published = True
        self._files.sync_folder(str(new.parent))

    def _prune(self) -> None:
        old = [folder for folder in step_folders(self._run)[: -self._keep] if folder != self.final]
        discard(self._files, old)

    def _remove_unfinished(self) -> None:
        """What saves and removals that were cut off have left."""
        try:
            unfinished = [path for name in _OURS for path in self._run.glob(f"{name}.tmp-*")]
            if any(path.is_dir() for path in unfinished):  # one that was published must lose that name first
                self._files.sync_folder(str(self._run))
            for path in unfinished:
                remove_folder(self._files, path) if path.is_dir() else self._files.remove_file(str(path))
        except OSError as error:
            self._say(f"an unfinished checkpoint of {self._run} cannot be removed ({reason(error)}): remove it by hand")

    def _remove_unnamed(self, manifest: Manifest) -> None:
        """Files of the published folder that its manifest, which is durable, does not name."""
        named = {MANIFEST, *(file.name for file in manifest.files)}
        for path in self.final.iterdir():
            if path.name not in named:
                self._files.remove_file(str(path))


def temporary_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def make_folders(files: FileSystem, path: Path) -> None:
    """The folder and those around it that do not exist, durably. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    for folder in reversed(missing):
        files.make_folder(str(folder))
        files.sync_folder(str(folder.parent))


def replace_file(files: FileSystem, path: Path, content: bytes) -> None:
    """Give the file this content, durably; at a cut it has the old or the new one. Raises OSError."""
    temporary = temporary_name(path)
    try:
        files.write_file(str(temporary), content)
        files.rename(str(temporary), str(path))
    except OSError:
        if temporary.exists():
            files.remove_file(str(temporary))
        raise
    files.sync_folder(str(path.parent))


def discard(files: FileSystem, folders: list[Path]) -> None:
    """Remove published checkpoints of a run so that a cut leaves none of them in part. Raises OSError."""
    discarded = [temporary_name(folder) for folder in folders]
    for folder, temporary in zip(folders, discarded, strict=True):
        files.rename(str(folder), str(temporary))
    if discarded:
        files.sync_folder(str(discarded[0].parent))
    for temporary in discarded:
        remove_folder(files, temporary)


def remove_folder(files: FileSystem, folder: Path) -> None:
    """Remove a folder and all that is in it; nothing where there is none. Of a link, the link. Raises OSError."""
    if folder.is_symlink():
        files.remove_file(str(folder))
        return
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir():
            remove_folder(files, path)
        else:
            files.remove_file(str(path))
    files.remove_folder(str(folder))


def first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    """The first rank that failed, and what it raised."""
    rank = min(error.failures)
    return rank, error.failures[rank][0]


def reason(error: BaseException) -> str:
    """What went wrong, on one line, in the operating system's words; of several ranks, the first that failed."""
    if isinstance(error, CheckpointException):
        rank, error = first_failure(error)
        return reason(error) if rank == 0 else f"rank {rank}: {reason(error)}"
    if isinstance(error, CheckpointError):
        return error.problem
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _by_address(plan: SavePlan, planner: SavePlanner) -> tuple[list[WriteItem], list[tuple[int, int]]]:
    """The items that hold bytes, and the whole pages (address, bytes) of each, in the order of their addresses."""
    found = []
    for item in plan.items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        if not tensor.numel():
            continue
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.data_ptr() % PAGE:
            raise ValueError(f"{item.index.fqn} was not staged: it begins at no page of host memory")
        found.append((tensor.data_ptr(), paged(tensor.nbytes), item))
    found.sort(key=lambda entry: entry[0])
    return [item for _, _, item in found], [(address, bytes) for address, bytes, _ in found]


def _in_parts(sizes: list[int], chunk_bytes: int) -> list[slice]:
    """Runs of about as many bytes, one per file, at most one per chunk."""
    total, done, bounds = sum(sizes), 0, [0]
    count = min(_FILES_PER_RANK, -(-total // chunk_bytes))
    for index, size in enumerate(sizes):
        done += size
        if done * count >= total * len(bounds):
            bounds.append(index + 1)
    return [slice(first, last) for first, last in pairwise(bounds)]


def _merged(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as fewest extents (address, bytes)."""
    merged: list[tuple[int, int]] = []
    for address, bytes in extents:
        if merged and sum(merged[-1]) == address:
            merged[-1] = (merged[-1][0], merged[-1][1] + bytes)
        else:
            merged.append((address, bytes))
    return merged


@functools.cache
def _versions() -> dict[str, str]:
    try:
        ours = version("opensora-fast")
    except PackageNotFoundError:
        ours = "not installed"
    return {"opensora-fast": ours, "torch": torch.__version__, "python": platform.python_version()}
