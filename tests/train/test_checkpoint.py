import errno
import json
from pathlib import Path

import pytest
import torch

from opensora_fast.errors import UserError
from opensora_fast.train import checkpoint
from opensora_fast.train.checkpoint import RunFolder

RECIPE = {"name": "test", "model": {"width": 4}}


def _tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((3, 4), value), "updates.weight": torch.tensor(value)}


def _architecture(recipe: dict) -> dict:
    return recipe["model"]


def _restore(run: RunFolder) -> tuple[dict[str, torch.Tensor], checkpoint.Restored | None]:
    tensors = _tensors(-1.0)
    return tensors, run.restore(tensors, RECIPE, _architecture)


def test_saved_state_comes_back_with_its_progress(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", keep=2)
    assert _restore(run)[1] is None
    folder = run.save(7, _tensors(0.25), {"loader": {"epoch": 1}}, RECIPE)
    tensors, restored = _restore(run)
    assert restored is not None
    assert restored.folder == folder
    assert restored.progress == {"loader": {"epoch": 1}, "step": 7}
    assert all(torch.equal(tensors[name], value) for name, value in _tensors(0.25).items())
    assert (run.path / "LATEST").read_text() == "step-7"


def test_only_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, keep=2)
    for step in (9, 10, 100):
        run.save(step, _tensors(step), {}, RECIPE)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-10", "step-100"]


@pytest.mark.parametrize("damage", ["truncate", "no_metadata", "no_progress"])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    run = RunFolder(tmp_path, keep=3)
    run.save(1, _tensors(1.0), {}, RECIPE)
    newest = run.save(2, _tensors(2.0), {}, RECIPE)
    if damage == "truncate":
        data = next(newest.glob("*.distcp"))
        data.write_bytes(data.read_bytes()[:40])
    else:
        (newest / {"no_metadata": ".metadata", "no_progress": "progress.json"}[damage]).unlink()
    tensors, restored = _restore(run)
    assert restored is not None
    assert restored.progress["step"] == 1
    assert torch.equal(tensors["model.weight"], _tensors(1.0)["model.weight"])
    assert len(restored.damaged) == 1
    assert str(newest) in restored.damaged[0]


def test_nothing_readable_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, keep=3)
    (run.save(1, _tensors(1.0), {}, RECIPE) / ".metadata").unlink()
    with pytest.raises(UserError, match="--fresh"):
        _restore(run)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, keep=3)
    run.save(1, _tensors(1.0), {}, {**RECIPE, "model": {"width": 8}})
    with pytest.raises(UserError, match="width is 8, the recipe says 4"):
        _restore(run)


def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path, keep=1)
    run.save(1, _tensors(1.0), {}, RECIPE)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(UserError, match="No space left on device.*free space"):
        run.save(2, _tensors(2.0), {}, RECIPE)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-1"]
    assert _restore(run)[1] is not None


def test_an_unfinished_folder_is_never_read_and_the_next_save_removes_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, keep=2)
    unfinished = tmp_path / "step-5.tmp-dead"
    unfinished.mkdir()
    (unfinished / "recipe.json").write_text(json.dumps(RECIPE))
    assert _restore(run)[1] is None
    run.save(6, _tensors(6.0), {}, RECIPE)
    assert not unfinished.exists()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/run"):
        RunFolder(tmp_path / "file" / "run", keep=1)
