"""`opensora-fast doctor`: what is installed, what the native module holds, which backend each op runs on and why.

Needs no GPU and no native module: whatever is missing is told with the command that adds it.
"""

import json
import platform
import re
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from opensora_fast.arguments import Parser
from opensora_fast.kernels import attention, extension
from opensora_fast.video_decoder import choose_decoder

# One row per op file of kernels/: a call that the released models make, by the tensor that its backend is chosen from.
OPS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "adamw": ((12288, 3072), torch.float32),
    "attention": ((3, 8960, 24, 128), torch.bfloat16),
    "flow_mix": ((3, 16, 33, 32, 32), torch.float32),
    "gated_linear": ((3, 8960, 3072), torch.bfloat16),
    "gated_residual": ((3, 8960, 3072), torch.bfloat16),
    "gelu": ((3, 8960, 12288), torch.bfloat16),
    "lse_merge": ((1, 19136, 24, 128), torch.float32),
    "modulated_norm": ((3, 8960, 3072), torch.bfloat16),
    "pixel_shuffle": ((1, 128, 32, 256, 256), torch.bfloat16),
    "qk_norm_rope": ((3, 8960, 3, 24, 128), torch.bfloat16),
    "rms_norm_act": ((1, 128, 32, 256, 256), torch.bfloat16),
}
DRIVER = Path("/proc/driver/nvidia/version")  # there when the kernel module is loaded
CSRC = Path(__file__).parents[1] / "csrc"  # there in a checkout


def examine() -> dict[str, Any]:
    """Everything that doctor tells, as plain data: versions, gpus, errors, native, runtime, ops, attention, extras."""
    return {
        "versions": _versions(),
        "gpus": _gpus(),
        "errors": _errors(),
        "native": _native(),
        "runtime": _runtime(),
        "ops": _ops(),
        "attention": _attention(),
        "extras": _extras(),
    }


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    driver = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text()) if DRIVER.exists() else None
    return {
        "opensora-fast": _installed("opensora-fast"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "CUDA of torch": torch.version.cuda,
        "cuDNN": _cudnn(cudnn) if cudnn else None,
        "NVIDIA driver": driver.group() if driver else None,
    }


def cudnn_error(version: int | None, cuda: str | None) -> str | None:
    """What is wrong with cuDNN of this number (91002: 9.10.2) for the autoencoders; None: nothing.

    PyTorch keeps 3D convolutions of 16-bit tensors from cuDNN 9.8 to 9.14, and computes them by way of columns:
    27 times the input for a kernel of 3 x 3 x 3.
    Source: https://github.com/pytorch/pytorch/pull/163581
    """
    if version is None or not 90800 <= version < 91500:
        return None
    package = f"nvidia-cudnn-cu{cuda.split('.')[0]}" if cuda else "nvidia-cudnn"
    return (
        f"cuDNN {_cudnn(version)} does not run 3D convolutions in bfloat16, whose replacement takes many times the "
        f"memory: run pip install '{package}>=9.15'"
    )


def _cudnn(version: int) -> str:
    """From 9 on a number is major x 10,000 + minor x 100 + patch, before that major x 1,000."""
    major, rest = divmod(version, 10_000 if version >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _gpus() -> list[str]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        gpus.append(f"{of.name}, sm_{of.major}{of.minor}, {of.total_memory / 2**30:.0f} GiB")
    return gpus


def _errors() -> list[str]:
    """What makes this machine's GPUs of no use for a part of the work, with the remedy."""
    if not torch.cuda.is_available():
        return []
    error = cudnn_error(torch.backends.cudnn.version(), torch.version.cuda)
    return [error] if error else []


def _native() -> dict[str, Any]:
    loaded = extension.load()
    if loaded.module is None:
        return {"missing": loaded.missing["host"]}
    info = dict(loaded.module.build_info()) | {"cuda_missing": loaded.missing["cuda"]}
    built = Path(str(loaded.module.__file__)).stat().st_mtime
    newer = [path.name for path in sorted(CSRC.glob("*.*")) if path.stat().st_mtime > built]
    if newer:
        info["stale"] = f"csrc/{newer[0]} is newer than the module; build it with `{extension.BUILD_COMMAND}`"
    return info


def _runtime() -> dict[str, str]:
    """How checkpoints and clips are read and written here; what cannot be used is told with its reason."""
    loaded = extension.load()
    if loaded.module is None:
        return {"missing": loaded.missing["host"]}
    info, decoder = loaded.module.runtime_info(), choose_decoder()
    return {
        "checksums": info["crc32c"],
        "io_uring": info["io_uring"] or "can be used",
        "registered buffers": info["registered_buffers"] or "can be used",
        "clips are decoded by": f"{decoder.name}: {decoder.reason}",
    }


def _ops() -> dict[str, dict[str, dict[str, str]]]:
    """Op -> device -> backend and reason; a backend that was asked for and cannot run is an "error" instead."""
    told: dict[str, dict[str, dict[str, str]]] = {}
    for op, (shape, dtype) in OPS.items():
        module = import_module(f"opensora_fast.kernels.{op}")
        told[op] = {}
        for device in _devices():
            try:
                backend, reason = module.selected(shape, dtype, device)
                told[op][device] = {"backend": backend, "reason": reason}
            except ValueError as error:
                told[op][device] = {"error": str(error)}
    return told


def _attention() -> dict[str, dict[str, str]]:
    """Device -> candidate -> why it cannot run the released models' attention, "" where it can."""
    return {device: attention.missing_backends(*OPS["attention"], device) for device in _devices()}


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _extras() -> dict[str, dict[str, Any]]:
    """Extra -> what of it is not installed, and the command that adds it."""
    told: dict[str, dict[str, Any]] = {}
    for requirement in (metadata.requires("opensora-fast") or []) if _installed("opensora-fast") else []:
        if not (extra := re.search(r"""extra\s*==\s*["'](\w+)""", requirement)):
            continue
        name = re.split(r"[^\w.-]", requirement)[0]
        command = f"pip install -e '.[{extra.group(1)}]'"
        row = told.setdefault(extra.group(1), {"missing": [], "command": command})
        if _installed(name) is None:
            row["missing"].append(name)
    return told


def _sections(told: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Title -> (name, words), as they are printed."""
    return {
        "versions": [(name, version or "-") for name, version in told["versions"].items()],
        "GPU": [(str(index), gpu) for index, gpu in enumerate(told["gpus"])] or [("none", "ops run on the CPU")],
        "errors": [("error", error) for error in told["errors"]],
        "native module": [(name, str(value)) for name, value in told["native"].items() if value != ""],
        "runtime": list(told["runtime"].items()),
        "ops": [
            (f"{op} ({device})", f"{of['backend']}: {of['reason']}" if "backend" in of else f"error: {of['error']}")
            for op, devices in told["ops"].items()
            for device, of in devices.items()
        ],
        "attention": [
            (f"{name} ({device})", reason or "can run")
            for device, candidates in told["attention"].items()
            for name, reason in candidates.items()
        ],
        "extras": [
            (extra, f"lacks {', '.join(of['missing'])}: {of['command']}" if of["missing"] else "complete")
            for extra, of in told["extras"].items()
        ],
    }


def _print(told: dict[str, Any]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("(rich is not installed: plain text)")
        for title, rows in _sections(told).items():
            print("\n".join([title, *(f"  {name}: {words}" for name, words in rows), ""]))
        return
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, rows in _sections(told).items():
        for number, row in enumerate(rows):
            table.add_row("" if number else title, *row)
        table.add_row()
    width = None if sys.stdout.isatty() else 200  # in a file a command should stay on one line
    Console(width=width, highlight=False, markup=False).print(table)


def main(argv: list[str]) -> int:
    """Print what `examine` finds, as a table or with --json.

    Returns 1 when there is an error, or an op cannot run as it was told to.
    """
    parser = Parser(prog="opensora-fast doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    told = examine()
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        _print(told)
    refused = any("error" in of for devices in told["ops"].values() for of in devices.values())
    return int(refused or bool(told["errors"]))
