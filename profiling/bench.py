"""`opensora-fast bench [OP ...]`: each op against its bound and against every other way to do the same, in one process.

An op whose tests fail, or whose result or gradients err clearly more than its eager form's, is red: it is not
timed and its row says so. What is timed is forward and backward on random inputs. The bound of a memory-bound op is a
copy of as many bytes, taken in turns with the op; that of an op which owns matrix products is the larger of that copy
and a large product's rate, measured in the same run. The op allocates its output, the copy does not.

    opensora-fast bench [OP ...] [--providers ours,eager,...] [--out rows.jsonl]     time and append rows
    opensora-fast bench --aot [OP ...]                                               compile for sm_90, check the budget
    opensora-fast bench --report rows.jsonl [...] [--html FILE]                      table and picture from rows
    opensora-fast bench --blocks                                                     what a block keeps, moves, launches
    opensora-fast bench --timeline [--html FILE]                                     one block on four ranks, modelled
    opensora-fast bench --yardstick [--out rows.jsonl]                               copy and launch ceilings by CuPy
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_fast.arguments import Parser
from opensora_fast.errors import UserError
from opensora_fast.profiling import bench_report, ledger, providers
from opensora_fast.profiling.case import SIZES, Case, Outputs
from opensora_fast.profiling.cases import CASES
from opensora_fast.profiling.commit import PROJECT
from opensora_fast.profiling.console import print_table
from opensora_fast.profiling.ledger import Row
from opensora_fast.profiling.machine import Machine, gpu_state, this_machine
from opensora_fast.profiling.timing import Timing, interleaved

Inputs = dict[str, Tensor]
PRODUCT_SIDES = {"cuda": 8192, "cpu": 1024}
GATE_SECONDS = 600


# Correctness first.


@functools.cache
def gate(op: str, device_type: str) -> str:
    """Why an op is red, by the tests of its file that run on this device; "" when they pass."""
    tests = PROJECT / "tests" / "kernels" / f"test_{op}.py"
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    command += ["-m", "gpu" if device_type == "cuda" else "not gpu"]
    try:
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=GATE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"{tests.name} did not end in {GATE_SECONDS} s"
    if done.returncode == 0:
        return ""
    if done.returncode == 5:
        return f"{tests.name} holds no test that runs on {device_type}"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return (lines or done.stdout.splitlines() or [f"{tests.name} exits with {done.returncode}"])[-1][:200]


def can_gate(op: str) -> bool:
    """Whether the op's tests are here: they are in a checkout, and not where only the package is installed."""
    tests = PROJECT / "tests" / "kernels" / f"test_{op}.py"
    return tests.exists() and importlib.util.find_spec("pytest") is not None


def _outputs(out: Outputs) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def _results(case: Case, function: Callable[..., Outputs], inputs: Inputs, gradients: list[Tensor] | None) -> Inputs:
    """Outputs and gradients of one call by name; `gradients` are those of the outputs, None skips the backward."""
    if case.mutates:
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
    out = _outputs(function(**inputs))
    results = {f"output {index}": tensor.detach() for index, tensor in enumerate(out)}
    if gradients is not None:
        leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
        wanted = [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, out, strict=True)]
        computed = torch.autograd.grad(out, list(leaves.values()), wanted)
        results |= {f"gradient of {name}": of for name, of in zip(leaves, computed, strict=True)}
    return results


@dataclasses.dataclass
class Judge:
    """Tells whether a function does what the eager form does: errs about as little, judged by wider arithmetic."""

    case: Case
    inputs: Inputs

    def __post_init__(self) -> None:
        of = self.case
        wide = {
            name: tensor.detach().to(of.exact if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in self.inputs.items()
        }
        for name, tensor in self.inputs.items():
            wide[name].requires_grad_(tensor.requires_grad)
        self.gradients = None
        if "backward" in of.modes:
            with torch.no_grad():
                out = _outputs(of.composite(**self.inputs))
            self.gradients = [torch.randn_like(tensor) for tensor in out]
        same = _results(of, of.composite, self.inputs, self.gradients)
        exact = _results(of, of.composite, wide, self.gradients)
        self.exact = {name: tensor.to(torch.float64) for name, tensor in exact.items()}
        self.allowed = {name: self._allowed(same[name], tensor) for name, tensor in self.exact.items()}

    def _allowed(self, same: Tensor, exact: Tensor) -> float:
        # Here a wrong kernel is to be caught; the tests hold the tight bound, at sizes whose sums are short.
        rounding = 16 * torch.finfo(same.dtype).eps * exact.abs().max().item()
        return 10 * (same.to(torch.float64) - exact).abs().max().item() + rounding

    def wrong(self, function: Callable[..., Outputs]) -> str:
        """What is wrong with a function's results, "" when nothing is."""
        found = _results(self.case, function, self.inputs, self.gradients)
        if len(found) != len(self.exact):
            return f"gives {len(found)} results and gradients, the eager form {len(self.exact)}"
        for name, tensor in found.items():
            error = (tensor.to(torch.float64) - self.exact[name]).abs().max().item()
            if not error <= self.allowed[name]:
                return f"{name} differs from the eager form by {error:.3g}, allowed {self.allowed[name]:.3g}"
        return ""


# Then time.


def _copy_of(num_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that reads half of the bytes and writes the other half, into memory that is already there."""
    source = torch.randint(-128, 128, (max(1, num_bytes // 2),), dtype=torch.int8, device=device)
    target = source.clone()
    return lambda: target.copy_(source)


@functools.cache
def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square product of random matrices."""
    side = PRODUCT_SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = interleaved({"product": lambda: torch.mm(a, b, out=out)}, device, seconds=0.1)["product"].p50
    return 2 * side**3 / seconds


def _call(
    case: Case, mode: str, provider: str, function: Callable[..., Outputs], inputs: Inputs
) -> Callable[[], object]:
    detached = {name: tensor.detach() for name, tensor in inputs.items()}
    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
    if mode == "backward":
        with providers.within(provider, case):
            out = _outputs(function(**inputs))
        gradients = [torch.randn_like(tensor) for tensor in out]

    def call() -> object:
        with providers.within(provider, case):
            if mode == "backward":
                return torch.autograd.grad(out, leaves, gradients, retain_graph=True)
            return function(**detached)

    return call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What every row of a run has in common."""

    device: torch.device
    machine: Machine
    size: str
    seconds: float

    def row(self, case: Case, mode: str, provider: str, **of: Any) -> Row:
        backend = {"backend": case.backend(self.device.type)[0]} if provider == "ours" else {}
        return {
            "schema": ledger.SCHEMA,
            "op": case.op,
            "case": case.name,
            "provider": provider,
            **backend,
            "mode": mode,
            "shapes": {name: list(shape) for name, shape in case.shapes.items()},
            "dtype": str(case.dtype).removeprefix("torch."),
            "layout": case.layout,
            "size": self.size,
            **of,
            "device": self.machine.device(self.device.type),
            "threads": torch.get_num_threads(),
            "torch": self.machine.torch,
            "triton": self.machine.triton,
            "driver": self.machine.driver,
            "commit": self.machine.commit,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def not_timed(self, case: Case, provider: str, status: str, reason: str) -> Iterator[Row]:
        for mode in case.modes:
            yield self.row(case, mode, provider, status=status, reason=reason)

    def timed(self, case: Case, mode: str, timings: dict[str, Timing]) -> Iterator[Row]:
        """One row per provider, the copy included, with the bound that holds for all of them."""
        cost = case.cost(mode)
        bounds = {"copy": timings["copy"].p50}
        if case.matrix:
            bounds["product"] = cost.flops / product_rate(case.dtype, self.device)
        bound_by = max(bounds, key=lambda name: bounds[name])
        state = gpu_state() if self.device.type == "cuda" else {}
        for provider, timing in timings.items():
            yield self.row(
                case,
                mode,
                provider,
                status="timed",
                **dataclasses.asdict(timing),
                unit="s",
                bytes=cost.bytes,
                flops=cost.flops,
                bytes_per_second=cost.bytes / timing.p50,
                flops_per_second=cost.flops / timing.p50,
                bound=bounds[bound_by],
                bound_by=bound_by,
                share_of_bound=bounds[bound_by] / timing.p50,
                **state,
            )


def measure(case: Case, names: Sequence[str], run: Run) -> Iterator[Row]:
    """Time one case by the named providers in every mode. Yields rows as they are made, red and failed ones first."""
    inputs = case.make(run.device)
    judge = Judge(case, inputs)
    functions: dict[str, Callable[..., Outputs]] = {}
    for name in names:
        try:
            function = providers.function(name, case, run.device.type)
            with providers.within(name, case):
                wrong = "" if function is None or name == "eager" else judge.wrong(function)
        except Exception as error:  # whatever a library raises on a call that it cannot do
            lines = str(error).strip().splitlines() or [""]
            yield from run.not_timed(case, name, "failed", f"{type(error).__name__}: {lines[0][:200]}")
            continue
        if wrong:
            yield from run.not_timed(case, name, "red" if name == "ours" else "failed", wrong)
        elif function is not None:
            functions[name] = function
    del judge
    if functions:
        for mode in case.modes:
            yield from run.timed(case, mode, _timings(case, mode, functions, inputs, run))


def _timings(
    case: Case, mode: str, functions: dict[str, Callable[..., Outputs]], inputs: Inputs, run: Run
) -> dict[str, Timing]:
    """Ours and the copy in turns, with the others on a GPU; by themselves on a CPU.

    In the seconds that an eager form can take there, a virtual machine hands freed memory back to its host, and the
    next call would pay for getting it again.
    """
    copy = _copy_of(case.cost(mode).bytes, run.device)
    calls = {name: _call(case, mode, name, function, inputs) for name, function in functions.items()}
    if run.device.type == "cuda":
        return interleaved(calls | {"copy": copy}, run.device, seconds=run.seconds * len(calls))
    first = {name: call for name, call in calls.items() if name == "ours"} | {"copy": copy}
    timings = interleaved(first, run.device, seconds=run.seconds)
    for name, call in calls.items():
        if name != "ours":
            timings |= interleaved({name: call}, run.device, seconds=run.seconds)
    return timings


# The command.


def _parse(argv: list[str]) -> argparse.Namespace:
    description = (__doc__ or "").split("\n\n")[0]
    parser = Parser(prog="opensora-fast bench", description=description)
    parser.add_argument("op", nargs="*", metavar="OP", help=f"of {', '.join(CASES)}; all of them by default")
    parser.add_argument("--providers", help=f"of {','.join(providers.PROVIDERS)}; by default what is installed")
    parser.add_argument("--device", help="cpu or cuda; cuda where there is a GPU by default")
    parser.add_argument("--size", choices=SIZES, help="shapes: full on a GPU, small on a CPU by default")
    parser.add_argument("--seconds", type=float, default=0.3, help="per row and provider (default %(default)s)")
    parser.add_argument("--dtype", help="only the cases of this dtype, for example bfloat16")
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    gate_help = "run each op's tests first (default: on a GPU, where the tests are there)"
    parser.add_argument("--gate", action=argparse.BooleanOptionalAction, default=None, help=gate_help)
    parser.add_argument("--red", metavar="REASON", help="write red rows for this reason and time nothing")
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    parser.add_argument("--aot", action="store_true", help="compile the Triton kernels for sm_90, check their budget")
    parser.add_argument("--update-budget", action="store_true", help="with --aot: take today's figures as the budget")
    parser.add_argument("--report", type=Path, nargs="+", metavar="ROWS", help="table and picture from these rows")
    parser.add_argument("--html", type=Path, help="with --report (by default ROWS with .html) or --timeline: the page")
    parser.add_argument("--blocks", action="store_true", help="count what a block keeps, moves and launches; no timing")
    parser.add_argument("--timeline", action="store_true", help="model one block on four ranks; no timing")
    parser.add_argument("--yardstick", action="store_true", help="copy and launch ceilings by CuPy")
    options = parser.parse_args(argv)
    for op in options.op:
        if op not in CASES:
            raise UserError(f"OP {op!r} has no cases: use some of {', '.join(CASES)}")
    return options


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {name} is not usable here: leave it out, or use cpu")
    return torch.device(name)


def _cases(options: argparse.Namespace, size: str) -> list[Case]:
    """The cases to time. UserError names the option that leaves none."""
    cases = [case for op in options.op or CASES for case in CASES[op](SIZES[size]) if case.timed]
    dtypes = sorted({str(case.dtype).removeprefix("torch.") for case in cases})
    cases = [case for case in cases if options.dtype in (None, str(case.dtype).removeprefix("torch."))]
    if not cases:
        raise UserError(f"--dtype {options.dtype} has no cases: leave it out or use {' or '.join(dtypes)}")
    cases = [case for case in cases if options.case in case.name]
    if not cases:
        raise UserError(f"--case {options.case!r} is in the name of no case")
    return cases


def main(argv: list[str]) -> int:
    """Do what the arguments say; returns the exit code, 1 when an op is red or a kernel is over its budget."""
    options = _parse(argv)
    ops = options.op or list(CASES)
    if options.report:
        return bench_report.main(options.report, options.html)
    if options.aot or options.update_budget:
        from opensora_fast.profiling import aot

        return aot.main(ops, update_budget=options.update_budget)
    if options.blocks:
        from opensora_fast.profiling import block

        return block.main()
    if options.timeline:
        from opensora_fast.profiling import context_timeline

        return context_timeline.main(options.html)
    if options.yardstick:
        from opensora_fast.profiling import yardstick

        return yardstick.main(options.out)
    return _bench(options)


def _bench(options: argparse.Namespace) -> int:
    device = _device(options.device)
    size = options.size or ("full" if device.type == "cuda" else "small")
    names, missing = providers.choose(options.providers, device.type)
    if missing:
        print(f"not timed: {'; '.join(f'{name}: {reason}' for name, reason in missing.items())}")
    if not names:
        raise UserError("--providers: none of them can run here")
    cases = _cases(options, size)
    run = Run(device=device, machine=this_machine(), size=size, seconds=options.seconds)
    gated = options.gate if options.gate is not None else device.type == "cuda"
    if not gated:
        print("gate: the ops' tests are not run; each result is checked against its eager form")
    rows: list[Row] = []
    for number, case in enumerate(cases, 1):
        if sys.stderr.isatty():
            print(f"\r\x1b[K{number}/{len(cases)} {case.name} {case.dtype}", end="", file=sys.stderr, flush=True)
        rows += _rows_of(case, names, run, gated=gated, red=options.red or "", out=options.out)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    where = f"{run.machine.device(device.type)}, {torch.get_num_threads()} threads, torch {run.machine.torch}"
    headings, lines = bench_report.table(rows)
    words = f"{where}; {size} shapes"
    print_table(headings, lines, title=words, caption=bench_report.CAPTION, left=bench_report.LEFT)
    for row in rows:
        if row["status"] != "timed":
            print(f"{row['status']}: {row['case']} {row['dtype']}, {row['mode']} by {row['provider']}: {row['reason']}")
    red = sum(row["provider"] == "ours" and row["status"] != "timed" for row in rows)
    print(f"{sum(row['status'] == 'timed' for row in rows)} rows timed, {red} of ours red")
    return int(red > 0)


def _rows_of(case: Case, names: Sequence[str], run: Run, *, gated: bool, red: str, out: Path | None) -> list[Row]:
    """The rows of one case, written to `out` before the next is begun."""
    reason = red
    if reason:
        pass
    elif gated and "ours" in names and can_gate(case.op):
        reason = gate(case.op, run.device.type)
    elif gated and "ours" in names:
        print(f"gate: tests/kernels/test_{case.op}.py or pytest is not here", file=sys.stderr)
    rows = list(run.not_timed(case, "ours", "red", reason) if reason else measure(case, names, run))
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    if out is not None:
        ledger.append(out, rows)
    return rows


if __name__ == "__main__":  # with `python -m`, where nothing is installed
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        raise SystemExit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
