"""Which version of the project a figure belongs to: what it is told, else git's, else a hash of the sources.

Standard library only: `make gpu-suite` asks before it knows whether anything else can be imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
VARIABLE = "OPENSORA_FAST_COMMIT"  # what the suite tells the commands that it starts
SOURCES = ("csrc/*", "kernels/*.py", "opensora_fast/*.py", "train/*.py", "profiling/*.py", "setup.py", "CMakeLists.txt")


def commit() -> str | None:
    """The variable's value, else git's short hash, else one of the sources; None where only a package is installed."""
    return os.environ.get(VARIABLE) or _git() or _hash_of_sources()


def _git() -> str | None:
    """Short hash, marked when tracked files differ from it; None without git, a checkout or a first commit."""
    git = shutil.which("git")
    if git is None or not (PROJECT / ".git").exists():
        return None
    words = [git, "-C", str(PROJECT), "describe", "--always", "--dirty=, with local changes"]
    told = subprocess.run([*words, "--abbrev=10", "--exclude=*"], capture_output=True, text=True, check=False)
    return told.stdout.strip() if told.returncode == 0 else None


def _hash_of_sources() -> str | None:
    """Names and contents of all sources; None outside a checkout."""
    if not (PROJECT / "setup.py").exists():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in PROJECT.glob(pattern) if path.is_file()):
        digest.update(f"{path.relative_to(PROJECT)}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"sources {digest.hexdigest()[:10]}"
