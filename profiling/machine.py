"""What a figure was measured on, in words: processor or GPU, torch, and the commit of this project."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Machine:
    cpu: str  # model and number of cores
    gpu: str | None
    torch: str
    commit: str | None  # None outside a git checkout

    def device(self, name: str) -> str:
        """What `loop.device` = auto, cpu or cuda means here, in words that say CPU or GPU."""
        if name == "cpu" or self.gpu is None:
            return f"CPU ({self.cpu})"
        return f"GPU ({self.gpu})"


def this_machine() -> Machine:
    cores = os.cpu_count()
    return Machine(
        cpu=f"{_cpu_model()}, {cores} {'core' if cores == 1 else 'cores'}",
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        torch=torch.__version__,
        commit=_commit(),
    )


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")  # Linux; platform.processor() says no more than x86_64 there
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Short hash, marked when tracked files differ from it; None without git, a checkout or a first commit."""
    git = shutil.which("git")
    if git is None or not (PROJECT / ".git").exists():
        return None
    words = [
        git,
        "-C",
        str(PROJECT),
        "describe",
        "--always",
        "--dirty=, with local changes",
        "--abbrev=10",
        "--exclude=*",
    ]
    told = subprocess.run(words, capture_output=True, text=True, check=False)
    return told.stdout.strip() if told.returncode == 0 else None
