"""Progress with the time that is left, however long a step takes, with and without a terminal."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from opensora_fast.sample_progress import LINE_EVERY, Pace, SampleProgress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def progress(requests, clock, *, terminal=True):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    return SampleProgress(requests, shown=True, console=console, clock=clock), console.file


def bars(shown):
    """The lines of the bars as they are now."""
    with (console := Console(width=200)).capture() as capture:
        console.print(shown._bars.get_renderable())
    return capture.get().splitlines()


@given(step=st.floats(0.01, 1e5), total=st.integers(2, 100), data=st.data())
def test_steps_that_take_equally_long_tell_the_end(step, total, data):
    done = data.draw(st.integers(1, total))
    later = data.draw(st.floats(0, 1))
    pace = Pace(total, 5.0)
    assert pace.left(5.0 + later * step) is None
    pace.reached(done, 5.0 + done * step)
    assert pace.left(5.0 + (done + later) * step) == pytest.approx(max(0, total - done - later) * step, abs=1e-6 * step)


@pytest.mark.parametrize("seconds", [2, 40, 400])
def test_the_bars_tell_the_time_left_after_the_first_step(seconds):
    clock = Clock()
    shown, _ = progress(2, clock)
    shown.begin("rain", 10, painting=False)
    assert all("left: -:--:--" in line for line in bars(shown))
    clock.now += seconds
    shown.step(1)
    requests, steps = bars(shown)
    nine, nineteen = (f"{s // 3600}:{s // 60 % 60:02}:{s % 60:02}" for s in (9 * seconds, 19 * seconds))
    assert "rain: video" in steps
    assert "1/10" in steps
    assert f"left: {nine}" in steps
    assert "0/2" in requests
    assert f"left: {nineteen}" in requests


def test_a_picture_comes_before_the_video():
    clock = Clock()
    shown, _ = progress(1, clock)
    shown.begin("rain", 4, painting=True)
    clock.now += 100
    shown.painted(1)
    picture, video = bars(shown)
    assert "left: 0:05:00" in picture
    assert "left: -:--:--" in video
    clock.now += 300
    shown.painted(4)
    clock.now += 10
    shown.step(1)
    assert "left: 0:00:30" in bars(shown)[1]


def test_a_line_now_and_then_without_a_terminal():
    clock = Clock()
    shown, written = progress(1, clock, terminal=False)
    with shown:
        shown.begin("rain", 20, painting=False)
        for step in range(1, 21):
            clock.now += LINE_EVERY / 2
            shown.step(step)
    lines = written.getvalue().splitlines()
    assert lines[0] == f"rain: video, step 2 of 20, left: 0:04:{round(18 * LINE_EVERY / 2) % 60:02}"
    assert len(lines) == 10


def test_what_was_made_is_told_on_stdout(capsys):
    shown, written = progress(1, Clock(), terminal=False)
    shown.begin("rain", 2, painting=False)
    shown.say("a note")
    shown.ended("rain.mp4: made")
    assert written.getvalue() == "a note\n"
    assert capsys.readouterr().out == "rain.mp4: made\n"
