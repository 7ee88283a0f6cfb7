"""What a result says of the request that it was made from, and whether it is there, whole and of that request.

A result's comment is its record: names and values as JSON. Values that stand for files are their place and, under
NAME_contents, what tells one content from another: of a file that a request gives its digest, of weights, which are too
large to read for this, the sizes and times of their files.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora_fast.errors import UserError
from opensora_fast.video_io import read_image_metadata, read_video_metadata


def is_there(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the result of this record is there. Raises UserError where another file has its place, or part of one."""
    if not path.exists():
        return False
    read = read_image_metadata if path.suffix == ".png" else read_video_metadata
    try:
        found = json.loads(read(path).get("comment", ""))
    except (UserError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is there and does not say of which request; move it, or choose another --out")
    if not is_whole(path):
        raise UserError(f"{path}: is there, but cut off or damaged; delete it, and it is made again")
    wanted = json.loads(json.dumps(record))
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{path}: is there of another request ({name}={found.get(name)!r}, not {wanted.get(name)!r}); "
                "move it, or choose another --out"
            )
    return True


def is_whole(path: Path) -> bool:
    """Whether a .png or .mp4 file reaches to the end that it announces; of a .png every byte is checked."""
    with path.open("rb") as file:
        if path.suffix == ".png":
            return _png_is_whole(file.read())
        end_of_file = path.stat().st_size
        place, kinds = 0, set()
        while place < end_of_file:
            file.seek(place)
            header = file.read(16)
            if len(header) < 8:
                return False
            length, kind = struct.unpack(">I4s", header[:8])
            if length == 1:  # the length is too large for its field, and follows
                if len(header) < 16:
                    return False
                length = struct.unpack(">Q", header[8:])[0]
            if length < 8:
                return False
            kinds.add(kind)
            place += length
        return place == end_of_file and {b"moov", b"mdat"} <= kinds


def digest(path: Path) -> str:
    """What a file holds, in 16 letters. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def weights_state(path: Path) -> str:
    """Of a weights file, or the files of a folder, in 16 letters: it changes when one is written anew."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    states = [
        (each.relative_to(path).as_posix(), status.st_size, status.st_mtime_ns)
        for each in files
        for status in [each.stat()]
    ]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def _png_is_whole(data: bytes) -> bool:
    place, kind = 8, b""
    while place + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        end = place + 12 + length
        if end > len(data):
            return False
        if zlib.crc32(data[place + 4 : end - 4]) != struct.unpack(">I", data[end - 4 : end])[0]:
            return False
        place = end
    return place == len(data) and kind == b"IEND"
