"""The index: what is measured, what is reported, what can be moved, and what is refused with its name."""

import dataclasses
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from opensora_fast.errors import UserError
from opensora_fast.train.index import ClipIndex, ClipRecord, index_folder, main, read_index
from opensora_fast.video_io import write_image, write_video


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    (folder / "deep").mkdir(parents=True)
    write_video(folder / "a.mp4", torch.zeros(3, 9, 32, 48), 25)
    (folder / "a.txt").write_text("from the side car\n")
    write_video(folder / "deep" / "b.mp4", torch.zeros(3, 5, 48, 32), 30)
    write_image(folder / "deep" / "c.png", torch.zeros(3, 20, 40))
    (folder / "broken.mp4").write_text("not a video")
    (folder / "notes.md").write_text("not a clip")
    return folder


@pytest.mark.parametrize("name", ["index.parquet", "index.csv"])
def test_every_clip_is_measured_and_the_unreadable_reported(clips, tmp_path, name):
    captions = tmp_path / "captions.csv"
    captions.write_text(f'path,text\ndeep/b.mp4,"two\nlines, 7"\n{clips}/deep/c.png,12\ngone.mp4,unused\n')
    report = index_folder(clips, tmp_path / name, captions)
    index = read_index(tmp_path / name)
    assert index.bytes.tolist() == [(clips / path).stat().st_size for path in ("a.mp4", "deep/b.mp4", "deep/c.png")]
    assert [dataclasses.replace(record, bytes=None) for record in index] == [
        ClipRecord(path=f"{clips}/a.mp4", text="from the side car", num_frames=9, height=32, width=48, fps=25.0),
        ClipRecord(path=f"{clips}/deep/b.mp4", text="two\nlines, 7", num_frames=5, height=48, width=32, fps=30.0),
        ClipRecord(path=f"{clips}/deep/c.png", text="12", num_frames=1, height=20, width=40, fps=0.0),
    ]
    assert (report.rows, report.without_text, report.unused_captions) == (3, 0, 1)
    [(path, reason)] = report.unreadable
    assert path == f"{clips}/broken.mp4"
    assert reason.startswith("cannot be read: ")


def test_the_written_columns_are_those_of_the_format(clips, tmp_path):
    index_folder(clips, tmp_path / "index.parquet")
    table = pa.parquet.read_table(tmp_path / "index.parquet")
    names = ["path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps", "bytes"]
    assert table.column_names == names
    assert table["aspect_ratio"].to_pylist() == pytest.approx([32 / 48, 48 / 32, 0.5])
    assert table["resolution"].to_pylist() == [32 * 48, 32 * 48, 800]


def test_an_index_inside_its_folder_moves_with_it(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "old")
    index_folder(tmp_path / "old", tmp_path / "old" / "index.parquet")
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_index(tmp_path / "new" / "index.parquet")[0].path == f"{tmp_path}/new/a.mp4"


def test_slices_and_records_round_trip():
    records = [
        ClipRecord(path=f"/{i}", text="", num_frames=i + 1, height=8, width=8, fps=24.0, score_vmafmotion=motion)
        for i, motion in enumerate([None, 3.5, 0.0, None])
    ]
    index = ClipIndex.from_records(records)
    assert list(index) == records
    assert list(index[1:3]) == records[1:3]
    assert index[1:].num_frames.tolist() == [2, 3, 4]
    assert index[-1] == records[-1]
    with pytest.raises(IndexError):
        index[4]


def test_a_csv_by_hand_needs_only_the_columns_that_are_read(tmp_path):
    (tmp_path / "index.csv").write_text(
        "path,text,num_frames,height,width,fps,score_vmafmotion\nx.mp4,,33,240,320,30,4.2\ny.png,7,1,240,320,,\n"
    )
    first, second = read_index(tmp_path / "index.csv")
    assert (first.text, first.fps, first.score_vmafmotion) == ("", 30.0, 4.2)
    assert (second.text, second.fps, second.score_vmafmotion) == ("7", 0.0, None)
    assert second.path == f"{tmp_path}/y.png"
    assert (first.bytes, read_index(tmp_path / "index.csv").bytes.tolist()) == (None, [-1, -1])


ROWS = "path,text,num_frames,height,width,fps\nx,,5,2,2,24\nimage,,1,2,2,0\n"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("path,text,height,width,fps\nx,,2,2,1\n", "column 'num_frames' is missing .found: path, text, .*data index"),
        ("path,text,num_frames,height,width,fps\nx,,many,2,2,1\n", "column 'num_frames' does not hold int64 values"),
        ("path,text,num_frames,height,width,fps\nx,,,2,2,1\n", "column 'num_frames' has 1 empty values"),
        ("path,text,num_frames,height,width,fps\nx,,5,0,2,1\n", "column 'height' has values below 1"),
        ("path,text,num_frames,height,width,fps\nx,,5,3000000000,2,1\n", "column 'height' has values above 2147483647"),
        (f"{ROWS}y,,5,2,2,inf\n", "column 'fps' has values that are negative or no number .*such as inf"),
        (
            f"{ROWS}y,,5,2,2,-5\nz,,1,2,2,-1\n",
            r"column 'fps' has values that are negative .*\(2 in all, such as -5.0 of",
        ),
        (
            f"{ROWS}y,,5,2,2,0\n",
            r"column 'fps' has values of 0, or none, for videos .*\(1 in all, such as 0.0 of .*/y\)",
        ),
        (f"{ROWS}y,,5,2,2,nan\n", "column 'fps' has values of 0, or none, for videos"),
        ("a\nb,c\n", "cannot be read as an index"),
    ],
)
def test_a_bad_index_is_refused_by_file_and_column(tmp_path, content, complaint):
    (tmp_path / "index.csv").write_text(content)
    with pytest.raises(UserError, match=f"index.csv: {complaint}"):
        read_index(tmp_path / "index.csv")


def test_a_rate_that_is_no_number_is_refused(tmp_path):
    rows = {"path": ["x"], "text": [""], "num_frames": [5], "height": [2], "width": [2], "fps": [float("nan")]}
    pa.parquet.write_table(pa.table(rows), tmp_path / "index.parquet")
    with pytest.raises(
        UserError, match=r"column 'fps' has values that are negative or no number \(1 in all, such as nan"
    ):
        read_index(tmp_path / "index.parquet")


def test_what_cannot_be_indexed_is_said(clips, tmp_path):
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        index_folder(tmp_path / "nowhere", tmp_path / "index.parquet")
    with pytest.raises(UserError, match=r"index\.json: an index is a \.parquet or a \.csv"):
        index_folder(clips, tmp_path / "index.json")
    (tmp_path / "captions.csv").write_text("file,text\n")
    with pytest.raises(UserError, match=r"captions\.csv: column 'path' is missing"):
        index_folder(clips, tmp_path / "index.parquet", tmp_path / "captions.csv")
    with pytest.raises(UserError, match="holds no readable video or image"):
        index_folder(tmp_path, tmp_path / "index.parquet")
    with pytest.raises(UserError, match=r"none\.parquet: cannot be read as an index \(no such file\)"):
        read_index(tmp_path / "none.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["captions.csv"]


def test_the_command_reports_what_it_did(clips, tmp_path, capsys):
    assert main([str(clips), "--out", str(tmp_path / "index.parquet")]) == 0
    said = capsys.readouterr().out
    assert "3 clips indexed, 2 without a caption, 1 unreadable" in said
    assert f"left out {clips}/broken.mp4: cannot be read" in said
