#!/usr/bin/env bash
# Make .venv with everything and an editable install. Usage: tools/setup.sh PYTHON
set -euo pipefail
python=$1
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $python is $("$python" --version 2>&1): Python 3.11 or later is needed; name one with 'make PYTHON=python3.12 ...'" >&2
  exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -P -m pip --disable-pip-version-check "$@"; }

# torch first, so that nothing that depends on it chooses a build. Without an NVIDIA GPU that is the CPU build, whose version
# carries "+cpu": pip can then not take the default build with its gigabytes of CUDA packages. Where pip's own sources do not
# have it, it comes from PyTorch's index.
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  extras=text,diffusers,gpu,demo,dev
  pip install --quiet "torch>=2.11"
else
  extras=text,diffusers,demo,dev,interpreter
  torch=2.13.0+cpu
  pip install --quiet "torch==$torch" 2>/dev/null ||
    pip install --quiet "torch==$torch" --index-url https://download.pytorch.org/whl/cpu
fi
# The package is built against what is installed here: no second torch or CMake in a build environment of pip's own.
pip install --quiet "setuptools>=77" "pybind11>=2.13" "cmake>=3.26" "ninja>=1.11"
pip install --quiet --no-build-isolation --editable ".[$extras]"
.venv/bin/opensora-fast doctor
