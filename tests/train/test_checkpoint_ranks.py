"""Checkpoints of several ranks, each a process: shards of DTensors, saved on some ranks and loaded on others."""

import errno
import functools
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.errors import UserError
from opensora_fast.kernels import extension
from opensora_fast.manifest import read_manifest
from opensora_fast.train.checkpoint import RunFolder

FILE = "train/test_checkpoint_ranks.py"
RECIPE = {"name": "ranks", "model": {"width": 4}}
PLACEMENTS = {
    "rows": [Shard(0)],
    "columns": [Shard(1)],
    "uneven": [Shard(0)],  # 5 rows: on four ranks one has none
    "replicated": [Replicate()],
}
SIZES = {"rows": (70, 33), "columns": (9, 60), "uneven": (5, 1000), "replicated": (40, 40), "plain": (33, 7)}


def whole(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


@functools.cache
def own_group() -> dist.ProcessGroup:
    """A CPU group for nothing but saves."""
    return dist.new_group(backend="gloo")


@functools.cache
def mesh() -> DeviceMesh:
    return DeviceMesh("cpu", list(range(dist.get_world_size())))


def sharded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: distribute_tensor(tensor, mesh(), PLACEMENTS[name]) if name in PLACEMENTS else tensor
        for name, tensor in tensors.items()
    }


def open_run(path: str, **options: object) -> RunFolder:
    return RunFolder(Path(path), 3, group=own_group(), chunk_bytes=4096, say=lambda line: None, **options)


def save(path: str, steps: list[int]) -> str:
    """Save on every rank; later changes of the shards are not in it."""
    torch.manual_seed(100 + dist.get_rank())
    with closing(open_run(path)) as run:
        for step in steps:
            state = sharded(whole(step))
            run.save(step, state, {"loader": step}, RECIPE)
            for tensor in state.values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(-1)
        return run.wait().name


def load(path: str) -> tuple[dict[str, Tensor], int, tuple[str, ...], float]:
    """What each rank gets: whole tensors, step, what was passed over, its next random number."""
    state = sharded({name: torch.full(size, 7.0) for name, size in SIZES.items()})
    with closing(open_run(path)) as run:
        restored = run.restore(state, RECIPE, lambda recipe: recipe["model"])
    drawn = torch.rand(()).item()
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
    return full, restored.progress["step"], restored.damaged, drawn


def check(answers: list, step: int) -> None:
    expected = whole(step)
    for found, restored_step, *_ in answers:
        assert restored_step == step
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2 of four ranks."""
    path = tmp_path_factory.mktemp("saved") / "run"
    assert ranks(4).run(f"{FILE}:save", str(path), [1, 2]) == ["step-2"] * 4
    return path


def test_each_rank_writes_its_shards_and_replicas_are_written_once(saved: Path) -> None:
    manifest = read_manifest(saved / "step-2")
    assert manifest.world == {"ranks": 4}
    assert {file.name.split("-")[1] for file in manifest.files} == {"0", "1", "2", "3"}
    assert len(manifest.tensors["rows"].pieces) == 4
    assert sorted(piece.sizes[0] for piece in manifest.tensors["uneven"].pieces) == [1, 2, 2]
    for name in ("replicated", "plain"):
        assert len(manifest.tensors[name].pieces) == 1
    assert CheckpointReader(saved / "step-2").verify() == []


def test_one_process_reads_all_of_it(saved: Path) -> None:
    tensors = {name: torch.zeros(size) for name, size in SIZES.items()}
    with closing(RunFolder(saved, 3)) as run:
        assert run.restore(tensors, RECIPE, lambda recipe: recipe["model"])
    for name, tensor in whole(2).items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_loads_it(ranks, saved: Path, size: int) -> None:
    answers = ranks(size).run(f"{FILE}:load", str(saved))
    check(answers, 2)
    for rank, (*_, drawn) in enumerate(answers):  # each rank has its own generator back
        torch.manual_seed(100 + rank)
        assert drawn == torch.rand(()).item()


def test_more_ranks_load_what_fewer_saved(ranks, tmp_path: Path) -> None:
    ranks(2).run(f"{FILE}:save", str(tmp_path), [3])
    check(ranks(4).run(f"{FILE}:load", str(tmp_path)), 3)


def test_all_ranks_pass_over_what_one_cannot_read(ranks, tmp_path: Path) -> None:
    ranks(3).run(f"{FILE}:save", str(tmp_path), [1, 2])
    data = tmp_path / "step-2" / "rank-2-1.bin"
    content = bytearray(data.read_bytes())
    content[1] ^= 1
    data.write_bytes(content)
    answers = ranks(3).run(f"{FILE}:load", str(tmp_path))
    check(answers, 1)
    for _, _, damaged, _ in answers:
        assert len(damaged) == 1
        assert "rank-2-1.bin: bytes 0 to 4096" in damaged[0]
    assert (tmp_path / "LATEST").read_text() == "step-1"


def load_with_widths(path: str, widths: list[int]) -> str:
    """What restoring raises on each rank, whose recipe has this width."""
    state = sharded({name: torch.full(size, 7.0) for name, size in SIZES.items()})
    recipe = {"name": "ranks", "model": {"width": widths[dist.get_rank()]}}
    with closing(open_run(path)) as run, pytest.raises(UserError) as raised:
        run.restore(state, recipe, lambda recipe: recipe["model"])
    return str(raised.value)


def test_all_ranks_stop_where_one_has_to(ranks, tmp_path: Path) -> None:
    """Also where another one finds the checkpoint damaged."""
    ranks(3).run(f"{FILE}:save", str(tmp_path), [1, 2])
    for answer in ranks(3).run(f"{FILE}:load_with_widths", str(tmp_path), [4, 8, 4]):
        assert "step-2 has another architecture (width is 4, the recipe says 8)" in answer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-1", "step-2"]


def change_layout(path: str) -> str:
    """Rank 1 alone has another tensor in its second save, and not any more in its third."""
    with closing(open_run(path)) as run:
        for step in (1, 2, 3):
            state = sharded(whole(step))
            if step == 2 and dist.get_rank() == 1:
                state["more"] = torch.full((3000,), 5.0)
            run.save(step, state, {"loader": step}, RECIPE)
        return run.wait().name


def test_a_rank_whose_layout_changes_plans_anew(ranks, tmp_path: Path) -> None:
    ranks(3).run(f"{FILE}:change_layout", str(tmp_path))
    for step in (1, 2, 3):
        reader = CheckpointReader(tmp_path / f"step-{step}")
        assert ("more" in reader.manifest.tensors) == (step == 2)
        tensors = {name: torch.zeros(size) for name, size in SIZES.items()}
        reader.read(tensors)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in whole(step).items())
    more = {"more": torch.zeros(3000)}
    CheckpointReader(tmp_path / "step-2").read(more)
    assert more["more"].eq(5).all()


def fail(path: str, failing: int, call: str, error: int) -> tuple[list[str], str]:
    """Step 1 well, step 2 with a rank whose `call` fails, step 3 well; what was raised, and the last step."""
    files = Failing(call, error) if dist.get_rank() == failing else None
    raised = []
    with closing(open_run(path, files=files)) as run:
        for step in (1, 2, 3):
            if files is not None:
                files.armed = step == 2
            run.save(step, sharded(whole(step)), {"loader": step}, RECIPE)
            try:
                newest = run.wait()
            except UserError as error:
                raised.append(str(error))
                dist.barrier(own_group())  # what is left of it has gone
                if dist.get_rank() == 0:
                    assert sorted(p.name for p in run.path.iterdir()) == ["LATEST", "step-1"], step
                dist.barrier(own_group())
        return raised, newest.name


class Failing:
    """A file system one of whose calls fails, from its end."""

    def __init__(self, call: str, error: int) -> None:
        self.files = extension.load().module.FileSystem()
        self.call, self.error, self.armed = call, error, False

    def __getattr__(self, name: str) -> Callable:
        def call(*args: object, **options: object) -> object:
            if self.armed and name == self.call:
                raise OSError(self.error, "Input/output error", "rank file")
            return getattr(self.files, name)(*args, **options)

        return call


@pytest.mark.parametrize(("failing", "call"), [(0, "make_folder"), (2, "write_images"), (0, "write_file")])
def test_what_fails_on_one_rank_fails_the_save_on_all(ranks, tmp_path: Path, failing: int, call: str) -> None:
    answers = ranks(3).run(f"{FILE}:fail", str(tmp_path), failing, call, errno.EIO)
    for raised, newest in answers:
        assert newest == "step-3"
        assert len(raised) == 1
        assert "step-2: not saved" in raised[0]
        assert "Input/output error" in raised[0]
        assert ("rank 2: " in raised[0]) == (failing == 2)
    check(ranks(3).run(f"{FILE}:load", str(tmp_path)), 3)
