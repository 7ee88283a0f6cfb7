"""What callers of `VideoPipeline` pass and get: values checked, and videos in the form that they ask for.

Shapes   B videos, F frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.sample_requests import SETTINGS

if TYPE_CHECKING:
    from PIL.Image import Image

    from opensora_fast.reference_pixels import Visual

OutputType = Literal["np", "pt", "pil"]


def one_each(name: str, picture: Visual | Sequence[Visual] | None, prompts: Sequence[str]) -> list[Any]:
    """The picture of each prompt, or the one of all."""
    if not isinstance(picture, list | tuple):
        return [picture] * len(prompts)
    if len(picture) != len(prompts):
        raise UserError(f"{name}: {len(picture)} pictures for {len(prompts)} prompts; pass one, or one for each")
    return list(picture)


def stacked(references: Sequence[Tensor | None]) -> Tensor | None:
    """References [1, 3, F, H, W] of several videos as one tensor; None where there are none."""
    found = [each for each in references if each is not None]
    return torch.cat(found) if found else None


def check_types(given: dict[str, Any]) -> None:
    """Raise UserError for a setting of another type than it has."""
    for name, value in given.items():
        kind = SETTINGS[name]
        if value is None:
            continue
        if kind in (str, str | None):
            right, spelling = isinstance(value, str), "text"
        elif kind in (int, int | None):
            right, spelling = isinstance(value, int) and not isinstance(value, bool), "a whole number"
        else:
            right, spelling = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        if not right:
            raise UserError(f"{name}={value!r}: must be {spelling}")


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """The device of this name. Raises UserError for one that is not here."""
    try:
        place = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device={device!r}: is none; name one such as 'cuda' or 'cpu'") from error
    if place is not None and place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device!r}: this machine has {torch.cuda.device_count()} GPUs; name one, or 'cpu'")
    return place


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """`dtype`. Raises UserError for what is none."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype={dtype!r}: pass a torch.dtype, such as torch.bfloat16")
    return dtype


def as_output(video_B3FHW: Tensor, output_type: OutputType) -> np.ndarray | Tensor | list[list[Image]]:
    """A video [B, 3, F, H, W] in [-1, 1] in the form that was asked for; see `pipeline.VideoPipelineOutput`."""
    video_BF3HW = ((video_B3FHW.transpose(1, 2) + 1) / 2).clamp(0, 1)
    if output_type == "pt":
        return video_BF3HW
    video_BFHW3 = video_BF3HW.permute(0, 1, 3, 4, 2).cpu().numpy()
    if output_type == "np":
        return video_BFHW3
    from PIL import Image

    pictures = (video_BFHW3 * 255).round().astype(np.uint8)
    return [[Image.fromarray(picture) for picture in frames] for frames in pictures]
