"""The sentence about frame rate and motion that follows every prompt.

Open-Sora 2.0 trains with "... 24 FPS, 4 motion score." and samples with "... 24 FPS. 4 motion score.".  Here both use
the training form: the model has only ever read that one, and one function for both cannot drift apart.  Images have no
such sentence, and neither has the empty (unconditional) prompt.

Source: Open-Sora 2.0 (arXiv 2503.09642) section 5.3 and its released code.
"""


def with_suffix(text: str, fps: float, motion_score: float | None) -> str:
    """`text` as a sentence, followed by its frame rate and, where known, its motion score, both rounded.

    `fps` is in frames per second, 0 for an image. The motion score is FFmpeg's VMAF motion, of use between 1 and 15.
    """
    text = text.strip()
    sentence = text if text.endswith((".", "!", "?")) or not text else f"{text}."
    if fps == 0:
        return sentence
    motion = "" if motion_score is None else f", {_nearest(motion_score)} motion score"
    return f"{sentence} {_nearest(fps)} FPS{motion}.".lstrip()


def _nearest(value: float) -> int:
    return int(value + 0.5)
