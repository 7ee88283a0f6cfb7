"""The native module: what it says of itself, how it refuses, and life without it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opensora_fast.kernels import backend, extension
from opensora_fast.kernels.pixel_shuffle import pixel_unshuffle_mean_add

ROOT = Path(__file__).parents[2]
CALL = dict(
    out=0,
    base=0,
    source=0,
    dtype="float32",
    channels_last=False,
    batch=1,
    small_channels=4,
    large_channels=4,
    small_thw=(1, 2, 2),
    spatial_factor=2,
    temporal_factor=1,
    scale=1.0,
)


def test_build_info_is_whole(native):
    info = native.build_info()
    assert info["version"]
    assert info["compiler"]
    assert info["cpu_threads"] >= 1
    assert info["cuda"] == (info["cuda_missing"] == "") == bool(info["cuda_architectures"])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"dtype": "float64"}, "dtype is float64"),
        ({"spatial_factor": 3}, "spatial_factor"),
        ({"temporal_factor": 0}, "temporal_factor"),
        ({"small_channels": 3}, "small_channels"),
        ({"small_thw": (1, 0, 2)}, "extent"),
        ({"large_channels": 2**30}, "small_channels"),
    ],
)
def test_refuses_before_it_touches_memory(native, wrong, named):
    with pytest.raises(ValueError, match=named):
        native.space_to_channel_cpu(**CALL | wrong, threads=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cuda_call_without_a_gpu_says_so(native):
    if not native.build_info()["cuda"]:
        pytest.skip(native.build_info()["cuda_missing"])
    with pytest.raises(RuntimeError, match="no usable NVIDIA GPU"):
        native.space_to_channel_cuda(**CALL, stream=0)


def test_without_the_module_the_reference_runs_and_the_reason_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "opensora_fast._C", None)  # its import now fails
    extension.load.cache_clear()
    backend.warn_once.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="pip install"):
            out = pixel_unshuffle_mean_add(torch.zeros(1, 4, 1, 1, 1), torch.ones(1, 2, 1, 2, 2), temporal=1)
    finally:
        monkeypatch.undo()
        extension.load.cache_clear()
        backend.warn_once.cache_clear()
    assert torch.equal(out, torch.ones(1, 4, 1, 1, 1))


@pytest.fixture
def build(tmp_path):
    """build(**environment) builds a copy of the native sources and returns the finished process."""
    for name in ("csrc", "opensora_fast", "kernels", "train", "profiling"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for module in ("cmake", "ninja", "pybind11"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")

    def run(**environment):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)

    return run


def test_a_broken_compiler_is_named(build):
    done = build(CXX="false")
    assert done.returncode != 0
    assert "needs a working C++17 compiler" in done.stderr
    assert "now false" in done.stderr


@pytest.mark.slow
def test_builds_without_cuda_and_says_why(build, tmp_path):
    done = build(CMAKE_ARGS="-DOSF_CUDA=OFF")
    assert done.returncode == 0, done.stderr
    assert "CUDA  skipped: it was built with OSF_CUDA=OFF" in done.stdout
    (library,) = (tmp_path / "opensora_fast").glob("_C*.so")
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {str(library)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.build_info()["cuda_missing"] and not hasattr(module, "space_to_channel_cuda")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
