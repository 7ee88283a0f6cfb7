"""How frames meet a size that is not theirs: scaled in their own ratio until they cover it, and the centre cut out.

Shapes   T frames, H height, W width, C channels; sizes are (height, width) in pixels.
"""

from __future__ import annotations

import numpy as np


def covering_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width), in the ratio of the first two, that covers `size`."""
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))


def centre(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The view of [T, H, W, 3] that `resize_crop` and the training batches keep: [T, height, width, 3]."""
    top, left = (frames_THWC.shape[1] - height) // 2, (frames_THWC.shape[2] - width) // 2
    return frames_THWC[:, top : top + height, left : left + width]
