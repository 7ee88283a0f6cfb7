"""What `pip install .` builds and what it says, with and without nvcc."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _build_wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel of a pristine copy of the sources, and the build's output."""
    sources = folder / "sources"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "runs", "*.so", "*.egg-info", "__pycache__", ".typecheck"
    )
    shutil.copytree(ROOT, sources, ignore=ignored)
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    done = subprocess.run(
        command, cwd=sources, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = folder.glob("*.whl")
    return wheel, done.stdout + done.stderr


def test_a_wheel_without_nvcc_says_so_and_holds_the_whole_package(tmp_path: Path) -> None:
    wheel, output = _build_wheel(tmp_path, CMAKE_ARGS="-DOSF_CUDA=OFF")
    assert "skipped: it was built with OSF_CUDA=OFF" in output
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (
        ("opensora_fast", ""),
        ("kernels", "kernels/"),
        ("train", "train/"),
        ("profiling", "profiling/"),
    ):
        for path in (ROOT / folder).glob("*.py"):
            assert f"opensora_fast/{package}{path.name}" in names
    assert any(name.startswith("opensora_fast/_C.") for name in names)
    assert "opensora_fast/profiling/templates/report.html" in names
    assert {name.split("/")[0] for name in names} == {"opensora_fast", wheel.name.split("-cp")[0] + ".dist-info"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_a_wheel_with_nvcc_names_its_architectures(tmp_path: Path) -> None:
    _, output = _build_wheel(tmp_path)
    assert "80-real 90a-real" in output


def test_the_package_imports_without_its_root_on_the_path(tmp_path: Path) -> None:
    code = "import opensora_fast.kernels, opensora_fast.train, opensora_fast.profiling"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True)


def test_torchvision_stays_out() -> None:
    """Its wheel is built for CUDA: beside a CPU torch it breaks its own import and that of transformers' models."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torchvision') is not None)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
