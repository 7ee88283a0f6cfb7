"""Checkpoints of a run: RUN/step-N/, published whole or not at all.

    RUN/recipe.json             the resolved recipe of the run
    RUN/LATEST                  name of the newest published checkpoint
    RUN/step-N/                 torch.distributed.checkpoint's files, with
    RUN/step-N/recipe.json      the recipe these weights belong to
    RUN/step-N/progress.json    step, loader state, skipped steps
    RUN/step-N.tmp-ID/          being written, or left by a save that did not finish: never read, removed by the next
    save

A save writes and syncs everything under the temporary name and then renames it; `LATEST` follows, and only then are old
ones pruned.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from opensora_fast.checkpoint_folder import STEP_FOLDER, read_tensors, reason, single_process, step_folders
from opensora_fast.errors import UserError


@dataclass(frozen=True)
class Restored:
    folder: Path
    progress: dict
    damaged: tuple[str, ...]  # newer checkpoints that could not be read: one line each


class RunFolder:
    """Where one run lives. Creates the folder; raises UserError where it cannot."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {path}: {error.strerror}: name a folder that can be written") from error

    def write_recipe(self, recipe: dict) -> None:
        _replace(self.path / "recipe.json", json.dumps(recipe, indent=2))

    def save(self, step: int, tensors: dict[str, Tensor], progress: dict, recipe: dict) -> Path:
        """Publish RUN/step-N. Raises UserError with the system's reason; what was there before stays as it was."""
        final = self.path / STEP_FOLDER.format(step)
        for unfinished in self.path.glob("step-*.tmp-*"):
            shutil.rmtree(unfinished)
        temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            temporary.mkdir()
            writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
            with single_process():
                dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
            _write_synced(temporary / "progress.json", json.dumps({**progress, "step": step}))
            _write_synced(temporary / "recipe.json", json.dumps(recipe, indent=2))
            _sync_folder(temporary)
            if final.exists():
                final.rename(final.with_name(f"{final.name}.tmp-replaced"))
            temporary.rename(final)
            _sync_folder(self.path)
            _replace(self.path / "LATEST", final.name)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not isinstance(error, (OSError, CheckpointException)):
                raise
            raise UserError(
                f"checkpoint {final}: not saved ({reason(error)}): free space, then run the same command to resume"
            ) from error
        for old in step_folders(self.path)[: -self.keep]:
            shutil.rmtree(old)
        return final

    def restore(
        self, tensors: dict[str, Tensor], recipe: dict, architecture: Callable[[dict], dict]
    ) -> Restored | None:
        """Fill `tensors` in place from the newest readable checkpoint; None when the run has none.

        `architecture` picks from a recipe what must be equal. Raises UserError when it is not, or when no checkpoint
        can be read.
        """
        damaged = []
        folders = step_folders(self.path)
        for folder in reversed(folders):
            try:
                saved = json.loads((folder / "recipe.json").read_text())
                progress = json.loads((folder / "progress.json").read_text())
                _check_architecture(folder, saved, json.loads(json.dumps(recipe)), architecture)
                read_tensors(folder, tensors)
            except ArchitectureError:
                raise
            except (UserError, OSError, json.JSONDecodeError, KeyError) as error:
                damaged.append(f"{folder}: {error}")
                continue
            for passed_over in folders[folders.index(folder) + 1 :]:  # or pruning would prefer them to good ones
                passed_over.rename(passed_over.with_name(f"{passed_over.name}.damaged-{uuid.uuid4().hex[:8]}"))
            return Restored(folder, progress, tuple(damaged))
        if damaged:
            raise UserError(f"no checkpoint of {self.path} can be read ({'; '.join(damaged)}): start over with --fresh")
        return None

    def clear(self) -> None:
        """Forget the run: its checkpoints, metrics and logs. Other files of the folder stay."""
        for folder in (*self.path.glob("step-*"), self.path / "tensorboard", self.path / "samples"):
            if folder.is_dir():
                shutil.rmtree(folder)
        for name in ("LATEST", "recipe.json", "metrics.jsonl"):
            (self.path / name).unlink(missing_ok=True)


class ArchitectureError(UserError):
    """The checkpoint belongs to another architecture than the recipe."""


def _check_architecture(folder: Path, saved: dict, recipe: dict, architecture: Callable[[dict], dict]) -> None:
    try:
        theirs, ours = architecture(saved), architecture(recipe)
    except KeyError as error:
        raise ArchitectureError(
            f"checkpoint {folder} is of another kind of run ({saved.get('name')}): name another --out"
        ) from error
    differing = [
        f"{key} is {theirs.get(key)}, the recipe says {value}"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if differing:
        raise ArchitectureError(
            f"checkpoint {folder} has another architecture ({'; '.join(differing)}): name another --out, or add --fresh"
        )


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    _write_synced(temporary, text)
    temporary.replace(path)
    _sync_folder(path.parent)
