"""Checkpoints of a run: RUN/step-N/, published whole or not at all, by a thread that the trainer does not wait for.

    RUN/recipe.json             the resolved recipe of the run
    RUN/LATEST                  name of the newest published checkpoint
    RUN/step-N/                 manifest.json and data files; see `opensora_fast.manifest`
    RUN/NAME.tmp-ID             being written or removed, or left so: never read, removed by the next save
    RUN/step-N.damaged-ID       passed over by a resumed run

`save` copies the state (`staging`) and returns. Planning, writing, publishing and pruning (`checkpoint_writer`) happen
in one thread (`save_queue`), in the order of the saves. What fails there is kept, and raised by the trainer's next
`check` or `wait`; the checkpoints before it stay as they are.

Saved with the tensors, after them, are the global random generators of each rank (`random_state`); they are given back
last.
"""

from __future__ import annotations

import json
import threading
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from opensora_fast.checkpoint_folder import step_folders
from opensora_fast.checkpoint_reader import CheckpointReader, FileSystem, VerifiedReader
from opensora_fast.errors import UserError
from opensora_fast.manifest import DamagedError
from opensora_fast.native import native
from opensora_fast.train import random_state
from opensora_fast.train.architecture import check_architecture, check_tensors
from opensora_fast.train.checkpoint_writer import (
    ImageWriter,
    PublishingError,
    discard,
    first_failure,
    make_folders,
    reason,
    remove_folder,
    replace_file,
)
from opensora_fast.train.save_planner import SavePlanner
from opensora_fast.train.save_queue import SaveQueue
from opensora_fast.train.staging import Staged, Stager

CHUNK_BYTES = 16 * 2**20
OnFailure = Literal["stop", "go_on"]
_Value = TypeVar("_Value")

# dcp.save would say it each time. For the process, because all its threads share the filters.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


@dataclass(frozen=True)
class Restored:
    folder: Path
    progress: dict
    damaged: tuple[str, ...]  # newer checkpoints that are: one line each


class _Failure(NamedTuple):
    """Of a save."""

    line: str
    remedy: str  # or nothing, where the line has to do

    def __str__(self) -> str:
        return f"{self.line}: {self.remedy}" if self.remedy else self.line

    def ends_the_run(self) -> UserError:
        return UserError(f"{self}{', then' if self.remedy else ':'} run the same command to resume")


class RunFolder:
    """Where one run lives. Creates the folder; raises UserError where it cannot.

    keep: how many checkpoints stay.  on_failure: whether `check` raises when a save has failed, or says so and goes on.
    group: the ranks that save together, on the CPU and for nothing else; None: this process alone, without DTensors.
    files: the file system's calls.  say: gets the lines that the run should know.
    Each of its methods is for the trainer's thread; `save`, `restore`, `clear` and `wait` are called by all ranks.
    """

    def __init__(
        self,
        path: Path,
        keep: int,
        *,
        on_failure: OnFailure = "stop",
        chunk_bytes: int = CHUNK_BYTES,
        group: dist.ProcessGroup | None = None,
        files: FileSystem | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.path = path
        self.keep = keep
        self._on_failure, self._chunk_bytes, self._group, self._say = on_failure, chunk_bytes, group, say
        self._files: FileSystem = files or native().FileSystem()
        self._rank = dist.get_rank(group) if group is not None else 0
        self._ranks = dist.get_world_size(group) if group is not None else 1
        self._stager: Stager | None = None
        self._planner = SavePlanner()
        self._queue = SaveQueue("checkpoints")
        self._lock = threading.Lock()
        self._published: Path | None = None
        self._failure: _Failure | None = None  # the first that was not told yet
        self._saved_since = False  # that failure
        self._lines: deque[str] = deque()  # to be said in the trainer's thread
        self._said: set[str] = set()
        try:
            if self._rank == 0:
                make_folders(self._files, path)
        except OSError as error:
            raise UserError(f"--out {path}: {reason(error)}: name a folder that can be written") from error

    def write_recipe(self, recipe: dict) -> None:
        """RUN/recipe.json. Raises UserError when it cannot be written."""
        if self._rank == 0:
            with self._changing("recipe.json") as path:
                replace_file(self._files, path, _json(recipe))

    def prepare(self, tensors: dict[str, Tensor]) -> None:
        """Take the memory that saves of this state are staged in. Raises UserError when it cannot be had."""
        state = {**tensors, **random_state.capture(self._rank)}
        if self._stager is None:
            on_device = [tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"]
            self._stager = Stager(on_device[0] if on_device else torch.device("cpu"))
        self._stager.prepare(state)

    def save(self, step: int, tensors: dict[str, Tensor], progress: dict, recipe: dict) -> None:
        """Begin to publish RUN/step-N; returns when the state may change again, after `order_update` on a device.

        Waits, and says so, while two earlier saves are being written. Errors of writing come from `check` and `wait`.
        """
        if self._stager is None:
            self.prepare(tensors)
        assert self._stager is not None
        self._say_lines()
        if self._stager.busy:
            self._say(f"checkpoint of step {step}: waits, for two saves before it are still being written")
        staged = self._stager.stage({**tensors, **random_state.capture(self._rank)})
        writer = ImageWriter(
            self.path,
            step,
            files=self._files,
            chunk_bytes=self._chunk_bytes,
            keep=self.keep,
            progress=json.loads(_json(progress)),
            recipe=json.loads(_json(recipe)),
            rank=self._rank,
            ranks=self._ranks,
            ready=staged.wait,
            say=self._say_once_later,
        )
        try:
            self._queue.submit(partial(self._publish, writer, staged))
        except RuntimeError as error:  # no thread
            self._failed(writer.final, error)
            staged.release()

    def order_update(self) -> None:
        """Keep the optimiser's next step, on the current stream, behind the copies of the last save."""
        if self._stager is not None:
            self._stager.order_update()

    def check(self) -> None:
        """Tell what happened to earlier saves. Raises UserError once when one has failed, unless training goes on."""
        self._say_lines()
        failure, _ = self._take_failure()
        if failure is None:
            return
        if self._on_failure == "stop":
            raise failure.ends_the_run()
        self._say(f"{failure}; training goes on")

    def wait(self) -> Path | None:
        """Return when every save is published or has failed: the newest checkpoint that this run has published.

        Raises UserError when a save has failed that `check` did not tell of; when a later one has not, it says so.
        """
        self._queue.join()
        self._say_lines()
        failure, saved_since = self._take_failure()
        if failure is not None:
            if not saved_since:
                raise failure.ends_the_run()
            self._say(_made_up_for(failure))
        return self._published

    def close(self) -> None:
        """Wait for the saves, and give the memory back. A failure that nobody was told of is said."""
        if self._queue.working:
            self._say(f"{self.path}: waits for a checkpoint that is being written")
        self._queue.join()
        self._say_lines()
        failure, saved_since = self._take_failure()
        if failure is not None:
            self._say(_made_up_for(failure) if saved_since else str(failure))
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def restore(
        self, tensors: dict[str, Tensor], recipe: dict, architecture: Callable[[dict], dict]
    ) -> Restored | None:
        """Fill `tensors` in place from the newest checkpoint that verifies; None when the run has none.

        One that is damaged is passed over. `architecture` picks from a recipe what must be equal. Raises UserError when
        it is not, when the checkpoint has not these tensors, when a newer version has written it, when it cannot be
        read now for another reason than damage, or when all are damaged: no work is given up for these. One process
        checks every byte, several ranks those that any of them needs.
        """
        self._queue.join()
        damaged = []
        folders = self._from_first(step_folders(self.path))
        for folder in reversed(folders):
            progress, problem = self._read(folder, tensors, recipe, architecture)
            if problem is not None:
                damaged.append(problem)
                continue
            newer = folders[folders.index(folder) + 1 :]
            if self._rank == 0 and newer:  # or pruning would prefer them to good ones
                with self._changing("LATEST") as latest:
                    replace_file(self._files, latest, folder.name.encode())
                for passed_over in newer:
                    self._set_aside(passed_over)
            return Restored(folder, progress, tuple(damaged))
        if damaged:
            raise UserError(f"no checkpoint of {self.path} can be read ({'; '.join(damaged)}): start over with --fresh")
        return None

    def clear(self) -> None:
        """Forget the run: its checkpoints, metrics and logs. Other files of the folder stay. Raises UserError."""
        self._queue.join()
        if self._rank == 0:
            self._forget()

    def _publish(self, writer: ImageWriter, staged: Staged) -> None:
        try:
            dcp.save(
                {SavePlanner.STATE: staged},
                storage_writer=writer,
                planner=self._planner,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except BaseException as error:
            self._failed(writer.final, error)
            self._planner.forget()
            writer.abandon()
        else:
            with self._lock:
                self._published, self._saved_since = writer.final, True
                if self._failure is not None and self._on_failure == "go_on":
                    self._lines.append(_made_up_for(self._failure))
                    self._failure = None
        finally:
            self._planner.release()
            staged.release()

    def _failed(self, final: Path, error: BaseException) -> None:
        """Keep what happened to the save of that step."""
        cause = first_failure(error)[1] if isinstance(error, CheckpointException) else error
        published = isinstance(cause, PublishingError)
        what = "published, but LATEST may not name it" if published else "not saved"
        remedy = "free space or mend the disk" if isinstance(cause, OSError) else ""
        with self._lock:
            if published:
                self._published = final
            if self._failure is None or self._saved_since:
                self._failure = _Failure(f"checkpoint {final}: {what} ({reason(error)})", remedy)
                self._saved_since = False

    def _take_failure(self) -> tuple[_Failure | None, bool]:
        """What was not told yet, and whether a later save has succeeded."""
        with self._lock:
            failure, self._failure = self._failure, None
            return failure, self._saved_since

    def _say_once_later(self, line: str) -> None:
        with self._lock:
            if line not in self._said:
                self._said.add(line)
                self._lines.append(line)

    def _say_lines(self) -> None:
        while self._lines:
            self._say(self._lines.popleft())

    def _read(
        self, folder: Path, tensors: dict[str, Tensor], recipe: dict, architecture: Callable[[dict], dict]
    ) -> tuple[dict, str | None]:
        """The progress of a checkpoint that was read into `tensors`, or a line that says how it is damaged.

        All ranks agree on it. Raises on all of them what keeps one from reading it and is no damage: going back to an
        older one for that would lose work.
        """
        progress: dict = {}
        problem: UserError | None = None
        state = dict(tensors)
        try:
            reader = CheckpointReader(folder, files=self._files)
            check_architecture(folder, reader.manifest.recipe, json.loads(_json(recipe)), architecture)
            check_tensors(reader, tensors)
            progress, stored = reader.manifest.progress, reader.manifest.tensors
            for name, tensor in random_state.capture(self._rank).items():
                if name in stored and stored[name].shape == tensor.shape:
                    state[name] = tensor
            if self._group is None:
                reader.read(state, whole=True)
        except UserError as error:
            problem = error
        problems: list[BaseException] = self._of_all(problem)
        if not problems and self._group is not None:
            try:
                dcp.load(state, storage_reader=VerifiedReader(reader), process_group=self._group)
            except CheckpointException as error:
                problems = [failure for failure, _ in error.failures.values()]
        for found in problems:
            if not isinstance(found, DamagedError):
                raise found
        if problems:
            return progress, reason(problems[0])
        generators = {name: tensor for name, tensor in state.items() if name not in tensors}
        random_state.restore(generators, self._rank)
        return progress, None

    def _from_first(self, value: _Value) -> _Value:
        """Rank 0's value."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=dist.get_global_rank(self._group, 0), group=self._group)
        return values[0]

    def _of_all(self, problem: UserError | None) -> list[BaseException]:
        """The problems of all ranks that have one."""
        problems = [problem] * self._ranks
        if self._group is not None:
            dist.all_gather_object(problems, problem, group=self._group)
        return [found for found in problems if found is not None]

    @contextmanager
    def _changing(self, name: str) -> Iterator[Path]:
        path = self.path / name
        try:
            yield path
        except OSError as error:
            raise UserError(f"{path}: cannot be changed ({reason(error)}): mend that, then run again") from error

    def _set_aside(self, folder: Path) -> None:
        with self._changing(folder.name):
            self._files.rename(str(folder), str(folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex[:8]}")))
            self._files.sync_folder(str(folder.parent))

    def _forget(self) -> None:
        with self._changing("LATEST") as latest:
            if latest.exists():
                self._files.remove_file(str(latest))
                self._files.sync_folder(str(self.path))
        with self._changing("step-*"):
            discard(self._files, step_folders(self.path))
            for folder in (*self.path.glob("step-*"), self.path / "tensorboard", self.path / "samples"):
                remove_folder(self._files, folder)
        for name in ("recipe.json", "metrics.jsonl"):
            with self._changing(name) as path:
                if path.exists():
                    self._files.remove_file(str(path))


def _made_up_for(failure: _Failure) -> str:
    return f"{failure}; a later one is saved"


def _json(values: dict) -> bytes:
    return json.dumps(values, indent=2).encode()
