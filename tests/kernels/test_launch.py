"""Launching Triton kernels: where they can run, what a recording holds, and the interpreter's rounding."""

from __future__ import annotations

import pytest
import torch

from opensora_fast.kernels import launch
from opensora_fast.kernels.launch import jit, tl

needs_triton = pytest.mark.skipif(bool(launch.missing("cuda")), reason="Triton is not installed")


@jit
def _scale_kernel(x_ptr, y_ptr, factor, size, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    x = tl.load(x_ptr + offset, mask=mask, other=0).to(COMPUTE)
    tl.store(y_ptr + offset, x * factor, mask=mask)


def scaled(x, factor):
    y = torch.empty_like(x)
    compute = launch.compute_type(x.dtype)
    grid = (-(-x.numel() // 16),)
    launch.launch(_scale_kernel, grid, x_ptr=x, y_ptr=y, factor=factor, size=x.numel(), BLOCK=16, COMPUTE=compute)
    return y


@needs_triton
@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
def test_runs_and_rounds_to_nearest(dtype, device):
    if reason := launch.missing(device.type):
        pytest.skip(reason)
    x = torch.randn(1000).to(device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(scaled(x, 0.7501), (x.to(wide) * torch.tensor(0.7501, dtype=wide)).to(dtype))


@needs_triton
def test_every_bfloat16_survives_and_nan_stays_nan(device):
    if reason := launch.missing(device.type):
        pytest.skip(reason)
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).to(device)
    y = scaled(x, 1.0)
    assert torch.equal(x.isnan(), y.isnan())
    assert torch.equal(x.nan_to_num(), y.nan_to_num())


@needs_triton
def test_an_empty_grid_is_no_work(device):
    assert scaled(torch.empty(0, device=device), 2.0).numel() == 0


@needs_triton
def test_a_recording_lists_launches_and_runs_none():
    x = torch.empty(33, device="meta", dtype=torch.bfloat16)
    with launch.recorded() as launches:
        assert launch.missing("meta") == ""
        scaled(x, 2.0)
    (one,) = launches
    assert one.kernel is _scale_kernel
    assert one.grid == (3,)
    assert one.arguments["x_ptr"] is x
    assert one.arguments["BLOCK"] == 16


def test_says_why_it_cannot_run(monkeypatch):
    assert "mps" in launch.missing("mps")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in launch.missing("cpu")
    monkeypatch.setattr(launch, "_MISSING", "Triton cannot be imported (no)")
    assert launch.missing("cuda") == "Triton cannot be imported (no)"
