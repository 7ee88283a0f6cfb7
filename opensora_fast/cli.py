"""The doorbell: `opensora-fast COMMAND ...` imports the one module that answers and nothing else.

A module answers with `main(argv: list[str]) -> int`. A `UserError`, or a backend that was asked for and cannot run,
becomes one line on stderr and exit code 2; Ctrl-C exits with 130.
"""

from __future__ import annotations

import sys
from importlib import import_module

from opensora_fast.errors import UserError
from opensora_fast.kernels import backend

# command -> (module, what it is for). Two words name a command of a group.
COMMANDS = {
    "doctor": ("opensora_fast.doctor", "versions, GPU, native extension, which backend each op uses and why"),
    "data index": ("opensora_fast.train.index", "probe a folder of videos and images into an index"),
    "data cache": (
        "opensora_fast.train.encoder_cache",
        "encode a recipe's clips and prompts once, for training with --data.cache",
    ),
    "train": ("opensora_fast.train.launch", "train a recipe; resumes from the newest good checkpoint of --out"),
    "sample": ("opensora_fast.sample_command", "generate videos or images from a trained or a released checkpoint"),
    "checkpoint": ("opensora_fast.checkpoint_tools", "inspect, verify or export a run's checkpoints: no GPU needed"),
    "bench": (
        "opensora_fast.profiling.bench",
        "time the ops against their bounds and other ways to do the same; --aot, --report",
    ),
    "bench checkpoint": (
        "opensora_fast.profiling.checkpoint_bench",
        "save and load a state on this disk, against torch.save, DCP and fio",
    ),
    "bench loader": ("opensora_fast.profiling.loader_bench", "batches of real clips, against a plain DataLoader"),
    "bench sample": ("opensora_fast.profiling.sample_bench", "seconds of a video by phase, measured or modelled"),
    "demo": ("opensora_fast.profiling.demo", "train autoencoder and three stages on real clips, sample twice, report"),
    "report": ("opensora_fast.profiling.report", "write one HTML report of finished runs"),
}


def _usage() -> str:
    rows = "\n".join(f"  {name:18} {purpose}" for name, (_, purpose) in COMMANDS.items())
    return f"usage: opensora-fast COMMAND [options]\n\n{rows}\n\nopensora-fast COMMAND --help lists its options."


def _resolve(words: list[str]) -> tuple[str, list[str]]:
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return COMMANDS[name][0], words[length:]
    raise UserError(f"unknown command {' '.join(words[:2])!r}: use one of {', '.join(COMMANDS)}")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 2 bad input, 130 interrupted)."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    try:
        module, rest = _resolve(words)
        backend.overrides()  # a name that is none is told before any work
        return import_module(module).main(rest)
    except (UserError, backend.BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"error: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
