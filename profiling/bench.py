"""`opensora-fast bench [OP]`: each op against a copy of as many bytes and against its eager form, forward and backward.

All in one process on the same random inputs; an op that disagrees with its eager form is not timed. Op and copy take
turns, and `op/copy` is how far a memory-bound op is from its floor. The op allocates its output, the copy does not.
The eager form is timed by itself: in the seconds that it can take, a virtual machine hands freed memory back to its
host, and the next op would pay for getting it again.
"""

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from opensora_fast.arguments import Parser
from opensora_fast.errors import UserError
from opensora_fast.profiling.cases import CASES, Case
from opensora_fast.profiling.machine import Machine, this_machine
from opensora_fast.profiling.timing import Timing, interleaved

MODES = ("forward", "backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One case in one mode: what it moves and computes, and the time of each provider ("op", "copy", "eager")."""

    case: Case
    mode: str
    backend: str
    bytes: int
    flops: int
    timings: dict[str, Timing]

    def rows(self, machine: Machine, device: torch.device) -> Iterator[dict[str, object]]:
        """One flat record per provider, times in seconds and rates in bytes per second."""
        for provider, timing in self.timings.items():
            yield {
                "op": self.case.op,
                "case": self.case.name,
                "provider": self.backend if provider == "op" else provider,
                "mode": self.mode,
                "shapes": self.case.shapes,
                "dtype": str(self.case.dtype).removeprefix("torch."),
                "layout": str(self.case.layout).removeprefix("torch."),
                **dataclasses.asdict(timing),
                "unit": "s",
                "bytes": self.bytes,
                "flops": self.flops,
                "bytes_per_second": self.bytes / timing.p50,
                "bound": self.timings["copy"].p50,
                "device": machine.device(device.type),
                "threads": torch.get_num_threads(),
                "torch": machine.torch,
                "commit": machine.commit,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }


def _copy_of(num_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that reads half of the bytes and writes the other half, into memory that is already there."""
    source = torch.randint(-128, 128, (num_bytes // 2,), dtype=torch.int8, device=device)
    target = source.clone()
    return lambda: target.copy_(source)


def _modes(case: Case, function: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Callable[[], object]]:
    detached = [tensor.detach() for tensor in inputs]
    out = function(*inputs)
    gradient = torch.randn_like(out)
    return {
        "forward": lambda: function(*detached),
        "backward": lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True),
    }


def _check(case: Case, inputs: list[Tensor]) -> None:
    detached = [tensor.detach() for tensor in inputs]
    ours, eager = case.function(*detached).float(), case.composite(*detached).float()
    allowed = 4 * torch.finfo(case.dtype).eps * eager.abs().max().item()
    error = (ours - eager).abs().max().item()
    if not error <= allowed:
        raise UserError(f"{case.name} {case.dtype} differs from its eager form by {error:.3g}: not timed")


def measure(case: Case, device: torch.device, *, seconds: float) -> Iterator[Measured]:
    """Time one case, forward then backward, for about `seconds` a provider. UserError when its result is wrong."""
    inputs = case.inputs(device)
    _check(case, inputs)
    op, eager = _modes(case, case.function, inputs), _modes(case, case.composite, inputs)
    for mode in MODES:
        cost = case.cost(mode)
        fast = {"op": op[mode], "copy": _copy_of(cost.bytes, device)}
        yield Measured(
            case=case,
            mode=mode,
            backend=case.backend(device.type)[0],
            bytes=cost.bytes,
            flops=cost.flops,
            timings=interleaved(fast, device, seconds=seconds)
            | interleaved({"eager": eager[mode]}, device, seconds=seconds),
        )


def _print_table(results: Iterable[Measured], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption="medians; GB/s counts what must be read and written, once")
    for heading in ("case", "dtype", "layout", "mode", "backend"):
        table.add_column(heading)
    for heading in ("op ms", "GB/s", "copy ms", "op/copy", "eager ms", "eager/op"):
        table.add_column(heading, justify="right")
    for result in results:
        op, copy, eager = (result.timings[name].p50 for name in ("op", "copy", "eager"))
        table.add_row(
            result.case.name,
            str(result.case.dtype).removeprefix("torch."),
            str(result.case.layout).removeprefix("torch.").removesuffix("_format"),
            result.mode,
            result.backend,
            f"{op * 1e3:.2f}",
            f"{result.bytes / op / 1e9:.1f}",
            f"{copy * 1e3:.2f}",
            f"{op / copy:.2f}",
            f"{eager * 1e3:.2f}",
            f"{eager / op:.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="opensora-fast bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("op", nargs="?", help=f"one of {', '.join(CASES)}; all of them by default")
    parser.add_argument("--device", help="cpu or cuda; cuda where there is a GPU by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row and provider (default %(default)s)")
    parser.add_argument("--dtype", help="only the cases of this dtype, for example bfloat16")
    parser.add_argument("--out", type=Path, help="append the measurements to this JSONL file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Time the cases that the arguments name, print a table, append rows to --out; returns the exit code."""
    options = _parse(argv)
    if options.op not in (None, *CASES):
        raise UserError(f"OP {options.op!r} has no cases: use one of {', '.join(CASES)}")
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {name} is not usable here: leave it out, or use cpu")
    device = torch.device(name)
    machine = this_machine()

    cases = [case for op in ([options.op] if options.op else CASES) for case in CASES[op]]
    cases = [case for case in cases if options.dtype in (None, str(case.dtype).removeprefix("torch."))]
    if not cases:
        raise UserError(f"--dtype {options.dtype} has no cases: leave it out or use bfloat16 or float32")
    results = [result for case in cases for result in measure(case, device, seconds=options.seconds)]

    _print_table(results, f"{machine.device(name)}, {torch.get_num_threads()} threads, torch {machine.torch}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with open(options.out, "a") as file:
            file.writelines(json.dumps(row) + "\n" for result in results for row in result.rows(machine, device))
    return 0
