"""Whether a checkpoint is of the architecture that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from opensora_fast.errors import UserError


class ArchitectureError(UserError):
    """The checkpoint belongs to another architecture than the recipe."""


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
