"""The collector runs when the loop says so, on what was made since, and is left as it was found."""

import gc
import weakref

import pytest

from opensora_fast.train.garbage_collection import CollectedEvery


class Knot:
    def __init__(self):
        self.itself = self


@pytest.fixture(autouse=True)
def as_found():
    was_on = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if was_on else gc.disable)()


def test_cycles_go_at_the_fixed_steps_and_not_between():
    gc.enable()
    with CollectedEvery(3) as collector:
        assert not gc.isenabled()
        knot = weakref.ref(Knot())
        for step, gone in ((1, False), (2, False), (3, True)):
            collector.step(step)
            assert (knot() is None) == gone
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("on", [True, False])
def test_it_is_as_it_was_also_after_an_error(on):
    (gc.enable if on else gc.disable)()
    with pytest.raises(ZeroDivisionError), CollectedEvery(1):
        raise ZeroDivisionError
    assert gc.isenabled() == on
