"""What resume finds after a power loss, and that every fsync of the protocol is needed for it.

A run is recorded call by call. A cut is a number of calls that were made before the power went; what the disk then
holds comes from `disk_model`, many ways for each cut.
"""

import errno
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from opensora_fast.errors import UserError

spec = importlib.util.spec_from_file_location("crash_host", Path(__file__).with_name("crash_host.py"))
crash_host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(crash_host)
disk_model = crash_host.load("disk_model.py")
states = crash_host.load("saved_states.py")

# The last of each group is acknowledged before the next group begins. A step that is saved again stands for a run that
# was resumed from an older one; two in one group are in flight together.
GROUPS = [[1], [2], [3, 4], [4], [5, 6]]

# Each fsync by what it is for, in the order of a save; the step folder's own name needs none but the one that follows
# its publishing, and what pruning leaves behind is removed by the next save.
ROLES = (
    "the run's name",
    "recipe",
    "recipe's name",
    "data",
    "manifest",
    "names in the step folder",
    "published name",
    "LATEST",
    "LATEST's name",
    "pruned name",
)


@dataclass(frozen=True)
class Recording:
    run: Path
    calls: list[tuple]
    recipe: int  # calls made when write_recipe had returned
    acknowledgements: list[tuple[int, int]]  # (calls made, step that is safe from then on)

    def acknowledged(self, cut: int) -> int:
        return max([step for made, step in self.acknowledgements if made <= cut], default=0)

    def without(self, index: int) -> "Recording":
        """The same run by a writer that left out that call."""
        return Recording(
            self.run,
            self.calls[:index] + self.calls[index + 1 :],
            self.recipe - (index < self.recipe),
            [(made - (index < made), step) for made, step in self.acknowledgements],
        )


def _record(root: Path, keep: int) -> Recording:
    script = states.C.CallScript(record=True)
    run = states.open_run(root / "run", script, keep=keep)
    run.write_recipe(states.RECIPE)
    recipe = len(script.calls())
    acknowledgements = []
    for group in GROUPS:
        for step in group:
            states.save(run, step)
        run.wait()
        acknowledgements.append((len(script.calls()), group[-1]))
    run.close()
    return Recording(root / "run", script.calls(), recipe, acknowledgements)


@pytest.fixture(scope="module", params=[1, 2], ids=["keep_1", "keep_2"])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return _record(tmp_path_factory.mktemp("recorded"), request.param)


@pytest.fixture(scope="module")
def last_only(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Of a run that keeps one checkpoint, so that nothing is left to make up for a mistake."""
    return _record(tmp_path_factory.mktemp("last_only"), 1)


def _after(recording: Recording, cut: int, seed: int) -> dict:
    """What the disk may hold after a power loss at that cut."""
    disk = disk_model.Disk(recording.run.parent).replay(recording.calls[:cut])
    return disk.tree_after_power_loss(random.Random(seed))


def _broken(recording: Recording, cut: int, disk: dict, folder: Path) -> list[str]:
    """What does not hold when the power went at that cut and left that. `folder` is made."""
    folder.mkdir(parents=True)
    if "run" not in disk:
        return ["the run is gone"] if cut >= recording.recipe else []
    disk_model.write_tree(disk["run"], folder / "run")
    found = []
    recipe = folder / "run" / "recipe.json"
    if cut >= recording.recipe and not recipe.exists():
        found.append("recipe.json is gone")
    if recipe.exists() and not recipe.read_bytes().endswith(b"}"):
        found.append("recipe.json is not whole")
    return found + states.broken(folder / "run", recording.acknowledged(cut))


def _roles(recording: Recording) -> dict[int, str]:
    """What each fsync of the recording is for, by its number."""
    roles, last = {}, ("", "")  # the last change of an entry of the run or of a folder above it
    for number, (kind, path, *rest) in enumerate(recording.calls):
        name, parent = Path(path).name, Path(path).parent
        if kind in ("rename", "mkdir") and recording.run.is_relative_to(parent):
            last = (kind, path, *rest)
        if kind == "sync" and parent == recording.run:
            roles[number] = "LATEST" if name.startswith("LATEST") else "recipe" if name.startswith("recipe") else path
        elif kind == "sync":
            roles[number] = "manifest" if name.startswith("manifest.json") else "data"
        elif kind == "sync_folder" and parent == recording.run:
            roles[number] = "names in the step folder"
        elif kind == "sync_folder" and last[0] == "mkdir":
            roles[number] = "the run's name" if Path(path) == recording.run.parent else path
        elif kind == "sync_folder":
            renamed, new = Path(last[1]).name, Path(last[-1]).name
            if new in ("LATEST", "recipe.json"):
                roles[number] = {"LATEST": "LATEST's name", "recipe.json": "recipe's name"}[new]
            else:
                roles[number] = "published name" if ".tmp-" in renamed else "pruned name"
    return roles


def test_the_model_ends_with_what_the_disk_holds(recording: Recording) -> None:
    disk = disk_model.Disk(recording.run.parent).replay(recording.calls)
    assert disk.tree() == disk_model.read_tree(recording.run.parent)


def test_every_fsync_has_a_known_purpose_and_none_is_missing(recording: Recording) -> None:
    assert set(_roles(recording).values()) == set(ROLES)


@pytest.mark.parametrize("cuts", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_resume_takes_a_whole_checkpoint_after_a_power_loss(recording: Recording, tmp_path: Path, cuts: int) -> None:
    choice = random.Random(cuts)
    for number in range(cuts):
        cut, seed = choice.randrange(len(recording.calls) + 1), choice.randrange(2**32)
        found = _broken(recording, cut, _after(recording, cut, seed), tmp_path / str(number))
        assert not found, f"power loss after {cut} calls, seed {seed}: {found}"


@pytest.mark.parametrize("cuts", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_goes_on_after_a_power_loss_and_leaves_nothing_unfinished(
    recording: Recording, tmp_path: Path, cuts: int
) -> None:
    choice = random.Random(cuts)
    for number in range(cuts):
        cut, seed = choice.randrange(len(recording.calls) + 1), choice.randrange(2**32)
        folder = tmp_path / str(number)
        assert not _broken(recording, cut, _after(recording, cut, seed), folder)
        states.save_steps(str(folder / "run"), [[7], [8]])
        assert not states.broken(folder / "run", 8)
        names = {path.name for path in (folder / "run").iterdir()}
        assert names == {"recipe.json", "LATEST", "step-7", "step-8"}, f"after {cut} calls, seed {seed}"


def _killed_then_resumed(root: Path, keep: int, at: int) -> Recording:
    """Calls of a process that was killed, and of the next one: what the first left un-synced is still in memory."""
    root.mkdir()
    first = states.C.CallScript(record=True, at=at, action="fail", error=errno.EIO, times=10**6)  # dead from there on
    acknowledgements, told = [], []
    try:
        run = states.open_run(root / "run", first, keep=keep, say=told.append)
        run.write_recipe(states.RECIPE)
        for step in (1, 2, 2, 3, 4):
            states.save(run, step)
            run.wait()
            if told:  # what was pruned could not be removed
                break
            acknowledgements.append((len(first.calls()), step))
    except UserError:
        pass

    calls, second = first.calls(), states.C.CallScript(record=True)
    run = states.open_run(root / "run", second, keep=keep)
    restored = run.restore(states.tensors_of(-1), states.RECIPE, states.architecture)
    step = restored.progress["step"] if restored else 1
    for number in (step, step + 1, step + 2):
        states.save(run, number)
        run.wait()
        acknowledgements.append((len(calls) + len(second.calls()), number))
    run.close()
    return Recording(root / "run", calls + second.calls(), 10**6, acknowledgements)


@pytest.mark.parametrize(("runs", "cuts"), [(3, 10), pytest.param(60, 20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("keep", [1, 2])
def test_resume_takes_a_whole_checkpoint_after_a_kill_and_a_power_loss(
    tmp_path: Path, keep: int, runs: int, cuts: int
) -> None:
    choice = random.Random(runs)
    for number in range(runs):
        at = choice.randrange(8, 200)
        recording = _killed_then_resumed(tmp_path / f"recorded-{number}", keep, at)
        for again in range(cuts):
            cut, seed = choice.randrange(len(recording.calls) + 1), choice.randrange(2**32)
            found = _broken(recording, cut, _after(recording, cut, seed), tmp_path / f"{number}-{again}")
            assert not found, f"killed at call {at}, power loss after {cut} calls, seed {seed}: {found}"


def test_a_name_that_a_killed_process_took_away_is_synced_before_its_files_are_removed(
    last_only: Recording, tmp_path: Path
) -> None:
    pruned = next(number for number, role in _roles(last_only).items() if role == "pruned name")
    recording = _killed_then_resumed(tmp_path / "recorded", 1, pruned)
    kind, old, new = recording.calls[pruned - 1]
    assert (kind, Path(old).name, Path(new).name[:11]) == ("rename", "step-1", "step-1.tmp-")
    synced = recording.calls.index(("sync_folder", str(recording.run)), pruned)
    assert _breaks(recording, synced, tmp_path)


@pytest.mark.parametrize("removals", [1, pytest.param(1000, marks=pytest.mark.slow)], ids=["one", "each"])
@pytest.mark.parametrize("role", ROLES)
def test_without_any_one_fsync_a_power_loss_breaks_the_run(
    last_only: Recording, tmp_path: Path, role: str, removals: int
) -> None:
    numbers = [
        number
        for number, its_role in _roles(last_only).items()
        if its_role == role and not _changes_nothing(last_only, number)
    ]
    for number in random.Random(0).sample(numbers, min(removals, len(numbers))):
        assert _breaks(last_only, number, tmp_path / str(number)), f"nothing breaks without {last_only.calls[number]}"


def _changes_nothing(recording: Recording, number: int) -> bool:
    """Whether it syncs LATEST's name where that has named the same step since before: when a step is saved again.

    Needed all the same, for the first time it may have been a run that was killed before that sync.
    """
    if _roles(recording)[number] != "LATEST's name":
        return False
    trees = (disk_model.Disk(recording.run.parent).replay(recording.calls[:cut]).tree() for cut in (number - 1, number))
    before, after = (tree["run"].get("LATEST") for tree in trees)
    return before == after


def _breaks(recording: Recording, number: int, folder: Path) -> bool:
    """Whether some power loss breaks the run without that fsync."""
    faulty, seen = recording.without(number), set()
    same = [later for later in range(number + 1, len(recording.calls)) if _covers(recording, later, number)]
    cuts = range(number, same[0] if same else len(faulty.calls) + 1)  # the next of the same path makes up for it
    for seed in range(2000):
        cut = random.Random(seed).choice(cuts)
        disk = _after(faulty, cut, seed)
        outcome = (faulty.acknowledged(cut), repr(disk))
        if outcome not in seen and _broken(faulty, cut, disk, folder / str(seed)):
            return True
        seen.add(outcome)
    return False


def _covers(recording: Recording, later: int, number: int) -> bool:
    return recording.calls[later][:2] == recording.calls[number][:2]
