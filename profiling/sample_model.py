"""Seconds of a video by phase, modelled: what `bench sample` shows where there is no GPU to measure.

    text      T5 and CLIP on the prompt and on the empty one, each alone, on one GPU: per product the larger of its
              arithmetic and of reading its matrix
    denoise   the blocks' timelines of `context_timeline` for every step, with the passes of guidance dealt out to
              groups of GPUs and each sequence shared within a group, as `sampling_ranks` does; then the sum over groups
    decode    the kernels of the autoencoder, counted on fake tensors as in `block`, on the GPU that has most tiles;
              then the tiles' way to all GPUs

Rates are those of `profiling.hardware` and `kernels.context_plan`, with their sources; nothing is measured. Not in the
model: launches, loading weights, allocation, writing the file, and clocks that fall under load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from opensora_fast.kernels import modulated_norm
from opensora_fast.kernels.context_parallel import choose_context_parallel
from opensora_fast.kernels.context_plan import NVLINK, Link
from opensora_fast.profiling.block import forward_traffic
from opensora_fast.profiling.context_timeline import DTYPE, Share, block_timeline
from opensora_fast.profiling.hardware import H200, Hardware
from opensora_fast.profiling.sample_cases import SampleCase, TextSizes
from opensora_fast.sampling_ranks import deal, split
from opensora_fast.sequence_shards import shard_lengths

BY = (
    f"modelled for {H200.name} by profiling.sample_model: blocks by kernels' cost() and context_plan at "
    f"{H200.attention_forward_flops / 1e12:g} TFLOP/s of attention, {H200.matmul_flops / 1e12:g} of products "
    f"(assumed), {H200.convolution_flops / 1e12:g} of convolutions, {H200.copy_bytes / 1e12:g} TB/s of memory "
    f"(assumed), {NVLINK.bytes_per_s / 1e9:g} GB/s between GPUs; nothing was run"
)


def modelled(case: SampleCase, hardware: Hardware = H200, link: Link = NVLINK) -> dict[str, float]:
    """Seconds by phase. Raises UserError where the autoencoder cannot be built to be counted."""
    return {
        "text": text_seconds(case, hardware),
        "denoise": denoise_seconds(case, hardware, link),
        "decode": decode_seconds(case, hardware, link),
    }


def text_seconds(case: SampleCase, hardware: Hardware = H200) -> float:
    """Of both encoders on two prompts, one after the other."""
    return sum(2 * _encoder_seconds(sizes, case, hardware) for sizes in (case.models.t5, case.models.clip))


def _encoder_seconds(sizes: TextSizes, case: SampleCase, hardware: Hardware) -> float:
    share = Share(kind="single", batch=1, streams=[sizes.tokens], config=case.config, hardware=hardware)
    rows = sizes.tokens
    attention = 4 * rows**2 * sizes.inner / hardware.attention_forward_flops
    projections = share.products(rows, sizes.width, 3 * sizes.inner) + share.products(rows, sizes.inner, sizes.width)
    mlp = share.products(rows, sizes.width, sizes.mlp * (1 + sizes.gated)) + share.products(
        rows, sizes.mlp, sizes.width
    )
    return sizes.layers * (attention + projections + mlp)


def denoise_seconds(case: SampleCase, hardware: Hardware = H200, link: Link = NVLINK) -> float:
    """Of all steps, and of the modulation that is computed before the first."""
    passes = case.passes()
    seconds = {number: step_seconds(case, number, hardware, link) for number in set(passes)}
    return modulation_seconds(case, hardware) + sum(seconds[number] for number in passes)


def modulation_seconds(case: SampleCase, hardware: Hardware = H200) -> float:
    """One product for all steps of the prompt and the empty one in every block, on every GPU alike."""
    config = case.config
    share = Share(kind="single", batch=1, streams=[0], config=config, hardware=hardware)
    D, rows = config.hidden_size, 2 * case.steps
    double, single, final = (share.products(rows, D, chunks * D) for chunks in (6, 3, 2))
    return 2 * config.depth * double + config.depth_single_blocks * single + final


def step_seconds(case: SampleCase, passes: int, hardware: Hardware = H200, link: Link = NVLINK) -> float:
    """Of one step with so many passes, on the busiest GPU."""
    config, text, video = case.config, case.models.t5.tokens, case.video_tokens
    groups = split(passes, case.gpus)
    members, rows = case.gpus // groups, passes // groups
    mesh = choose_context_parallel(text + video, config.num_heads, members, link, batch=rows, channels=config.head_dim)
    blocks = sum(
        depth
        * block_timeline(
            kind,
            "forward",
            (rows, text, video),
            (mesh.ulysses, mesh.ring),
            config=config,
            hardware=hardware,
            link=link,
        ).total_s
        for kind, depth in (("double", config.depth), ("single", config.depth_single_blocks))
    )
    texts, videos = (shard_lengths(tokens, members)[0] for tokens in (text, video))
    share = Share(kind="single", batch=rows, streams=[texts + videos], config=config, hardware=hardware)
    D, C = config.hidden_size, config.in_channels
    ends = (
        share.products(rows * videos, C, D)
        + share.products(rows * videos, config.cond_channels, D)
        + share.products(rows * texts, config.context_in_dim, D)
        + share.passes(modulated_norm.cost((rows, videos, D), DTYPE, "forward"))
        + share.products(rows * videos, D, C)
    )
    return blocks + ends + _gather_seconds(4 * videos * C * (case.gpus - 1), case.gpus, link)


def decode_seconds(case: SampleCase, hardware: Hardware = H200, link: Link = NVLINK) -> float:
    """Of the GPU with most tiles; the cross-fades run on every GPU alike."""
    tiles, sizes, rest, gathered = _decode_tiles(case.model, case.latent_thw, hardware)
    busiest = max(sum(tiles[index] for index in mine) for mine in deal(sizes, case.gpus))
    return busiest + rest + (_gather_seconds(gathered, case.gpus, link) if len(tiles) > 1 else 0.0)


def _gather_seconds(received: int, gpus: int, link: Link) -> float:
    """What a GPU receives from the others in one exchange."""
    along = link.between(gpus)
    return received / along.bytes_per_s + along.latency_s if gpus > 1 else 0.0


@cache
def _decode_tiles(
    model: str, latent_thw: tuple[int, int, int], hardware: Hardware
) -> tuple[tuple[float, ...], tuple[int, ...], float, int]:
    """Seconds and numbers of each tile in the order of the runner; seconds of all else; bytes of the tiles' outputs.

    Tiles of one size cost the same, so that one of each size is counted.
    """
    autoencoder = SampleCase(model=model, resolution="256px", frames=1, steps=1, gpus=1).autoencoder()
    known: dict[torch.Size, tuple[float, Tensor]] = {}
    tiles: list[float] = []
    sizes: list[int] = []
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        forward_traffic(hardware) as total,
    ):

        def run_tiles(apply: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
            outputs = []
            for x in inputs:
                if x.shape not in known:
                    before = total.seconds
                    known[x.shape] = 0.0, apply(x)
                    known[x.shape] = total.seconds - before, known[x.shape][1]
                seconds, out = known[x.shape]
                tiles.append(seconds)
                sizes.append(x.numel())
                outputs.append(torch.empty_like(out))
            return outputs

        autoencoder = autoencoder.to_empty(device="cpu")
        autoencoder.run_tiles = run_tiles
        begun = total.seconds
        video = autoencoder.decode(torch.empty((1, autoencoder.latent_channels, *latent_thw), dtype=DTYPE))
        whole = total.seconds - begun
    counted = sum(seconds for seconds, _ in known.values())
    return tuple(tiles) or (whole,), tuple(sizes) or (1,), whole - counted if tiles else 0.0, video.nbytes
