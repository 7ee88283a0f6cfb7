"""Frame sizes by name: "256px" at "16:9" is 192 x 336 pixels.

A resolution names an area: "Npx" is N * N pixels, "Np" is N * N * 16 / 9 pixels.  A ratio is width:height.
Two suffixes narrow a resolution to one ratio: "256px_ar1:1" to that one, "256px_max" to the one with the most pixels.
Sizes are (height, width) in pixels, both multiples of D = spatial compression of the autoencoder x patch size.

The rule, with A the area and r = width / height:
    width = D * floor(sqrt(A r) / D)        height = D * floor(A / width / D)
Training sizes then move one side by D if that brings the area nearer to A, and ratios that land on a size already in
the table are left out of it.  Source: the table of Open-Sora 2.0 (256px, 768px; D = 16, 32), which this gives exactly.
"""

import math
import re
from functools import lru_cache

from opensora_fast.errors import UserError

# width:height, in the order in which a duplicate yields to an earlier name.
_LISTED = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")


def _transposed(aspect_ratio: str) -> str:
    width, height = aspect_ratio.split(":")
    return f"{height}:{width}"


ASPECT_RATIOS: tuple[str, ...] = tuple(dict.fromkeys([*_LISTED, *map(_transposed, _LISTED)]))
"""Every ratio that has a name, as width:height."""

_RESOLUTION = re.compile(r"(?P<number>[1-9]\d*)(?P<unit>px|p)(?:_(?:ar(?P<ratio>.+)|(?P<max>max)))?")


def area(resolution: str) -> int:
    """Pixels that a resolution name stands for; a suffix does not change them."""
    parts = _parse(resolution)
    number = int(parts["number"])
    return number * number if parts["unit"] == "px" else number * number * 16 // 9


def sizes(resolution: str, multiple: int, *, training: bool) -> dict[str, tuple[int, int]]:
    """The table of one resolution: aspect ratio -> (height, width).

    `training=True` matches the area more closely and leaves out ratios whose size another ratio already has.
    Raises UserError for an unknown resolution or one too small for `multiple`.
    """
    return dict(_sizes(resolution, multiple, training))


def video_size(resolution: str, aspect_ratio: str, multiple: int, *, training: bool) -> tuple[int, int]:
    """(height, width) of one aspect ratio; a ratio left out of the training table has the size of its double.

    Raises UserError for an unknown resolution or ratio, and for a resolution too small for `multiple`.
    """
    if aspect_ratio not in ASPECT_RATIOS:
        raise UserError(f"aspect ratio {aspect_ratio!r} is not known: choose one of {', '.join(ASPECT_RATIOS)}")
    return _size(resolution, aspect_ratio, multiple, training)


def _parse(resolution: str) -> re.Match[str]:
    parts = _RESOLUTION.fullmatch(resolution)
    if parts is None or (parts["ratio"] is not None and parts["ratio"] not in ASPECT_RATIOS):
        raise UserError(
            f"resolution {resolution!r} is not known: write '256px' (256 x 256 pixels in area) or '720p', optionally "
            f"with '_max' or '_ar' and one of {', '.join(ASPECT_RATIOS)}"
        )
    return parts


@lru_cache(maxsize=256)
def _sizes(resolution: str, multiple: int, training: bool) -> dict[str, tuple[int, int]]:
    parts = _parse(resolution)
    if parts["ratio"]:
        return {parts["ratio"]: _size(resolution, parts["ratio"], multiple, training)}
    listed: dict[str, tuple[int, int]] = {}
    for aspect_ratio in _LISTED:
        size = _size(resolution, aspect_ratio, multiple, training)
        if not training or size not in listed.values():
            listed[aspect_ratio] = size
    table = listed | {_transposed(name): (width, height) for name, (height, width) in listed.items()}
    if parts["max"]:
        widest = max(table, key=lambda name: table[name][0] * table[name][1])
        return {widest: table[widest]}
    return table


def _size(resolution: str, aspect_ratio: str, multiple: int, training: bool) -> tuple[int, int]:
    if aspect_ratio not in _LISTED or _transposed(aspect_ratio) in _LISTED[: _LISTED.index(aspect_ratio)]:
        height, width = _listed_size(resolution, _transposed(aspect_ratio), multiple, training)
        return width, height
    return _listed_size(resolution, aspect_ratio, multiple, training)


def _listed_size(resolution: str, aspect_ratio: str, multiple: int, training: bool) -> tuple[int, int]:
    target = area(resolution)
    ratio_width, ratio_height = map(float, aspect_ratio.split(":"))
    width = int(math.sqrt(target * ratio_width / ratio_height) // multiple) * multiple
    height = int(target / width // multiple) * multiple if width else 0
    if not (height and width):
        raise UserError(
            f"resolution {resolution!r} is too small at {aspect_ratio}: a side would be under {multiple} pixels, "
            f"the autoencoder's step; choose {2 * multiple}px or more"
        )
    if not training:
        return height, width
    candidates = [
        (height, width),
        (height - multiple, width),
        (height + multiple, width),
        (height, width - multiple),
        (height, width + multiple),
    ]
    return min(candidates, key=lambda size: abs(size[0] * size[1] - target))
