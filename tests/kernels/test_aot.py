"""CUDA sources compiled for the architectures that ship, without a GPU: no spills, few registers, 16-byte accesses."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
# Of 65536 a multiprocessor: 128 would leave room for two blocks of 256 threads, no more, and 64 for four.
MAX_REGISTERS = {"adamw.cu": 64, "pixel_shuffle.cu": 112}  # 58 and 107 today


@pytest.fixture(scope="module", params=["80", "90a"], ids=["sm_80", "sm_90a"])
def architecture(request):
    return request.param


@pytest.fixture(scope="module", params=MAX_REGISTERS)
def compiled(request, architecture, tmp_path_factory):
    """(source name, what ptxas says, the PTX) of one file."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
    if nvcc is None:
        pytest.skip("there is no nvcc")
    folder = tmp_path_factory.mktemp("aot")
    command = [nvcc, "-std=c++17", "-O3", "-cubin", "-Xptxas=-v", "--keep", "--keep-dir", folder]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-o", folder / "out.cubin", CSRC / request.param]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (ptx,) = folder.glob("*.ptx")
    return request.param, done.stderr, ptx.read_text()


def test_nothing_spills_and_registers_stay_within_budget(compiled):
    name, report, _ = compiled
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills, report
    assert set(spills) == {("0", "0", "0")}
    assert max(int(count) for count in re.findall(r"Used (\d+) registers", report)) <= MAX_REGISTERS[name]


def test_unit_kernels_move_16_bytes_at_a_time(compiled):
    _, _, ptx = compiled
    kernels = [body for body in ptx.split(".entry ")[1:] if "unit_kernel" in body.split("(")[0]]
    assert kernels
    for kernel in kernels:
        accesses = re.findall(r"\b(?:ld|st)\.global[.\w]*", kernel)
        assert {access.startswith("ld") for access in accesses} == {True, False}, "reads and writes"
        assert all(".v4." in access for access in accesses), accesses
