"""CuPy as a second opinion: refusals here; with a GPU the ceilings, and native ops on its arrays through DLPack."""

import pytest
import torch

from opensora_fast.errors import UserError
from opensora_fast.kernels import backend, pixel_shuffle
from opensora_fast.kernels.adamw import adamw_step
from opensora_fast.profiling import ledger, yardstick

needs_cupy = pytest.mark.skipif(bool(yardstick.missing()), reason=yardstick.missing())


def test_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(yardstick.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"CuPy is not installed: pip install -e '\.\[cupy\]'"):
        yardstick.main(None)
    monkeypatch.setattr(yardstick.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        yardstick.main(None)


def test_copies_that_differ_by_more_than_3_percent_are_told():
    assert yardstick.disagreement({"torch": 1.0, "cupy": 1.02, "cupy kernel": 1.029}) == ""
    line = yardstick.disagreement({"torch": 1.0, "cupy": 1.02, "cupy kernel": 1.1})
    assert line == "copies disagree: cupy kernel takes 10.0% longer than torch"


@pytest.mark.gpu
@needs_cupy
def test_copies_copy_and_rows_are_written(monkeypatch, tmp_path):
    monkeypatch.setattr(yardstick, "COPY_BYTES", 1 << 24)
    assert yardstick.main(tmp_path / "rows.jsonl") == 0
    rows = ledger.read([tmp_path / "rows.jsonl"])
    assert {(row["op"], row["provider"]) for row in rows} >= {("copy", "cupy"), ("copy", "torch"), ("launch", "torch")}


@pytest.mark.gpu
@needs_cupy
def test_the_kernel_copies_every_byte():
    import cupy

    kernel = cupy.RawModule(code=yardstick.COPY_SOURCE).get_function("copy16")
    source = cupy.random.default_rng(0).integers(0, 2**32, size=4 * 10_007, dtype=cupy.uint32)
    target = cupy.zeros_like(source)
    kernel((7,), (yardstick.THREADS,), (source, target, 10_007))
    assert bool((source == target).all())


@pytest.mark.gpu
@needs_cupy
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pixel_shuffle_through_dlpack(dtype, monkeypatch):
    """CuPy's arrays in, CuPy's arrays out, no copy on the way: what a native op sees are bare pointers."""
    import cupy

    random = cupy.random.default_rng(0)
    arrays = [random.standard_normal(shape).astype(dtype) for shape in ((1, 8, 2, 4, 4), (1, 4, 2, 8, 8))]
    h, x = (torch.from_dlpack(array) for array in arrays)
    assert [h.data_ptr(), x.data_ptr()] == [array.data.ptr for array in arrays]
    expected = pixel_shuffle.pixel_unshuffle_mean_add(h.cpu(), x.cpu(), temporal=1)
    with backend.forced({"pixel_shuffle": "cuda"}):
        out = pixel_shuffle.pixel_unshuffle_mean_add(h, x, temporal=1)
    back = cupy.from_dlpack(out)
    assert back.data.ptr == out.data_ptr()
    assert cupy.allclose(back, cupy.asarray(expected.numpy()), atol=1e-2 if dtype == "float16" else 1e-6)


@pytest.mark.gpu
@needs_cupy
def test_adamw_through_dlpack():
    import cupy

    random = cupy.random.default_rng(0)
    arrays = [random.random(1001, dtype=cupy.float32) for _ in range(4)]
    settings = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3)

    def step(tensors):
        master, gradient, first, second = tensors
        adamw_step([master], [master], [gradient], [first], [second], **settings)
        return master

    expected = step([torch.from_numpy(array.get()) for array in arrays])
    with backend.forced({"adamw": "cuda"}):
        step([torch.from_dlpack(array) for array in arrays])
    assert cupy.allclose(arrays[0], cupy.asarray(expected.numpy()), atol=1e-6)
