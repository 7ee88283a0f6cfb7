"""What attention over a shared sequence takes, modelled: the meshes that are possible, their timelines, and a choice.

One rank of P has S / P tokens; U' is one [B, S / P, H, K] tensor. A mesh has U columns (the all-to-all) and R rows (the
ring), U R = P. Two lanes run side by side, the rank's own work and its exchanges:

    all-to-all   n tensors in n U' (1 - 1/U) / rate + latency, with nothing to do meanwhile: n = 3, then 1 forward;
                 5, then 3 backward
    ring         R blocks of attention, each a 1/R of the whole. Under all but the last, k and v pass on (2 U'); in the
                 backward, under all but the first, their gradients in float32 (4 U'), and once more at the end, exposed
    sums         R - 1 times in float32, memory bound: 6 U' moved forward, 18 U' backward
    copies       of out between streams and groups of heads, memory bound: 2 U' moved forward; 4 U' backward, dout too

The host posts an exchange message by message: 2 for every peer, tensor and, in the all-to-all, batch item. It is well
ahead of the device, so that this shows only where it takes longer than all else: for many short sequences.

Nothing here is measured on this project's machines: every constant names its source. The lane of exchanges slows
attention down while it runs, for it takes multiprocessors from it, and the model does not know by how much: measured
elsewhere on 8 H200 at 65,536 tokens and 4 ranks, the ring lost 32 % where the all-to-all lost nothing (prime-rl pull
request 2418). That is why the all-to-all alone is the default wherever it comes near the best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

# cuDNN 9.19.1 on an H200, bfloat16, 128 channels, 8k to 32k tokens (cudnn-frontend, 2026-02); the backward counts 2.5
# times the forward's operations
FORWARD_FLOPS_PER_S = 690e12  # published: 691 to 702
BACKWARD_FLOPS_PER_S = 600e12  # published: 572 to 612
MESSAGE_S = 5e-6  # assumed: the host's time to post a send or a receive through PyTorch
MEMORY_BYTES_PER_S = 4e12  # H200: 4.8e12 on paper; what a fused pass over memory reaches is nearer to this
NEAR = 0.05  # the default may be so much slower, in parts of the best, before it is left


@dataclass(frozen=True)
class Link:
    """What connects ranks: bytes per second that a rank sends while it receives as many, and a message's latency."""

    name: str
    bytes_per_s: float
    latency_s: float
    source: str
    ranks: int | None = None  # neighbours that it joins; beyond them `beyond` does
    beyond: Link | None = None

    def between(self, ranks: int) -> Link:
        """The slowest link on the way among so many neighbours."""
        if self.beyond is None or self.ranks is None or ranks <= self.ranks:
            return self
        return self.beyond.between(ranks)


INFINIBAND = Link(
    name="InfiniBand NDR, one 400 Gbit/s adapter to a GPU",
    bytes_per_s=47e9,
    latency_s=20e-6,
    source="46 to 48 GB/s an adapter (NVIDIA/nccl-tests issue 290); latency assumed, launch included",
)
NVLINK = Link(
    name="NVLink of an H200 node",
    bytes_per_s=370e9,
    latency_s=10e-6,
    source="450 GB/s less a fifth of protocol (NVIDIA/nccl-tests issue 212); 4 us for a small send and receive "
    "(NVIDIA/nccl issue 1984), the rest assumed for launch and waiting",
    ranks=8,
    beyond=INFINIBAND,
)


@dataclass(frozen=True)
class Step:
    """A piece of work: "attention", "sum" and "copy" on a rank's own lane, "exchange" on the other."""

    kind: str
    name: str
    start_s: float
    duration_s: float
    bytes: int = 0  # that an exchange sends, or a sum or copy moves

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


@dataclass(frozen=True)
class Timeline:
    """One direction of one block's attention on one rank."""

    steps: tuple[Step, ...]

    @property
    def total_s(self) -> float:
        return max(step.end_s for step in self.steps)

    @property
    def compute_s(self) -> float:
        """Of the rank's own lane: attention, sums and copies."""
        return sum(step.duration_s for step in self.steps if step.kind != "exchange")

    @property
    def exposed_s(self) -> float:
        """Of the exchanges, what nothing runs beside."""
        return max(0.0, self.total_s - self.compute_s)  # not below 0 by a rounding

    @property
    def hidden_s(self) -> float:
        return max(0.0, sum(step.duration_s for step in self.steps if step.kind == "exchange") - self.exposed_s)


@dataclass(frozen=True)
class ContextPlan:
    """A mesh and what it is expected to take; `rejected` has the other meshes with the reason."""

    ulysses: int
    ring: int
    forward: Timeline
    backward: Timeline
    temporary_bytes: int  # at most at once, beside what is saved for the backward
    reason: str
    rejected: tuple[str, ...] = ()

    @property
    def total_s(self) -> float:
        """Both directions."""
        return self.forward.total_s + self.backward.total_s


@dataclass
class _Clock:
    """Builds a timeline: when each lane is free, and what ran on it."""

    own_s: float = 0.0
    exchange_s: float = 0.0
    host_s: float = 0.0  # that posting messages takes
    steps: list[Step] = field(default_factory=list)

    def work(self, kind: str, name: str, seconds: float, moved: int = 0) -> None:
        self.steps.append(Step(kind, name, self.own_s, seconds, moved))
        self.own_s += seconds

    def move(self, kind: str, name: str, moved: int) -> None:
        self.work(kind, name, moved / MEMORY_BYTES_PER_S, moved)

    def post(self, name: str, sent: int, messages: int, link: Link) -> None:
        """An exchange that starts as soon as both what is posted now and its lane are ready."""
        self.host_s += messages * MESSAGE_S
        start, seconds = max(self.own_s, self.exchange_s), sent / link.bytes_per_s + link.latency_s
        self.steps.append(Step("exchange", name, start, seconds, sent))
        self.exchange_s = start + seconds

    def wait(self) -> None:
        self.own_s = max(self.own_s, self.exchange_s)

    def end(self) -> Timeline:
        if self.host_s > self.own_s:
            self.steps.append(Step("exchange", "posting by the host", self.own_s, self.host_s - self.own_s))
        return Timeline(tuple(self.steps))


def timeline(
    mode: str,
    tokens: int,
    heads: int,
    ulysses: int,
    ring: int,
    link: Link = NVLINK,
    *,
    batch: int = 1,
    channels: int = 128,
    element_bytes: int = 2,
    streams: int = 2,
) -> Timeline:
    """The steps of one block's attention over `streams` projections; mode is "forward" or "backward". Pure."""
    ranks, backward = ulysses * ring, mode == "backward"
    unit = round(batch * tokens / ranks * heads * channels) * element_bytes
    wide = unit // element_bytes * max(4, element_bytes)
    flops = 4 * batch * tokens**2 * heads * channels / ranks
    attention_s = 2.5 * flops / BACKWARD_FLOPS_PER_S if backward else flops / FORWARD_FLOPS_PER_S
    across, around = link.between(ulysses), link.between(ranks)
    clock = _Clock()

    def all_to_all(name: str, tensors: int, with_lse: bool) -> None:
        if ulysses > 1:
            messages = 2 * (ulysses - 1) * (tensors + with_lse) * batch
            clock.post(name, tensors * unit * (ulysses - 1) // ulysses, messages, across)
            clock.wait()

    copied = ulysses > 1 or streams > 1
    if copied and backward:
        clock.move("copy", "out, dout", 4 * unit)
    all_to_all("q, k, v, out, dout" if backward else "q, k, v", 5 if backward else 3, with_lse=backward)
    for step in range(ring):
        passed = (["k, v"] if step < ring - 1 else []) + (["dk, dv"] if backward and step else [])
        if passed:
            sent = (2 * unit if "k, v" in passed else 0) + (2 * wide if "dk, dv" in passed else 0)
            clock.post(", ".join(passed), sent, 4 * len(passed), around)
        clock.work("attention", f"block {step + 1} of {ring}", attention_s / ring)
        clock.wait()
        if step:
            clock.move("sum", "dq, dk, dv" if backward else "out", 3 * wide * (3 if backward else 1))
    if backward and ring > 1:
        clock.post("dk, dv", 2 * wide, 4, around)
        clock.wait()
    all_to_all("dq, dk, dv" if backward else "out", 3 if backward else 1, with_lse=not backward)
    if copied and not backward:
        clock.move("copy", "out", 2 * unit)
    return clock.end()


def temporary_bytes(
    tokens: int, heads: int, ulysses: int, ring: int, *, batch: int = 1, channels: int = 128, element_bytes: int = 2
) -> int:
    """The most that the backward of text and video holds at once beside what is saved, and beside attention's own.

    The all-to-all: q, k, v, out and its gradient, grouped and whole. The ring: q, out and its gradient, k and v of the
    block at hand and of one that arrives (none does in the last step); in float32 dq and its part, and of dk and dv
    what leaves, what arrives and this block's part. On NCCL the allocator reuses what was sent or received only once
    the device is past the exchange, so that a host which is far ahead may hold some of it for longer.
    """
    elements = round(batch * tokens / (ulysses * ring) * heads * channels)
    narrow, wide = elements * element_bytes, elements * max(4, element_bytes)
    if ring == 1:
        return (10 if ulysses > 1 else 8) * narrow
    return (7 if ring > 2 else 5) * narrow + 8 * wide


def choose_context_parallel(
    tokens: int,
    heads: int,
    ranks: int,
    link: Link = NVLINK,
    memory: int | None = None,
    *,
    batch: int = 1,
    channels: int = 128,
    element_bytes: int = 2,
) -> ContextPlan:
    """The mesh for attention over `tokens` of `heads` on `ranks`, with the modelled timelines and the reason. Pure.

    memory: bytes that a rank can spare for temporaries, None for any number. The all-to-all alone is taken where it is
    possible and within `NEAR` of the best. ValueError where no mesh is possible.
    """
    if min(tokens, heads, ranks) < 1:
        raise ValueError(f"tokens={tokens}, heads={heads}, ranks={ranks}; each must be at least 1")
    sizes = {"batch": batch, "channels": channels, "element_bytes": element_bytes}
    plans, rejected = [], []
    for ulysses in _divisors(ranks):
        ring = ranks // ulysses
        needed = temporary_bytes(tokens, heads, ulysses, ring, **sizes)
        if heads % ulysses:
            rejected.append(f"{_label(ulysses, ring)}: {heads} heads do not divide by {ulysses}")
        elif memory is not None and needed > memory:
            spared = f"{needed / 2**30:.1f} GiB needed, {memory / 2**30:.1f} GiB to spare"
            rejected.append(f"{_label(ulysses, ring)}: {spared}")
        else:
            forward, backward = (
                timeline(mode, tokens, heads, ulysses, ring, link, **sizes) for mode in ("forward", "backward")
            )
            plans.append(ContextPlan(ulysses, ring, forward, backward, needed, reason=""))
    if not plans:
        raise ValueError(f"no mesh of ranks={ranks} is possible: {'; '.join(rejected)}; use other ranks or more memory")
    best = min(plans, key=lambda plan: plan.total_s)
    default = plans[0] if plans[0].ring == 1 else None
    if default is not None and default.total_s <= best.total_s * (1 + NEAR):
        chosen = default
        why = "the default: attention runs alone, with the results of one rank"
    elif default is not None:
        chosen = best
        why = f"the all-to-all alone would take {_percent(default, best)} longer on {link.between(ranks).name}"
    else:
        chosen = best
        why = f"the all-to-all alone is not possible ({rejected[0].partition(': ')[2]})"
    exposed_ms, total_ms = 1e3 * (chosen.forward.exposed_s + chosen.backward.exposed_s), 1e3 * chosen.total_s
    label = _label(chosen.ulysses, chosen.ring)
    reason = f"{label}: {why}; {exposed_ms:.2f} of {total_ms:.2f} ms exposed (modelled)"
    rejected += [
        f"{_label(plan.ulysses, plan.ring)}: {_percent(plan, chosen)} longer" for plan in plans if plan is not chosen
    ]
    return ContextPlan(
        chosen.ulysses, chosen.ring, chosen.forward, chosen.backward, chosen.temporary_bytes, reason, tuple(rejected)
    )


def _divisors(ranks: int) -> Iterator[int]:
    """Sizes of the all-to-all, the largest first."""
    return (size for size in range(ranks, 0, -1) if ranks % size == 0)


def _label(ulysses: int, ring: int) -> str:
    return f"ulysses {ulysses} x ring {ring}"


def _percent(plan: ContextPlan, other: ContextPlan) -> str:
    return f"{100 * (plan.total_s / other.total_s - 1):.1f} %"
