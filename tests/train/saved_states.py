"""States that tests save and look for again, and what has to hold of a run folder, whatever happened to its writer.

A step's tensors are a function of the step alone, so that no one has to remember what was saved.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from opensora_fast.checkpoint_folder import step_folders
from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.errors import UserError
from opensora_fast.kernels import extension
from opensora_fast.train.checkpoint import RunFolder

C = extension.load().module
RECIPE = {"name": "test", "model": {"width": 4}}
CHUNK_BYTES = 4096
KEEP = 2


def tensors_of(step: int, width: int = 33) -> dict[str, Tensor]:
    """About 30 KiB: several chunks and dtypes, a scalar, an empty tensor, and one that is a page."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(70, width, generator=generator),
        "model.half": torch.randn(90, width, generator=generator).bfloat16(),
        "model.page": torch.randint(0, 256, (4096,), generator=generator, dtype=torch.uint8),
        "updates.count": torch.tensor(step, dtype=torch.int64),
        "model.empty": torch.zeros(0, 3),
        "first_moment.weight": torch.randn(70, width, generator=generator),
    }


def progress_of(step: int) -> dict:
    return {"step": step, "loader": {"next": 10 * step}}


def architecture(recipe: dict) -> dict:
    return recipe["model"]


class WithEngine:
    """A FileSystem that writes with this engine, whatever it is asked for."""

    def __init__(self, files, engine: str) -> None:
        self._files, self._engine = files, engine

    def __getattr__(self, name: str):
        return getattr(self._files, name)

    def write_images(self, images: list, **options):
        return self._files.write_images(images, **options, engine=self._engine)


def open_run(path: Path | str, script=None, *, engine: str = "auto", **options) -> RunFolder:
    """A run folder that is ready to save; `script` is a CallScript for its system calls."""
    files = WithEngine(C.FileSystem(script), engine)
    run = RunFolder(Path(path), **{"keep": KEEP, "chunk_bytes": CHUNK_BYTES, "files": files, **options})
    run.prepare(tensors_of(0))
    return run


def save(run: RunFolder, step: int) -> None:
    run.save(step, tensors_of(step), progress_of(step), RECIPE)


def save_steps(run: str, groups: list[list[int]], acknowledgements: str = "", script: dict | None = None, **options):
    """Save each group's steps, wait for them, and only then append the last one to the file `acknowledgements`."""
    folder = open_run(run, None if script is None else C.CallScript(**script), **options)
    folder.write_recipe(RECIPE)
    for group in groups:
        for step in group:
            save(folder, step)
        folder.wait()
        if acknowledgements:
            acknowledge(acknowledgements, group[-1])
    folder.close()


def acknowledge(path: str, step: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{step}\n".encode())
    os.close(descriptor)


def acknowledged(path: Path) -> int:
    """The last step that was acknowledged; 0 for none."""
    return int(path.read_text().split()[-1]) if path.exists() else 0


def difference(some: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of `some` tensors that are not bitwise the expected ones."""
    return [
        name
        for name, tensor in some.items()
        if not torch.equal(expected[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    ]


def broken(path: Path, acknowledged: int) -> list[str]:
    """What does not hold of a run folder whose writer was cut off after it had acknowledged that step; [] if all does.

    Every published checkpoint verifies; LATEST, which is there once a save was acknowledged, names one of them, not an
    older one than that step; resume takes it or a newer one, and its tensors and progress are those of its step.
    """
    found = []
    folders = step_folders(path) if path.exists() else []
    for folder in folders:
        try:
            found += [f"{folder.name} does not verify: {line}" for line in CheckpointReader(folder).verify(None)]
        except UserError as error:
            found.append(f"{folder.name} cannot be opened: {error}")
    latest = path / "LATEST"
    if latest.exists():
        named = latest.read_text().strip()
        if named not in [folder.name for folder in folders]:
            found.append(f"LATEST names {named!r}, which is not published")
        elif int(named.removeprefix("step-")) < acknowledged:
            found.append(f"LATEST names {named}, step {acknowledged} was acknowledged")
    elif acknowledged:
        found.append("LATEST is gone")
    return found + _wrong_resume(path, acknowledged)


def _wrong_resume(path: Path, acknowledged: int) -> list[str]:
    tensors = tensors_of(-1)
    run = RunFolder(path, keep=KEEP)
    try:
        restored = run.restore(tensors, RECIPE, architecture)
    except UserError as error:
        return [f"resume fails: {error}"]
    finally:
        run.close()
    if restored is None:
        return [f"resume finds nothing, step {acknowledged} was acknowledged"] if acknowledged else []
    step = restored.progress["step"]
    found = [f"resume passed over {line}" for line in restored.damaged]
    if step < acknowledged:
        found.append(f"resume takes step {step}, step {acknowledged} was acknowledged")
    if restored.folder.name != f"step-{step}" or restored.progress != progress_of(step):
        found.append(f"resume takes {restored.folder.name} with the progress {restored.progress}")
    found += [f"resume's {name} is not that of step {step}" for name in difference(tensors, tensors_of(step))]
    return found
