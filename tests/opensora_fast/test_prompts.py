"""The sentence after every prompt."""

import pytest

from opensora_fast.prompts import with_suffix


@pytest.mark.parametrize(
    ("text", "fps", "motion_score", "expected"),
    [
        ("rain on the sea", 24, 4, "rain on the sea. 24 FPS, 4 motion score."),
        ("  Rain.\n", 23.976, 3.5, "Rain. 24 FPS, 4 motion score."),
        ("Where to?", 12.0, None, "Where to? 12 FPS."),
        ("", 24, 4, "24 FPS, 4 motion score."),
    ],
)
def test_suffix(text, fps, motion_score, expected):
    assert with_suffix(text, fps, motion_score) == expected
