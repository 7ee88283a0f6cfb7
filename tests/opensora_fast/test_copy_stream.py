"""The order that a CUDA copy stream gives to copies and events, on stand-ins for the streams; and copies on the CPU."""

from contextlib import contextmanager

import pytest
import torch

from opensora_fast.copy_stream import CudaCopyStream, ImmediateCopies, copy_stream


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the computing stream and of the one beside it, in order."""
    made: list[tuple[str, str]] = []
    within: list[str] = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            made.append((self.name, f"wait {event}"))

        def record_event(self):
            made.append((self.name, "record"))
            return f"{self.name} event {len(made)}"

        def synchronize(self):
            made.append((self.name, "synchronize"))

    class Destination:
        def copy_(self, source, *, non_blocking):
            made.append((within[-1], f"copy {source} {'beside' if non_blocking else 'and wait'}"))

    @contextmanager
    def use(stream):
        within.append(stream.name)
        yield
        within.pop()

    computing = Stream("computing")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", use)
    return made, Destination()


def test_a_copy_waits_for_its_slot_and_its_user_for_the_copy(calls):
    made, destination = calls
    copies = CudaCopyStream(torch.device("cuda"))
    used = copies.mark()
    ready = copies.copy(destination, "weights", after=used)
    copies.wait(ready)
    copies.drain()
    assert made == [
        ("computing", "record"),
        ("copies", "wait computing event 1"),
        ("copies", "copy weights beside"),
        ("copies", "record"),
        ("computing", "wait copies event 4"),
        ("copies", "synchronize"),
    ]


def test_the_device_says_which_it_is(calls):
    assert isinstance(copy_stream(torch.device("cpu")), ImmediateCopies)
    assert isinstance(copy_stream(torch.device("cuda", 0)), CudaCopyStream)


def test_on_the_cpu_a_copy_is_done_at_once():
    copies, destination = ImmediateCopies(), torch.zeros(3)
    copies.wait(copies.copy(destination, torch.ones(3), after=copies.mark()))
    copies.drain()
    assert destination.eq(1).all()
