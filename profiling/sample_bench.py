"""`opensora-fast bench sample`: seconds of a video by phase, at 256px and 768px, on one GPU and on eight.

Where a GPU is, its rows are measured: the real models of the released sizes with random weights, through the sampler's
own functions. Under torchrun all ranks measure together. Steps with equally many passes of guidance take equally long,
so that of each number a few are timed and stand for the rest; a row says how many, and how many steps of each number
there are; it is appended when its case ends. Everywhere else a row is modelled (`sample_model`), and says so and by
what.

    opensora-fast bench sample [--model open-sora-v2] [--resolutions 256px 768px] [--gpus 1 8] [--out rows.jsonl]
    torchrun --nproc-per-node 8 -m opensora_fast.cli bench sample --out rows.jsonl
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from opensora_fast.arguments import Parser
from opensora_fast.errors import UserError
from opensora_fast.process_group import joined, leave
from opensora_fast.profiling import ledger, sample_model
from opensora_fast.profiling.console import print_table
from opensora_fast.profiling.hardware import H200
from opensora_fast.profiling.ledger import Row
from opensora_fast.profiling.machine import Machine, this_machine
from opensora_fast.profiling.runtime_report import Claim, row, with_claims
from opensora_fast.profiling.sample_cases import MODELS, PHASES, Result, SampleCase
from opensora_fast.profiling.sample_measurement import Measurement
from opensora_fast.profiling.timing import Timing
from opensora_fast.sampling_ranks import SamplingRanks

GPUS = (1, 8)
RESOLUTIONS = ("256px", "768px")
HEADINGS = ("case", "figures", *PHASES, "total", "target", "")


def main(argv: list[str]) -> int:
    """Returns 0 when every figure is there, 1 when a phase has none. Raises UserError for bad options."""
    options = _parser().parse_args(argv)
    models = MODELS.get(options.model)
    frames = options.frames or (models.frames if models else 1)
    if options.timed_steps < 1:
        raise UserError(f"--timed-steps {options.timed_steps}: must be at least 1")
    with joined() as ranks:
        device = _device(options.device, ranks)
        measured = [ranks.size if ranks else 1] if device is not None else []
        counts = sorted({*options.gpus, *measured})
        cases = [
            SampleCase(model=options.model, resolution=resolution, frames=frames, steps=options.steps, gpus=gpus)
            for resolution in options.resolutions
            for gpus in counts
        ]
        results = []
        bench = Measurement(device, ranks) if device is not None else None
        first, machine = ranks is None or ranks.rank == 0, this_machine()
        for case in cases:
            if bench is not None and case.gpus in measured:
                results.append(bench.result(case, options.timed_steps))
            elif first:
                results.append(modelled_result(case))
            else:
                continue
            if first:
                _keep(results[-1], machine, device, options.out)
        if first:
            _tell(results, machine, device)
    return leave(1 if any(result.missing for result in results) else 0)


def _parser() -> Parser:
    parser = Parser(prog="opensora-fast bench sample", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="open-sora-v2", help=f"one of {', '.join(MODELS)} (%(default)s)")
    parser.add_argument("--resolutions", nargs="+", default=list(RESOLUTIONS), help="at 16:9 (256px 768px)")
    parser.add_argument("--frames", type=int, help="of the video (129, or 128 with a Video DC-AE)")
    parser.add_argument("--steps", type=int, default=50, help="of a video (%(default)s)")
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS), help="modelled where not measured (1 8)")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu", "none"), default="auto", help="to measure on; auto: a GPU, or none"
    )
    parser.add_argument(
        "--timed-steps",
        type=int,
        default=3,
        help="measure so many steps of each number of passes, after one that warms up (%(default)s)",
    )
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    return parser


def _device(name: str, ranks: SamplingRanks | None) -> torch.device | None:
    """Where to measure; None: nowhere. Raises UserError for a GPU that is not there."""
    if name == "none" or (name == "auto" and not torch.cuda.is_available()):
        return None
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; use --device none for modelled figures")
    if ranks is not None and name != "cpu":
        return ranks.device
    return torch.device("cpu" if name == "cpu" else "cuda")


# What is modelled.


def modelled_result(case: SampleCase) -> Result:
    """All phases as `sample_model` has them; that of an autoencoder which cannot be built is missing."""
    seconds = {"text": sample_model.text_seconds(case), "denoise": sample_model.denoise_seconds(case)}
    try:
        return Result(case, seconds | {"decode": sample_model.decode_seconds(case)}, {})
    except UserError as error:
        return Result(case, seconds, {"decode": str(error)})


# What is told.


def table(results: Sequence[Result]) -> list[list[str]]:
    """One line a case, under HEADINGS."""
    lines = []
    for result in results:
        total, target = result.total, result.case.target
        phases = [f"{result.seconds[phase]:.3g}" if phase in result.seconds else "-" for phase in PHASES]
        verdict = "" if target is None or total is None else "within" if total <= target else "OVER"
        if verdict and result.timed_steps is None:
            verdict += ", by the model"
        lines.append(
            [
                str(result.case),
                _kind(result),
                *phases,
                "-" if total is None else f"{total:.4g}",
                "-" if target is None else f"{target:g}",
                verdict,
            ]
        )
    return lines


def rows(results: Sequence[Result], machine: Machine, device: torch.device | None) -> list[Row]:
    """Rows of the ledger: measured ones are "timed", modelled ones "modelled" with their seconds and by what."""
    made = []
    for result in results:
        case, total = result.case, result.total
        height, width = case.size
        timing = Timing(p20=total or 1.0, p50=total or 1.0, p80=total or 1.0, rounds=1)
        name = "cpu" if device is None else device.type
        of = row(machine, name, "sample", str(case), "ours", timing, case.frames * height * width * 3)
        phases = {"phases": result.seconds}
        if result.missing:
            of = _without_figures(of) | phases | {"status": "failed", "reason": _reasons(result)}
        elif result.timed_steps is None:
            told = {"status": "modelled", "reason": sample_model.BY, "device": H200.name, "seconds": total}
            of = _without_figures(of) | phases | told
        else:
            kinds = Counter(case.passes())
            steps = {str(passes): steps for passes, steps in sorted(kinds.items())}
            of |= phases | {"timed_steps": dict.fromkeys(steps, result.timed_steps), "steps": steps}
            if case.target is not None:
                claim = Claim(name=f"seconds of {case}", value=total or 0.0, aim=case.target, at_most=True, unit="s")
                of = with_claims(of, [claim])
        made.append(of)
    return made


def _without_figures(of: Row) -> Row:
    figures = {*ledger.FIGURES, "bytes_per_second"}
    return {key: value for key, value in of.items() if key not in figures}


def _kind(result: Result) -> str:
    if result.timed_steps is None:
        return "modelled"
    kinds = len(set(result.case.passes()))
    return f"measured, {kinds} x {result.timed_steps} of {result.case.steps} steps"


def _reasons(result: Result) -> str:
    return "; ".join(f"{phase}: {reason}" for phase, reason in result.missing.items())


def _keep(result: Result, machine: Machine, device: torch.device | None, out: Path | None) -> None:
    """Tell of a case when it ends and append its row: what comes later may be cut."""
    [[case, kind, *figures, _]] = table([result])
    told = ", ".join(f"{name} {figure}" for name, figure in zip(HEADINGS[2:], figures, strict=False))
    print(f"{case}: {kind}: {told}", flush=True)
    if out is not None:
        ledger.append(out, rows([result], machine, device))


def _tell(results: Sequence[Result], machine: Machine, device: torch.device | None) -> None:
    where = "nothing" if device is None else machine.device(device.type)
    caption = sample_model.BY if any(result.timed_steps is None for result in results) else ""
    print_table(
        HEADINGS, table(results), title=f"Seconds of a video; measured on: {where}", caption=caption, left=HEADINGS[:2]
    )
    for result in results:
        if result.missing:
            print(f"{result.case}: no figure for {_reasons(result)}")
