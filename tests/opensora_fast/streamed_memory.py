"""What host memory loading a checkpoint takes, for test_streamed_loading: a process of its own, with nothing in memory
that its parent had.

    python -P streamed_memory.py CHECKPOINT BLOCK_BYTES DEVICE:DTYPE...     prints [{"grown": ..., "model": ...}, ...]

Bytes.  grown: the most resident memory while loading, beyond that before it.  model: of the parameters, where they are
on the host. The device "meta" stands for one with memory of its own: what is copied to it leaves no byte on the host.
"""

import json
import sys
from pathlib import Path

import torch

from opensora_fast import streamed_loading
from opensora_fast.released import load_mmdit_from
from opensora_fast.weight_files import WeightFiles


def resident(field: str) -> int:
    """Bytes, of this process: VmRSS now, VmHWM at most since the last reset."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024


def measure(files: WeightFiles, device: str, dtype: str) -> dict[str, int]:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    model = load_mmdit_from(files, device=device, dtype=getattr(torch, dtype))
    model_bytes = sum(parameter.nbytes for parameter in model.parameters()) if device == "cpu" else 0
    return {"grown": resident("VmHWM") - before, "model": model_bytes}


def main() -> None:
    checkpoint, block_bytes, *cases = sys.argv[1:]
    streamed_loading.BLOCK_BYTES = int(block_bytes)
    torch.set_num_threads(1)
    torch.zeros(1000, 1000).bfloat16().sum()  # what the first operations of their kind take
    files = WeightFiles.open(checkpoint)
    if any(case.startswith("cuda") for case in cases):
        load_mmdit_from(files, device="cuda")  # what the driver, its kernels and pinned memory take
    print(json.dumps([measure(files, *case.split(":")) for case in cases]))


if __name__ == "__main__":
    main()
