"""OPENSORA_FAST_BACKEND: what it accepts, what it does, and that a setting which cannot be obeyed is an error."""

import pytest
import torch

from opensora_fast.kernels import backend, pixel_shuffle
from opensora_fast.kernels.pixel_shuffle import pixel_unshuffle_mean_add


def test_reads_a_list():
    assert backend.parse_overrides("") == {}
    assert backend.parse_overrides("pixel_shuffle:host, cost:cuda,") == {
        "pixel_shuffle": "host",
        "cost": "cuda",
    }


@pytest.mark.parametrize("text", ["pixel_shuffle", "pixel_shuffle:hots", "pixel_shufle:host", "os.path:host"])
def test_names_the_part_that_means_nothing(text):
    with pytest.raises(ValueError, match=text):
        backend.parse_overrides(text)


def test_is_obeyed(set_backend, monkeypatch):
    called = []
    reference = pixel_shuffle.REFERENCES["space_to_channel"]
    monkeypatch.setitem(pixel_shuffle.REFERENCES, "space_to_channel", lambda *a: called.append(1) or reference(*a))
    set_backend("pixel_shuffle:reference")
    pixel_unshuffle_mean_add(torch.zeros(1, 4, 1, 1, 1), torch.zeros(1, 2, 1, 2, 2), temporal=1)
    assert called
    assert pixel_shuffle.selected((1, 4, 1, 1, 1), torch.float32, "cpu") == (
        "reference",
        "OPENSORA_FAST_BACKEND=pixel_shuffle:reference",
    )


@pytest.mark.parametrize("name", ["cuda", "cudnn"])
def test_raises_where_it_cannot_be_obeyed(set_backend, name):
    set_backend(f"pixel_shuffle:{name}")
    with pytest.raises(ValueError, match=f"pixel_shuffle:{name} .*choose one of reference, host"):
        pixel_unshuffle_mean_add(torch.zeros(1, 4, 1, 1, 1), torch.zeros(1, 2, 1, 2, 2), temporal=1)


def test_raises_for_a_dtype_that_the_backend_lacks(set_backend):
    set_backend("pixel_shuffle:host")
    with pytest.raises(ValueError, match="cannot run: "):
        pixel_unshuffle_mean_add(torch.zeros(1, 4, 1, 1, 1).double(), torch.zeros(1, 2, 1, 2, 2).double(), temporal=1)
