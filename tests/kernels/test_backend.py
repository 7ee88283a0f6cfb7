"""OPENSORA_FAST_BACKEND: what it accepts, what it does, and that a setting which cannot be obeyed is an error."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from opensora_fast.kernels import backend, pixel_shuffle
from opensora_fast.kernels.pixel_shuffle import pixel_unshuffle_mean_add


def test_reads_a_list():
    assert backend.parse_overrides("") == {}
    assert backend.parse_overrides("pixel_shuffle:host, gelu:cuda,") == {
        "pixel_shuffle": "host",
        "gelu": "cuda",
    }


@pytest.mark.parametrize(
    "text", ["pixel_shuffle", "pixel_shuffle:hots", "pixel_shufle:host", "os.path:host", "launch:triton"]
)
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


def test_forced_reaches_other_threads_and_nests():
    """The backward of a GPU runs in a thread of autograd's own."""

    def seen():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(backend.select, "gelu", ("triton", ""), {"reference": "", "triton": ""}).result()[0]

    assert seen() == "triton"
    with backend.forced({"gelu": "reference"}):
        assert seen() == "reference"
        with backend.forced({"adamw": "host"}), backend.forced({"gelu": "triton"}):
            assert backend.select("gelu", ("reference", ""), {"reference": "", "triton": ""})[0] == "triton"
        assert seen() == "reference"
    assert seen() == "triton"
