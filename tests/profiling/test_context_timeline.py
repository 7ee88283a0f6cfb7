"""The modelled timelines: sums that agree, figures that others computed, and what is printed and written of them."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch._subclasses import FakeTensorMode

from opensora_fast.config import MMDIT_PRESETS
from opensora_fast.kernels.context_plan import NVLINK
from opensora_fast.profiling.block import KINDS, block_call, traffic
from opensora_fast.profiling.context_timeline import (
    MODES,
    SCHEMES,
    SHAPES,
    Share,
    bars,
    block_timeline,
    gantt,
    hidden_s,
    main,
    pieces,
    views,
)
from opensora_fast.profiling.hardware import H200

CLIP_256PX, CLIP_768PX = SHAPES.values()
ALL = list(product(KINDS, MODES, SHAPES.values(), [*SCHEMES.values(), (2, 2)]))
SLOW_LINK = replace(NVLINK, bytes_per_s=5e9)


@pytest.mark.parametrize("link", [NVLINK, SLOW_LINK], ids=["nvlink", "slow"])
def test_pieces_add_up_and_nothing_hides_longer_than_what_it_hides_under(link):
    for kind, mode, shape, mesh in ALL:
        timeline = block_timeline(kind, mode, shape, mesh, link=link)
        parts = pieces(timeline)
        computed = sum(piece.seconds for piece in parts if not piece.exchange)
        hidden = sum(piece.hidden for piece in parts)
        exposed = sum(piece.seconds - piece.hidden for piece in parts if piece.exchange)
        assert computed == pytest.approx(timeline.compute_s)
        assert hidden == pytest.approx(timeline.hidden_s)
        assert exposed == pytest.approx(timeline.exposed_s, abs=1e-12)
        assert computed + exposed == pytest.approx(timeline.total_s)
        for step in timeline.steps:
            if step.kind == "exchange":
                assert 0 <= hidden_s(timeline, step) <= step.duration_s * (1 + 1e-9)
        attention = sum(step.duration_s for step in timeline.steps if step.kind in ("attention", "sum"))
        assert hidden <= attention
        assert mesh != (4, 1) or hidden == pytest.approx(0, abs=1e-12)


def test_steps_of_a_lane_do_not_overlap():
    for kind, mode, shape, mesh in ALL:
        steps = block_timeline(kind, mode, shape, mesh).steps
        for exchange in (False, True):
            lane = [step for step in steps if (step.kind == "exchange") == exchange]
            for one, following in zip(lane, lane[1:], strict=False):
                assert following.start_s >= one.end_s * (1 - 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_all_to_all_exposes_what_its_bytes_take(kind):
    """3/4 of a [1, 19136, 3072] tensor 8 times, at 370 GB/s: 1.9 ms; and 4 times more in what travels again."""
    exposed = {mode: block_timeline(kind, mode, CLIP_768PX, (4, 1)).exposed_s for mode in MODES}
    assert exposed["forward"] == pytest.approx(0.95e-3, rel=0.03)
    assert exposed["backward"] == pytest.approx(2 * exposed["forward"], rel=0.03)
    assert 8 / 12 * sum(exposed.values()) == pytest.approx(1.9e-3, rel=0.03)


def test_the_ring_sends_the_bytes_of_its_blocks_and_of_their_gradients():
    sent = {
        mode: sum(piece.sent for piece in pieces(block_timeline("double", mode, CLIP_768PX, (1, 4)))) for mode in MODES
    }
    assert sent["forward"] == pytest.approx(705e6, rel=0.01)
    assert sent["backward"] == pytest.approx(2587e6, rel=0.01)


def test_no_token_is_lost_where_ranks_do_not_divide_them():
    """512 and 76,032 tokens on 5 ranks: the busiest has 103 and 15,207."""
    ring = block_timeline("double", "forward", CLIP_768PX, (1, 5))
    assert sum(step.bytes for step in ring.steps if step.kind == "exchange") == 4 * 2 * (103 + 15207) * 3072 * 2
    assert block_timeline("double", "forward", (1, 515, 76035), (1, 5)).total_s == pytest.approx(ring.total_s)


def test_attention_takes_what_the_published_rates_say():
    for mesh in SCHEMES.values():
        seconds = [
            piece.seconds
            for mode in MODES
            for piece in pieces(block_timeline("single", mode, CLIP_768PX, mesh))
            if piece.name == "attention"
        ]
        assert seconds == pytest.approx([26.1e-3, 75.0e-3], rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_block_takes_what_its_kernels_are_counted_to_take(kind):
    batch, text, video = CLIP_256PX
    config = MMDIT_PRESETS["open-sora-v2"]
    with FakeTensorMode():
        counted = traffic(
            block_call(kind, config, batch=batch, text=text, video=video, dtype=torch.bfloat16).fused
        ).seconds
    products = 2 * batch * (text + video) ** 2 * config.hidden_size
    counted -= 2 * products / H200.attention_forward_flops + 5 * products / H200.attention_backward_flops
    streams = (text, video) if kind == "double" else [text + video]
    share = Share(kind=kind, batch=batch, streams=streams, config=config, hardware=H200)
    modelled = share.projection() + share.rest() + share.projection(backward=True) + share.rest(backward=True)
    modelled += 2 * share.rotation("forward") + share.rotation("backward")
    assert modelled == pytest.approx(counted, rel=0.1)


def test_bars_show_every_step_where_it_is():
    timeline = block_timeline("double", "forward", CLIP_768PX, (4, 1))
    compute, exchange = bars(timeline, timeline.total_s / 96)
    assert re.fullmatch("n+r +A+ *p+", compute)
    assert re.fullmatch(" +#+ +#+", exchange)
    hidden = bars(block_timeline("double", "forward", CLIP_768PX, (1, 4)), timeline.total_s / 96)[1]
    assert set(hidden) == {" ", "="}


def test_says_that_everything_is_modelled_and_where_constants_come_from(capsys):
    assert main() == 0
    said = capsys.readouterr().out
    for name in SHAPES:
        assert f"{name}; 4 ranks; modelled, nothing was run" in said
    for words in ("370 GB/s", "cudnn-frontend", "assumed", "prime-rl", "double block, backward, ring: "):
        assert words in said


def test_the_page_stands_alone_and_draws_every_step(tmp_path, capsys):
    path = tmp_path / "new" / "timeline.html"
    assert main(path) == 0
    assert f"timeline {path}" in capsys.readouterr().out
    page = path.read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    pictures = re.findall(r"<svg viewBox=.*?role=.*?</svg>", page)
    shown = [view for shape in SHAPES.values() for view in views(shape)]
    assert pictures == [gantt(view) for view in shown]
    for picture, view in zip(pictures, shown, strict=True):
        boxes = ElementTree.fromstring(picture).findall("rect")
        assert len(boxes) == sum(len(timeline.steps) for timeline in view.timelines.values())
        assert all(float(box.get("x")) >= 0 and float(box.get("width")) > 0 for box in boxes)
        assert all(float(box.get("x")) + float(box.get("width")) <= 920.1 for box in boxes)
