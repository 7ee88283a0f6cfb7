"""What every kernel test gets: outputs that start as NaN, the device to run on, and a tolerance that is measured."""

import functools

import pytest
import torch

from opensora_fast.kernels import backend, extension, launch

# Device contexts look up once, at their first use in a process, which functions they intercept. Were that first use
# under the fixture below, they would know its torch.empty and never again the real one: models "on meta" would be real.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """torch.empty and its kin give NaN, so that an element that a kernel forgets to write shows."""

    def poisoned(original):
        @functools.wraps(original)
        def allocate(*args, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def native():
    """The native module; the test is skipped where it was not built."""
    loaded = extension.load()
    if loaded.module is None:
        pytest.skip(loaded.missing["host"])
    return loaded.module


@pytest.fixture
def assert_as_exact():
    """assert_as_exact(name, ours, same, exact): ours errs at most twice as much as `same`, plus one rounding.

    same: PyTorch's result in ours' dtype.  exact: the result in float64. Both from the same inputs.
    """

    def check(name, ours, same, exact):
        assert ours.shape == exact.shape, name
        assert ours.dtype == same.dtype, name
        if not exact.numel():
            return
        rounding = torch.finfo(ours.dtype).eps * exact.abs().max()
        error, allowed = (ours.double() - exact).abs().max(), 2 * (same.double() - exact).abs().max() + rounding
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    return check


@pytest.fixture
def set_backend(monkeypatch):
    """set_backend(text) makes this process read the variable anew."""

    def set_to(text):
        monkeypatch.setenv(backend.VARIABLE, text)
        backend.overrides.cache_clear()

    yield set_to
    monkeypatch.undo()
    backend.overrides.cache_clear()


@pytest.fixture(params=["reference-cpu", "triton-cpu", pytest.param("triton-cuda", marks=pytest.mark.gpu)])
def place(request, set_backend):
    """A device, with the op that the test module names in OP forced to a backend there; skipped where it cannot run."""
    name, device = request.param.split("-")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "triton" and (reason := launch.missing(device)):
        pytest.skip(reason)
    set_backend(f"{request.module.OP}:{name}")
    return torch.device(device)
