"""The index: one row per clip, measured once so that training never opens a file to learn its size.

Columns (parquet or csv)
    path               of the file; a relative one is relative to the index's own folder
    text               caption, empty where none is known
    num_frames         1 for an image
    height, width      pixels as shown (rotation applied)
    aspect_ratio       height / width     } written for readers, computed anew when read
    resolution         height * width     }
    fps                frames per second, 0 for an image
    bytes              optional: size of the file, empty where unknown; what tells a file from another of its name
    score_vmafmotion   optional: motion score (FFmpeg's vmafmotion), empty where unknown

`index_folder` writes paths below the index's own folder as relative ones, so that the two can be moved together, and
all others as absolute ones.  In memory the index stays columnar: tens of millions of clips cost their bytes, not as
many Python objects, and decoding workers need none of it.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

import numpy as np

from opensora_fast.arguments import Parser
from opensora_fast.errors import UserError
from opensora_fast.video_io import VideoInfo, probe, replacing

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

_LARGEST = 2**31 - 1  # frames and pixels: an area fits int64
_OPTIONAL = ("bytes", "score_vmafmotion")
_COLUMNS = {
    "path": "large_string",
    "text": "large_string",
    "num_frames": "int64",
    "height": "int64",
    "width": "int64",
    "fps": "float64",
    "bytes": "int64",
    "score_vmafmotion": "float64",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRecord:
    """One clip.  num_frames 1 and fps 0 mark an image; bytes and score_vmafmotion are None where unknown."""

    path: str
    text: str
    num_frames: int
    height: int
    width: int
    fps: float
    bytes: int | None = None
    score_vmafmotion: float | None = None


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What `index_folder` found."""

    rows: int
    without_text: int
    unreadable: list[tuple[str, str]]
    """(path, reason) of each file that was left out."""
    unused_captions: int
    """Rows of the captions file that name no indexed clip."""


class ClipIndex(Sequence[ClipRecord]):
    """Records by position; a slice is an index again.

    num_frames, height, width: int64 [N].  fps: float64 [N].  bytes: int64 [N], -1 where unknown.
    """

    def __init__(self, table: pa.Table):
        self._table = table.combine_chunks()
        self.num_frames, self.height, self.width, self.fps = (
            table[name].to_numpy() for name in ("num_frames", "height", "width", "fps")
        )
        self.bytes = table["bytes"].fill_null(-1).to_numpy()

    @classmethod
    def from_records(cls, records: Iterable[ClipRecord]) -> ClipIndex:
        rows = list(records)
        return cls(_table({name: [getattr(row, name) for row in rows] for name in _COLUMNS}))

    def __len__(self) -> int:
        return self._table.num_rows

    def column(self, name: str) -> list:
        """The values of all clips in a field of `ClipRecord`; far cheaper than as many records."""
        return self._table[name].to_pylist()

    def take(self, positions: np.ndarray) -> ClipIndex:
        """The clips at these positions, as an index."""
        return ClipIndex(self._table.take(positions))

    @overload
    def __getitem__(self, position: int) -> ClipRecord: ...
    @overload
    def __getitem__(self, position: slice) -> ClipIndex: ...
    def __getitem__(self, position: int | slice) -> ClipRecord | ClipIndex:
        wanted = range(len(self))[position]
        if isinstance(wanted, range):
            return self.take(np.arange(wanted.start, wanted.stop, wanted.step))
        return ClipRecord(**{name: self._table[name][wanted].as_py() for name in _COLUMNS})


def read_index(path: str | Path) -> ClipIndex:
    """Read a .parquet or .csv index; paths come out absolute.

    Raises UserError for a file that cannot be read, a missing column, or a value that is not of the column's kind.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    path = Path(path)
    table = _read_table(path)
    columns = {name: _column(table, name, path) for name in _COLUMNS}
    folder, nothing = (pa.scalar(text, pa.large_string()) for text in (f"{path.parent.resolve()}/", ""))
    below_folder = pc.binary_join_element_wise(folder, columns["path"], nothing)
    columns["path"] = pc.if_else(pc.starts_with(columns["path"], "/"), columns["path"], below_folder)
    index = ClipIndex(_table(columns))
    _require_usable(index, path)
    return index


def index_folder(
    folder: str | Path, out: str | Path, captions: str | Path | None = None, *, show_progress: bool = False
) -> IndexReport:
    """Measure every video and image below `folder` and write the index `out` (.parquet or .csv; whole or not at all).

    captions: a csv with the columns path (absolute, or relative to `folder`) and text.  A clip that it does not name
    takes its caption from a .txt of the same name beside it, and has an empty one otherwise.  Files that do not open
    are left out and reported.  Raises UserError for a missing folder, a bad captions file, or when nothing is readable.
    """
    folder, out = Path(folder).resolve(), Path(out).resolve()
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; name the one that holds the clips")
    if out.suffix not in (".parquet", ".csv"):
        raise UserError(f"{out}: an index is a .parquet or a .csv; change the name's ending")
    texts = _read_captions(Path(captions), folder) if captions else {}
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES)
    records: list[ClipRecord] = []
    unreadable: list[tuple[str, str]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and file access run outside the interpreter's lock
        for path, found in zip(files, _tracked(pool.map(_probe, files), len(files), show_progress), strict=True):
            if isinstance(found, UserError):
                unreadable.append((str(path), str(found).removeprefix(f"{path}: ")))
                continue
            stored = path.relative_to(out.parent) if path.is_relative_to(out.parent) else path
            text = texts.pop(path, None)
            records.append(
                ClipRecord(
                    path=str(stored),
                    text=_sidecar_caption(path) if text is None else text,
                    num_frames=found.num_frames,
                    height=found.height,
                    width=found.width,
                    fps=found.fps,
                    bytes=path.stat().st_size,
                )
            )
    if not records:
        raise UserError(
            f"{folder}: holds no readable video or image ({len(unreadable)} unreadable); name another folder"
        )
    _write(records, out)
    return IndexReport(
        rows=len(records),
        without_text=sum(not record.text for record in records),
        unreadable=unreadable,
        unused_captions=len(texts),
    )


def main(argv: list[str]) -> int:
    """`opensora-fast data index FOLDER --out FILE [--captions FILE]`; returns 0, or raises UserError."""
    parser = Parser(
        prog="opensora-fast data index",
        description="Measure every video and image below a folder into an index that training reads.",
    )
    parser.add_argument("folder", type=Path, help="searched with all its subfolders")
    parser.add_argument(
        "--out", type=Path, required=True, help="the index to write: .parquet, or .csv to edit it by hand"
    )
    parser.add_argument(
        "--captions",
        type=Path,
        help="csv with the columns path and text; otherwise captions come from .txt files beside",
    )
    options = parser.parse_args(argv)
    report = index_folder(options.folder, options.out, options.captions, show_progress=True)
    for path, reason in report.unreadable:
        print(f"left out {path}: {reason}")
    print(f"{report.rows} clips indexed, {report.without_text} without a caption, {len(report.unreadable)} unreadable")
    if report.unused_captions:
        print(f"{report.unused_captions} captions name no indexed clip")
    return 0


def _table(columns: dict[str, object]) -> pa.Table:
    import pyarrow as pa

    return pa.table(columns, schema=pa.schema([(name, pa.type_for_alias(kind)) for name, kind in _COLUMNS.items()]))


def _column(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    """A column in its own type, where it may have empty values with these filled in."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = pa.type_for_alias(_COLUMNS[name])
    if name not in table.column_names:
        if name in _OPTIONAL:
            return pa.nulls(len(table), kind)
        raise UserError(
            f"{path}: column {name!r} is missing (found: {', '.join(table.column_names)}); "
            "add it, or make the index with `opensora-fast data index FOLDER --out FILE`"
        )
    try:
        column = table[name].cast(kind)
    except pa.ArrowException as error:
        raise UserError(f"{path}: column {name!r} does not hold {kind} values ({error}); mend it") from error
    if name in ("text", "fps"):
        return pc.fill_null(column, "" if name == "text" else 0.0)
    if column.null_count and name not in _OPTIONAL:
        raise UserError(f"{path}: column {name!r} has {column.null_count} empty values; fill them or drop the rows")
    return column


def _require_usable(index: ClipIndex, path: Path) -> None:
    """Raises UserError naming the column with a value that no clip has."""
    for name in ("num_frames", "height", "width"):
        column = getattr(index, name)
        if len(index) and not 1 <= column.min() <= column.max() <= _LARGEST:
            fault = "values below 1" if column.min() < 1 else f"values above {_LARGEST}"
            raise UserError(f"{path}: column {name!r} has {fault}; drop these rows")
    faults = {
        "values that are negative or no number": ~(np.isfinite(index.fps) & (index.fps >= 0)),
        "values of 0, or none, for videos": (index.fps == 0) & (index.num_frames > 1),
    }
    for fault, of_N in faults.items():
        if of_N.any():
            record = index[int(np.argmax(of_N))]
            raise UserError(
                f"{path}: column 'fps' has {fault} ({np.count_nonzero(of_N)} in all, such as {record.fps} of "
                f"{record.path}); mend or drop these rows"
            )


def _read_table(path: Path) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv as pa_csv
    from pyarrow import parquet

    try:
        if path.suffix != ".csv":
            return parquet.read_table(path)
        strings = {name: pa.large_string() for name in ("path", "text")}  # a caption may look like a number
        return pa_csv.read_csv(
            path,
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(column_types=strings),
        )
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or (
            "no such file" if not path.exists() else str(error).splitlines()[0]
        )
        remedy = "make one with `opensora-fast data index FOLDER --out FILE`"
        raise UserError(f"{path}: cannot be read as an index ({reason}); {remedy}") from error


def _write(records: Sequence[ClipRecord], out: Path) -> None:
    import pyarrow as pa
    from pyarrow import csv as pa_csv
    from pyarrow import parquet

    table = _table({name: [getattr(record, name) for record in records] for name in _COLUMNS})
    before_fps = table.column_names.index("fps")
    table = table.add_column(before_fps, "resolution", pa.array([each.height * each.width for each in records]))
    table = table.add_column(before_fps, "aspect_ratio", pa.array([each.height / each.width for each in records]))
    table = table.drop_columns([name for name in _OPTIONAL if table[name].null_count == len(table)])
    write = pa_csv.write_csv if out.suffix == ".csv" else parquet.write_table
    with replacing(out) as part:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(table, part)


def _read_captions(path: Path, folder: Path) -> dict[Path, str]:
    """Caption by absolute path of its clip."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            for name in ("path", "text"):
                if name not in (reader.fieldnames or []):
                    raise UserError(f"{path}: column {name!r} is missing; captions need the columns path and text")
            return {Path(os.path.normpath(folder / row["path"])): (row["text"] or "").strip() for row in reader}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as captions ({error}); give a UTF-8 csv file") from error


def _sidecar_caption(path: Path) -> str:
    caption = path.with_suffix(".txt")
    try:
        return caption.read_text(encoding="utf-8").strip() if caption.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{caption}: cannot be read as a caption ({error}); write it as UTF-8 text") from error


def _probe(path: Path) -> VideoInfo | UserError:
    try:
        return probe(path)
    except UserError as error:
        return error


def _tracked(results: Iterable[T], total: int, show: bool) -> Iterable[T]:
    if not show:
        return results
    from rich.progress import track

    return track(results, description="measuring", total=total)
