"""Whether a checkpoint is of the architecture that a recipe asks for, and holds what its optimiser keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from opensora_fast.checkpoint_reader import CheckpointReader, MisfitError
from opensora_fast.errors import UserError


class ArchitectureError(UserError):
    """The checkpoint is whole, and does not belong to the recipe."""


def check_architecture(folder: Path, saved: dict, recipe: dict, architecture: Callable[[dict], dict]) -> None:
    """Raises ArchitectureError when the saved recipe and ours differ in what `architecture` picks from a recipe."""
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


def check_tensors(reader: CheckpointReader, tensors: dict[str, Tensor]) -> None:
    """Raises ArchitectureError when the checkpoint lacks a tensor, naming the setting that asks for it if known."""
    try:
        reader.check_fit(tensors)
    except MisfitError as error:
        averaged = any(name.startswith("ema.") for name in reader.manifest.tensors)
        if not averaged and any(name.startswith("ema.") for name in tensors):
            raise ArchitectureError(
                f"checkpoint {reader.step_folder} keeps no moving average: use --optimizer.ema_decay None, or name "
                "another --out"
            ) from error
        raise ArchitectureError(f"{error.problem}: name another --out") from error
