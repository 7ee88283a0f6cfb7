"""One block of the transformer on ranks that share a sequence, modelled: what computes, what travels, what waits.

    compute   the rank's kernels in their order: seconds = max(bytes / copy rate, flops / rate of such products)
    exchange  what ranks send each other, and attention in between: `kernels.context_plan.timeline`
    exposed   the part of an exchange in which nothing computes; hidden is the rest of it

So total = compute + exposed, and nothing hides for longer than what runs beside it. Nothing is measured: the constants
are those of `profiling.hardware` and `kernels.context_plan`, which name their sources. What a launch costs is left out
(what posting messages costs is not), and so is what exchanges take away from the kernels that run beside them, which is
why the ring looks better here than it has been measured elsewhere.

Letters   B batch, T tokens of this rank in one stream, D hidden size, M that of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import product
from pathlib import Path

import torch

from opensora_fast.config import MMDIT_PRESETS, MMDiTConfig
from opensora_fast.kernels import (
    context_plan,
    gated_linear,
    gated_residual,
    gelu,
    modulated_norm,
    qk_norm_rope,
)
from opensora_fast.kernels.context_plan import NVLINK, Link, Step, Timeline
from opensora_fast.kernels.cost import Cost
from opensora_fast.profiling.block import KINDS
from opensora_fast.profiling.console import print_table
from opensora_fast.profiling.hardware import H200, Hardware
from opensora_fast.profiling.page_template import page_template
from opensora_fast.sequence_shards import shard_lengths

RANKS = 4
SCHEMES = {"ulysses": (RANKS, 1), "ring": (1, RANKS)}  # name -> (columns of the all-to-all, rows of the ring)
MODES = ("forward", "backward")
ROTATION = "q, k norm, rotation"
DTYPE = torch.bfloat16
SHAPES = {  # name -> (batch, text tokens, video tokens)
    "8,960 tokens, batch 3: clips of 129 frames at 256px": (3, 512, 8448),
    "76,544 tokens, batch 1: a clip of 129 frames at 768px": (1, 512, 76032),
}


# What one rank's part of a block takes.


@dataclass(frozen=True, kw_only=True)
class Share:
    """A rank's part of a block: `streams` are the tokens that share weights, (text, video) or all together."""

    kind: str
    batch: int
    streams: Sequence[int]
    config: MMDiTConfig
    hardware: Hardware

    def passes(self, cost: Cost) -> float:
        """A kernel that only moves memory."""
        return cost.bytes / self.hardware.copy_bytes

    def products(self, rows: int, inputs: int, outputs: int, *, backward: bool = False) -> float:
        """A linear over `rows`; its backward is two products of the same size."""
        moved = (rows * (inputs + outputs) + inputs * outputs) * DTYPE.itemsize
        one = max(2 * rows * inputs * outputs / self.hardware.matmul_flops, moved / self.hardware.copy_bytes)
        return 2 * one if backward else one

    def rotation(self, mode: str) -> float:
        """Norm and rotation of q and k, and v with them into the layout that is exchanged."""
        B, H, K, streams = self.batch, self.config.num_heads, self.config.head_dim, len(self.streams)
        return self.passes(qk_norm_rope.cost(B, sum(self.streams), H, K, DTYPE, mode, table_batch=B, streams=streams))

    def projection(self, *, backward: bool = False) -> float:
        """What leads to q, k and v: the modulated norm and its linear, in single blocks also into the MLP."""
        D, M = self.config.hidden_size, self.config.mlp_size
        out = 3 * D if self.kind == "double" else 3 * D + M
        seconds = 0.0
        for T in self.streams:
            shape = (self.batch, T, D)
            seconds += self.products(self.batch * T, D, out, backward=backward)
            seconds += self.passes(modulated_norm.cost(shape, DTYPE, "forward"))  # made again in the backward
            if backward:
                seconds += self.passes(modulated_norm.cost(shape, DTYPE, "backward"))
        return seconds

    def rest(self, *, backward: bool = False) -> float:
        """What follows attention: its projection, the MLP and the residuals."""
        D, M = self.config.hidden_size, self.config.mlp_size
        modes = ("forward", "backward") if backward else ("forward",)  # activations are made again
        seconds = 0.0
        for T in self.streams:
            rows, shape = self.batch * T, (self.batch, T, D)
            for mode in modes:
                seconds += self.passes(gelu.cost(rows, M, DTYPE, mode))
            seconds += self.passes(gated_residual.cost(shape, DTYPE, modes[-1]))
            if backward:
                seconds += self.passes(gated_linear.cost(self.batch, D, M, DTYPE))
            if self.kind == "double":
                seconds += self.products(rows, D, D, backward=backward)
                seconds += self.products(rows, D, M, backward=backward) + self.products(rows, M, D, backward=backward)
                for mode in modes:
                    seconds += self.passes(gated_residual.cost(shape, DTYPE, mode, norm=True))
            else:
                seconds += self.products(rows, D + M, D, backward=backward)
        return seconds


def block_timeline(
    kind: str,
    mode: str,
    shape: tuple[int, int, int],
    mesh: tuple[int, int],
    *,
    config: MMDiTConfig = MMDIT_PRESETS["open-sora-v2"],
    hardware: Hardware = H200,
    link: Link = NVLINK,
) -> Timeline:
    """One direction of a "double" or "single" block of `shape` (batch, text, video tokens) on a mesh (ulysses, ring).

    The kernels before and after attention run by themselves, each waiting for the one before it.
    """
    batch, text, video = shape
    ranks = mesh[0] * mesh[1]
    parts = (shard_lengths(text, ranks)[0], shard_lengths(video, ranks)[0])  # of the busiest rank
    share = Share(
        kind=kind,
        batch=batch,
        streams=parts if kind == "double" else [sum(parts)],
        config=config,
        hardware=hardware,
    )
    between = context_plan.timeline(
        mode,
        sum(parts) * ranks,
        config.num_heads,
        *mesh,
        link,
        batch=batch,
        channels=config.head_dim,
        streams=len(share.streams),
    )
    projection = "norm, qkv" if kind == "double" else "norm, qkv and MLP"
    rest = "projection, MLP" if kind == "double" else "projection"
    if mode == "forward":
        before = {projection: share.projection(), ROTATION: share.rotation("forward")}
        after = {rest: share.rest()}
    else:
        before = {rest: share.rest(backward=True), f"{ROTATION} again": share.rotation("forward")}
        after = {ROTATION: share.rotation("backward"), projection: share.projection(backward=True)}
    steps: list[Step] = []
    clock = 0.0
    for name, seconds in before.items():
        steps.append(Step("block", name, clock, seconds))
        clock += seconds
    steps += [replace(step, start_s=step.start_s + clock) for step in between.steps]
    clock += between.total_s
    for name, seconds in after.items():
        steps.append(Step("block", name, clock, seconds))
        clock += seconds
    return Timeline(tuple(steps))


# What is shown of a timeline.


@dataclass(frozen=True, kw_only=True)
class Piece:
    """All steps of one name."""

    name: str
    times: int
    seconds: float
    exchange: bool
    hidden: float  # of an exchange's seconds
    sent: int  # bytes


def hidden_s(timeline: Timeline, exchange: Step) -> float:
    """How long something computes beside an exchange."""
    computing = [step for step in timeline.steps if step.kind != "exchange"]
    return sum(max(0.0, min(exchange.end_s, one.end_s) - max(exchange.start_s, one.start_s)) for one in computing)


def piece_name(step: Step) -> str:
    if step.kind in ("sum", "copy"):
        return f"{step.kind} of {step.name}"
    return "attention" if step.kind == "attention" else step.name


def pieces(timeline: Timeline) -> list[Piece]:
    """In the order in which they first start."""
    groups: dict[tuple[bool, str], list[Step]] = {}
    for step in timeline.steps:
        groups.setdefault((step.kind == "exchange", piece_name(step)), []).append(step)
    return [
        Piece(
            name=name,
            times=len(steps),
            seconds=sum(step.duration_s for step in steps),
            exchange=exchange,
            hidden=sum(hidden_s(timeline, step) for step in steps) if exchange else 0.0,
            sent=sum(step.bytes for step in steps) if exchange else 0,
        )
        for (exchange, name), steps in groups.items()
    ]


def mark(step: Step) -> str:
    if step.kind == "attention":
        return "A"
    if step.kind in ("sum", "copy"):
        return step.kind[0]
    return "r" if step.name.startswith(ROTATION) else step.name[0]


MARKS = "n norm and qkv, r rotation of q and k, A attention, s sum, c copy, p projection and MLP; # exposed, = hidden"


def bars(timeline: Timeline, seconds_per_cell: float) -> tuple[str, str]:
    """Both lanes as text: what computes, and what is exchanged. Every step has at least one cell."""
    cells = round(timeline.total_s / seconds_per_cell) + 1
    lanes = {False: [" "] * cells, True: [" "] * cells}
    for step in timeline.steps:
        exchange = step.kind == "exchange"
        first, last = (round(at / seconds_per_cell) for at in (step.start_s, step.end_s))
        letter = ("=" if 2 * hidden_s(timeline, step) > step.duration_s else "#") if exchange else mark(step)
        lanes[exchange][first : max(last, first + 1)] = letter * max(last - first, 1)
    compute, exchanges = ("".join(lanes[exchange]).rstrip() for exchange in (False, True))
    return compute, exchanges


# The command.

WIDTH = 96  # cells of the longest bar
HEADINGS = ("block", "direction", "scheme", "piece", "times", "ms", "exposed ms", "hidden ms", "MB sent")
SOURCES = (
    f"{NVLINK.name}: {NVLINK.bytes_per_s / 1e9:g} GB/s and {NVLINK.latency_s * 1e6:g} us a message: {NVLINK.source}",
    f"attention: {context_plan.FORWARD_FLOPS_PER_S / 1e12:g} TFLOP/s forward, "
    f"{context_plan.BACKWARD_FLOPS_PER_S / 1e12:g} backward: cuDNN 9.19 on an H200, published with cudnn-frontend",
    f"other products: {H200.matmul_flops / 1e12:g} TFLOP/s, assumed: {H200.matmul_flops / H200.peak_flops:.0%} of the "
    "data sheet's peak",
    f"messages: {context_plan.MESSAGE_S * 1e6:g} us of the host's time for each, assumed; it runs ahead of the device",
    f"memory: {H200.copy_bytes / 1e12:g} TB/s, assumed: {H200.copy_bytes / H200.peak_bytes:.0%} of the data sheet's",
)
CAPTION = (
    "modelled, not measured. The backward makes q, k, v and out of other ranks travel again rather than keep them. "
    "Not in the model: what exchanges take from the kernels beside them (measured elsewhere: at 65,536 tokens on 4 of "
    "8 H200, the ring lost 32 % and the all-to-all nothing; prime-rl pull request 2418), and launches"
)


@dataclass(frozen=True, kw_only=True)
class View:
    """One direction of one block by every scheme."""

    kind: str
    mode: str
    timelines: dict[str, Timeline]

    @property
    def longest_s(self) -> float:
        return max(timeline.total_s for timeline in self.timelines.values())


def views(shape: tuple[int, int, int]) -> list[View]:
    """Of both kinds of blocks in both directions."""
    return [
        View(
            kind=kind,
            mode=mode,
            timelines={scheme: block_timeline(kind, mode, shape, mesh) for scheme, mesh in SCHEMES.items()},
        )
        for kind, mode in product(KINDS, MODES)
    ]


def rows(shown: Sequence[View]) -> list[list[str]]:
    """The pieces of every timeline and their total, by HEADINGS."""
    lines = []
    for view in shown:
        for scheme, timeline in view.timelines.items():
            what = [view.kind, view.mode, scheme]
            for piece in pieces(timeline):
                exchange = [_ms(piece.seconds - piece.hidden), _ms(piece.hidden), f"{piece.sent / 1e6:.0f}"]
                lines.append([*what, piece.name, str(piece.times), _ms(piece.seconds), *(exchange * piece.exchange)])
            sent = sum(piece.sent for piece in pieces(timeline))
            total = [_ms(timeline.total_s), _ms(timeline.exposed_s), _ms(timeline.hidden_s), f"{sent / 1e6:.0f}"]
            lines.append([*what, "total", "", *total])
    return [line + [""] * (len(HEADINGS) - len(line)) for line in lines]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def main(html: Path | None = None) -> int:
    """Print the timelines of every shape, and write the page to `html` where that is given; returns 0."""
    for name, shape in SHAPES.items():
        shown = views(shape)
        print(f"{name}; {RANKS} ranks; modelled, nothing was run\n{MARKS}\n")
        for view in shown:
            for scheme, timeline in view.timelines.items():
                compute, exchanges = bars(timeline, view.longest_s / WIDTH)
                figures = f"{_ms(timeline.total_s)} ms = {_ms(timeline.compute_s)} compute + {_ms(timeline.exposed_s)} "
                print(f"{view.kind} block, {view.mode}, {scheme}: {figures}exposed; {_ms(timeline.hidden_s)} hidden")
                print(f"  compute   {compute}\n  exchange  {exchanges}".rstrip())
            print()
        print_table(HEADINGS, rows(shown), title=f"{name}; modelled", caption=CAPTION, left=HEADINGS[:4])
        print()
    for source in SOURCES:
        print(source)
    if html is not None:
        write_page(html)
        print(f"timeline {html}")
    return 0


# The page.

PAGE_WIDTH, LANE, LEFT = 920, 22, 78  # SVG units


def gantt(view: View) -> str:
    """Both lanes of every scheme as one <svg> element, on one scale with ticks in ms."""
    scale = (PAGE_WIDTH - LEFT) / view.longest_s
    bottom = len(view.timelines) * 3 * LANE - LANE // 2
    lanes = []
    for tick in _ticks(view.longest_s * 1e3):
        x = LEFT + tick * 1e-3 * scale
        lanes.append(f'<path class="grid" d="M{x:.2f} 0V{bottom}"/>')
        lanes.append(f'<text class="middle" x="{x:.2f}" y="{bottom + 14}">{tick:g} ms</text>')
    for number, (scheme, timeline) in enumerate(view.timelines.items()):
        top = number * 3 * LANE
        lanes.append(f'<text x="0" y="{top + LANE * 0.7:.0f}">{escape(scheme)}</text>')
        for step in timeline.steps:
            exchange = step.kind == "exchange"
            hidden = exchange and 2 * hidden_s(timeline, step) > step.duration_s
            style = ("hidden" if hidden else "exposed") if exchange else step.kind
            x, width = LEFT + step.start_s * scale, step.duration_s * scale
            name = piece_name(step)
            title = f"{name}: {_ms(step.duration_s)} ms modelled" + (f", {style}" if exchange else "")
            box = f'x="{x:.2f}" y="{top + LANE * exchange}" width="{width:.2f}" height="{LANE - 3}"'
            lanes.append(f'<rect class="{style}" {box}><title>{escape(title)}</title></rect>')
            if len(name) * 6.2 < width:
                at = f'x="{x + 5:.2f}" y="{top + LANE * exchange + 14}"'
                lanes.append(f'<text class="label" {at}>{escape(name)}</text>')
    label = f"{view.kind} block, {view.mode}, {' and '.join(view.timelines)}: modelled timeline"
    return f'<svg viewBox="0 0 {PAGE_WIDTH} {bottom + LANE}" role="img" aria-label="{label}">{"".join(lanes)}</svg>'


def _ticks(highest: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most 8 of them from 0 on; the last leaves room for its label."""
    power = 10.0 ** math.floor(math.log10(highest / 8))
    step = next(digit * power for digit in (1, 2, 5, 10) if 8 * digit * power >= highest)
    return [number * step for number in range(8) if number * step <= 0.97 * highest]


def write_page(path: Path) -> None:
    """Write the page of all shapes, which refers to nothing outside itself."""
    shapes = {name: views(shape) for name, shape in SHAPES.items()}
    tables = {name: rows(shown) for name, shown in shapes.items()}
    page = page_template("timeline.html", ms=_ms).render(
        gantt=gantt, ranks=RANKS, shapes=shapes, tables=tables, headings=HEADINGS, caption=CAPTION, sources=SOURCES
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
