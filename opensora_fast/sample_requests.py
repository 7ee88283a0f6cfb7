"""What somebody wants sampled: one request, or a file of them, checked as far as it goes without a model.

A file is .csv with a header, or .jsonl with an object a line.  Columns, or keys:

    text, prompt       what to show; one of the two
    neg                what to keep away from (also: negative_prompt)
    ref                the image or video that is given; two images, separated by ";": the first and the last
    last, video        the image that the video ends with; the video that it goes on from (or leads to)
    condition          a name of `conditions.CONDITIONS`; absent: what the files say
    name               of the result, without its ending; absent: the file's name and the row's number
    any field of SamplingSettings

An empty cell is an absent one, and what is absent has the value of the command line.  Paths are as on the command line:
relative to the working directory.  A row that cannot be understood is one `BrokenRow`, and no other row minds.

Source   the columns text, ref and neg are those of Open-Sora 2.0's released sampler.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from opensora_fast.conditions import CONDITIONS
from opensora_fast.errors import UserError
from opensora_fast.sampling_settings import SamplingSettings
from opensora_fast.video_io import probe

SETTINGS = {field.name: get_type_hints(SamplingSettings)[field.name] for field in fields(SamplingSettings)}
"""Field of SamplingSettings -> its type."""

_SYNONYMS = {"text": "prompt", "negative_prompt": "neg"}
_COLUMNS = ("prompt", "neg", "ref", "last", "video", "condition", "name")
_SUFFIXES = (".csv", ".jsonl")
_LONGEST_NAME = 200  # bytes: endings are added, and file systems take 255
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class Given:
    """The files that a video is made from, and the condition that they stand for."""

    condition: str = "t2v"
    image: Path | None = None
    last: Path | None = None
    video: Path | None = None

    def files(self) -> dict[str, Path]:
        """Option -> file, of those that are there."""
        return {name: path for name in ("image", "last", "video") if (path := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One video or image to make."""

    name: str  # of the file, without its ending
    prompt: str
    negative_prompt: str | None = None
    given: Given = Given()
    settings: SamplingSettings


@dataclass(frozen=True, kw_only=True)
class BrokenRow:
    """A row that is no request, and why."""

    name: str
    error: UserError


def flux_paints(condition: str | None, frames: int, *, image: bool, video: bool) -> bool:
    """Whether a FLUX that is there makes the image that this video begins with: it can, and none is given."""
    return condition in (None, "i2v_head", "i2v_loop") and frames > 1 and not image and not video


def given_files(
    condition: str | None, image: Path | None, last: Path | None, video: Path | None, *, painted: bool = False
) -> Given:
    """The condition of these files. `painted`: the image is still to be made, by FLUX (`flux_paints`).

    Raises UserError for an unknown condition, for one whose files are not just those given, and for a file that is not
    there.
    """
    if video and (image or last):
        raise UserError("--video cannot be combined with --image or --last; give one or the other")
    for option, path in (("image", image), ("last", last), ("video", video)):
        if path and not path.is_file():
            raise UserError(f"--{option} {path}: no such file")
    there = {name for name, is_there in (("image", image or painted), ("last", last), ("video", video)) if is_there}
    condition = condition_of(there, condition)
    return Given(condition=condition, image=image, last=last, video=video)


def condition_of(there: set[str], condition: str | None) -> str:
    """The condition that is made of these: "image", "last", "video". `condition`: the name that was asked for, if any.

    Raises UserError for an unknown name, for one that is made of others, and for a video with an image.
    """
    if condition is None:
        fitting = [name for name in CONDITIONS if _needs(name) == there]
        if not fitting:
            raise UserError("a video cannot be combined with an image; give one or the other")
        return fitting[0]
    if condition not in CONDITIONS:
        raise UserError(f"condition {condition}: is not known; choose one of {', '.join(CONDITIONS)}")
    if _needs(condition) != there:
        needed, named = (_listed(names) for names in (_needs(condition), there))
        raise UserError(f"condition {condition}: is made of {needed} and got {named}")
    return condition


def read_requests(
    path: Path,
    settings: Mapping[str, Any],
    *,
    condition: str | None = None,
    negative_prompt: str | None = None,
    flux: bool = False,
) -> list[SampleRequest | BrokenRow]:
    """Every row of a .csv or .jsonl file; `settings` and the others count where a row says nothing.

    `flux`: FLUX is there, and makes the image of every row that can have one and gives none.

    Raises UserError for a file that is missing, has another ending, is not UTF-8, has no row, or has a header without
    a prompt, with a column twice or with one that is not known.
    """
    results: list[SampleRequest | BrokenRow] = []
    rows_of: dict[str, int] = {}
    for number, row in enumerate(_rows(path), 1):
        name = f"{path.stem}_{number:04d}"
        try:
            values = _values(row)
            name = str(values.pop("name", name))
            _check_name(name, number, rows_of)
            results.append(_request(name, values, settings, condition, negative_prompt, flux=flux))
        except (UserError, OSError) as error:  # OSError: no name that a file can have
            reason = error.strerror if isinstance(error, OSError) else error
            results.append(BrokenRow(name=name, error=UserError(f"{path}, row {number}: {reason}")))
    if not results:
        raise UserError(f"--prompts {path}: holds no row; write one request a row")
    return results


def repeated(request: SampleRequest, count: int) -> list[SampleRequest]:
    """`count` samples of a request, each with the seed after the one before; one is the request itself."""
    if count == 1:
        return [request]
    return [
        replace(
            request,
            name=f"{request.name}_{index}",
            settings=replace(request.settings, seed=request.settings.seed + index),
        )
        for index in range(count)
    ]


def _needs(condition: str) -> set[str]:
    """The options whose files a condition is made of."""
    given = CONDITIONS[condition]
    if max(given.head, given.tail) > 1:
        return {"video"}
    return {option for option, count in (("image", given.head), ("last", given.tail)) if count}


def _listed(names: set[str]) -> str:
    return " and ".join(name for name in ("image", "last", "video") if name in names) or "no file"


def _rows(path: Path) -> Iterator[dict[str, Any] | UserError]:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"--prompts {path}: is read as {' or '.join(_SUFFIXES)}; end the name with one of them")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror}; name a file that can be read") from error
    return _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(text)


def _csv_rows(path: Path, text: str) -> Iterator[dict[str, Any] | UserError]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [_SYNONYMS.get(column.strip(), column.strip()) for column in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"--prompts {path}: its header is no CSV ({error})") from error
    if "prompt" not in header:
        raise UserError(f"--prompts {path}: its first row names no column text or prompt; begin with a header")
    for column in header:
        if header.count(column) > 1:
            raise UserError(f"--prompts {path}: has column {column!r} twice; keep one")
        _check_column(column, f"--prompts {path}: ")
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:  # the quotes are not closed: there is no telling where the next row begins
            yield UserError(f"is no CSV ({error})")
            return
        if cells is None:
            return
        if not cells:
            continue
        if len(cells) > len(header):
            yield UserError(f"has {len(cells)} cells for {len(header)} columns; put cells with commas in quotes")
            continue
        yield {column: cell.strip() for column, cell in zip(header, cells, strict=False) if cell.strip()}


def _json_rows(text: str) -> Iterator[dict[str, Any] | UserError]:
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
            yield UserError(f"is no JSON ({error}); write one object a line")
            continue
        yield row if isinstance(row, dict) else UserError(f"is no JSON object: {line.strip()[:40]}")


def _values(row: dict[str, Any] | UserError) -> dict[str, Any]:
    """A row's values under their own names, absent ones left out."""
    if isinstance(row, UserError):
        raise row
    values: dict[str, Any] = {}
    for key, value in row.items():
        column = _SYNONYMS.get(key, key)
        _check_column(column, "")
        if column in values:
            raise UserError(f"has {key!r} twice under two names; keep one")
        if value is None or value == "":
            continue
        values[column] = _parsed(column, value)
    if not str(values.get("prompt", "")).strip():
        raise UserError("has no prompt; write what to show")
    return values


def check_text(name: str, text: str) -> None:
    """Raise UserError for what is no text: half of a character that takes two in UTF-16."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}={text[:40]!r}: is no Unicode text ({error.reason}); write it as UTF-8") from error


def _check_column(column: str, where: str) -> None:
    known = (*_COLUMNS, *SETTINGS)
    if column not in known:
        raise UserError(f"{where}column {column!r} is not known: use one of text, {', '.join(known)}")


def _parsed(column: str, value: Any) -> Any:
    """The value of a cell or of a JSON field, in the type of its column."""
    if isinstance(value, str):
        check_text(column, value)
    kind = SETTINGS.get(column, str)
    wanted = str(kind).replace(" | None", "") if kind not in (str, int, float, bool) else kind.__name__
    if isinstance(value, str) and wanted != "str":
        try:
            return _TRUTH[value.lower()] if wanted == "bool" else {"int": int, "float": float}[wanted](value)
        except (KeyError, ValueError):
            pass
    elif wanted == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif type(value).__name__ == wanted:
        return value
    spelling = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}[wanted]
    raise UserError(f"{column}={value!r}: must be {spelling}")


def _check_name(name: str, number: int, rows_of: dict[str, int]) -> None:
    if name in (".", "..") or name.startswith(".") or set(name) & set("/\\\0\n\r"):
        raise UserError(f"name={name!r}: must be the name of a file without its ending, and not begin with a dot")
    if len(name.encode()) > _LONGEST_NAME:
        raise UserError(f"name={name[:20]!r}...: has {len(name.encode())} bytes; use at most {_LONGEST_NAME}")
    if name in rows_of:
        raise UserError(f"name={name!r}: is that of row {rows_of[name]}; give each row its own")
    rows_of[name] = number


def _request(
    name: str,
    values: dict[str, Any],
    settings: Mapping[str, Any],
    condition: str | None,
    negative_prompt: str | None,
    *,
    flux: bool,
) -> SampleRequest:
    condition = values.get("condition", condition)
    files = _files(values, condition)
    own_settings = {key: values[key] for key in SETTINGS if key in values}
    sampling = SamplingSettings(**dict(settings) | own_settings)
    has = {name: files[name] is not None for name in ("image", "video")}
    painted = flux and flux_paints(condition, sampling.frames, **has)
    return SampleRequest(
        name=name,
        prompt=values["prompt"],
        negative_prompt=values.get("neg", negative_prompt),
        given=given_files(condition, **files, painted=painted),
        settings=sampling,
    )


def _files(values: dict[str, Any], condition: str | None) -> dict[str, Path | None]:
    """Which file is the image, the last image and the video."""
    files = {name: Path(values[name]) if name in values else None for name in ("last", "video")} | {"image": None}
    refs = [Path(part.strip()) for part in values.get("ref", "").split(";") if part.strip()]
    for path in refs:
        if not path.is_file():
            raise UserError(f"ref={path}: no such file")
    places = _places(refs, condition)
    if len(refs) > len(places):
        raise UserError(f"ref={values['ref']}: {len(refs)} files where at most {len(places)} are taken")
    for path, place in zip(refs, places, strict=False):
        if files[place] is not None:
            raise UserError(f"ref={path} and {place}={files[place]}: both are the {place}; keep one")
        files[place] = path
    return files


def _places(refs: Iterable[Path], condition: str | None) -> tuple[str, ...]:
    """What the files of `ref` are, in their order."""
    if condition in CONDITIONS:
        needed = _needs(condition)
        return tuple(option for option in ("image", "last", "video") if option in needed)
    first = next(iter(refs), None)
    is_video = first is not None and probe(first).num_frames > 1
    return ("video",) if is_video else ("image", "last")
