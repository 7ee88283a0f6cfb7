"""Several ranks make one video: that of one process. They share text, tiles and errors, on real gloo ranks."""

import functools
from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.compiled_blocks import compile_blocks
from opensora_fast.config import MMDiTConfig, VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.flow import sampling_schedule
from opensora_fast.mmdit import MMDiT
from opensora_fast.process_group import joined, leave
from opensora_fast.sampling import denoise, sample
from opensora_fast.sampling_ranks import AgreedError, SamplingRanks, deal, split
from opensora_fast.sampling_settings import SamplingSettings
from opensora_fast.text import SharedTextEncoders
from opensora_fast.tiling import BatchedTiles

FILE = "opensora_fast/test_sampling_ranks.py"
SIZES = [1, 2, 3, 4]
EXACT = 1e-5  # float32
SETTINGS = SamplingSettings(resolution="64px", aspect_ratio="1:1", frames=16, steps=12)  # oscillates in the last two


@functools.cache
def here() -> SamplingRanks:
    """On a rank: its sampling ranks."""
    return SamplingRanks(torch.device("cpu"))


@functools.cache
def models() -> tuple[MMDiT, VideoDCAE]:
    """The same in every process; fresh transformers predict zero."""
    torch.manual_seed(0)
    config = MMDiTConfig(
        in_channels=16,
        vec_in_dim=12,
        context_in_dim=10,
        hidden_size=64,
        num_heads=4,
        depth=1,
        depth_single_blocks=1,
        axes_dim=(4, 6, 6),
    )
    model, autoencoder = MMDiT(config).eval(), small_autoencoder()
    for parameter in (*model.requires_grad_(False).parameters(), *autoencoder.parameters()):
        inputs = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.copy_(torch.randn_like(parameter) / inputs**0.5)
    return model, autoencoder


def small_autoencoder() -> VideoDCAE:
    """Compresses 4 frames and 8 x 8 pixels; decodes videos of more than 32 pixels or 8 frames in tiles."""
    config = VideoDCAEConfig(
        latent_channels=4,
        encoder_widths=(8, 8, 16, 16),
        decoder_widths=(8, 8, 16, 16),
        encoder_depths=(1, 1, 1, 1),
        decoder_depths=(1, 1, 1, 1),
        encoder_block_types=("ResBlock",) * 3 + ("EViTS5_GLU",),
        decoder_block_types=("ResBlock",) * 3 + ("EViTS5_GLU",),
        temporal_downsample=(False, True, True, False),
        heads_dim=8,
        scaling_factor=1.0,
        use_spatial_tiling=True,
        use_temporal_tiling=True,
        spatial_tile_size=32,
        temporal_tile_size=8,
    )
    return VideoDCAE(config).requires_grad_(False).eval()


class Letters:
    """Text encoders that know a prompt by its length; five tokens."""

    def encode(self, prompts):
        generator = torch.Generator()
        drawn = [torch.randn(5, 12, generator=generator.manual_seed(len(prompt))) for prompt in prompts]
        return torch.stack([txt[:, :10] for txt in drawn]), torch.stack([txt[0] for txt in drawn])

    def null(self):
        return self.encode([""])


def split_exhaustively(passes: int, ranks: int) -> int:
    """The definition: the least ceil(passes / g) g, of equals the largest g."""
    ways = [g for g in range(1, ranks + 1) if ranks % g == 0 and g <= passes]
    return max(ways, key=lambda g: (-(-(-passes // g) * g), g))


@given(passes=st.integers(1, 6), ranks=st.integers(1, 16))
def test_groups_lose_nothing(passes, ranks):
    groups = split(passes, ranks)
    assert groups == split_exhaustively(passes, ranks)
    assert passes % groups == 0
    assert ranks % groups == 0


def planned(passes: int):
    plan = here().plan(passes, tokens=40, heads=4)
    context = (plan.context.rank, plan.context.size) if plan.context else (0, 1)
    return plan.groups, list(plan.my_passes), context


def test_a_pass_that_guidance_skips_frees_its_ranks(ranks):
    one, two, three = (ranks(4).run(f"{FILE}:planned", passes) for passes in (1, 2, 3))
    assert one == [(1, [0], (place, 4)) for place in range(4)]
    assert two == [(2, [group], (place, 2)) for group in range(2) for place in range(2)]
    assert three == [(1, [0, 1, 2], (place, 4)) for place in range(4)]
    assert ranks(3).run(f"{FILE}:planned", 3) == [(3, [group], (0, 1)) for group in range(3)]


# The video.

PROMPTS = ["rain", "a storm at sea"]


def request(condition: str) -> dict:
    pixels = torch.rand(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return {
        "condition": condition,
        "head_BCFHW": pixels if condition == "i2v_head" else None,
        "negative_prompts": ["blurry"],
    }


def sampled(condition: str):
    """The video, its last clean latent and the steps that were told; this rank alone where there is no group."""
    ranks = here() if dist.is_initialized() else None
    model, autoencoder = models()
    autoencoder.run_tiles = ranks.tiles_over(BatchedTiles(2)) if ranks else BatchedTiles()
    text = Letters() if ranks is None or ranks.rank == 0 else None
    steps, latents = [], []

    def on_latent(step: int, latent: torch.Tensor) -> None:
        latents.append((step, latent))

    video = sample(
        model,
        autoencoder,
        text,
        PROMPTS,
        SETTINGS,
        **request(condition),
        ranks=ranks,
        on_step=steps.append,
        on_latent=on_latent,
    )
    assert steps == [step for step, _ in latents] == list(range(1, SETTINGS.steps + 1))
    return video, latents[-1][1]


@functools.cache
def alone(condition: str):
    return sampled(condition)


@pytest.mark.parametrize("condition", ["t2v", "i2v_head"])
@pytest.mark.parametrize("size", SIZES)
def test_the_video_is_that_of_one_process(ranks, size, condition):
    video, latent = alone(condition)
    assert (video.abs() < 1).float().mean() > 0.5  # what is cut off at 1 is equal whatever it was
    results = ranks(size).run(f"{FILE}:sampled", condition)
    for rank_video, rank_latent in results:
        torch.testing.assert_close(rank_latent, latent, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(rank_video, video, rtol=EXACT, atol=EXACT)
        assert torch.equal(rank_latent, results[0][1])  # no rank drifts from another


def sampled_with_compiled_blocks(condition: str):
    """The last clean latent, and how many graphs this rank compiled."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, _ = models()
    forwards = {block: block.forward for block in (*model.double_blocks, *model.single_blocks)}
    compile_blocks(model, backend=backend)
    try:
        return sampled(condition)[1], len(graphs)
    finally:
        for block, forward in forwards.items():
            block.forward = forward
        torch._dynamo.reset()


def test_compiled_blocks_on_ranks_make_the_same_video(ranks):
    _, latent = alone("t2v")
    for rank_latent, graphs in ranks(2).run(f"{FILE}:sampled_with_compiled_blocks", "t2v"):
        torch.testing.assert_close(rank_latent, latent, rtol=EXACT, atol=EXACT)
        assert graphs == 2 * 2  # a double and a single block; a whole sequence and half of one


def test_the_video_is_not_of_noise_alone():
    """That equality above means something: the prompt, the condition and the decoder's tiles all matter."""
    video, latent = alone("t2v")
    conditioned, _ = alone("i2v_head")
    assert (video - conditioned).abs().max() > 0.1
    assert (video[0] - video[1]).abs().max() > 0.1
    assert 0.1 < latent.std() < 100


class Counted:
    """Counts the tokens that this rank computes; cheap."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None, *, context=None):
        self.tokens += img.shape[0] * img.shape[1]
        if context is not None:
            assert context.lengths[context.rank] == img.shape[1] + txt.shape[1]
        return 0.5 * img + 0.1 * y_vec.mean(1).view(-1, 1, 1) + img_ids.sum(-1, keepdim=True) / 100


def counted(conditioned: bool, size: int):
    ranks = here() if size > 1 else None
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(1, 1, 3, 4, 6)
    mask[:, :, 0] = 1
    model = Counted()
    latent = denoise(
        model,
        torch.randn(1, 4, 3, 4, 6, generator=generator),
        timesteps=sampling_schedule(50, 6, 3),
        txt=torch.randn(1, 5, 8, generator=generator),
        vec=torch.randn(1, 7, generator=generator),
        null_txt=torch.zeros(1, 5, 8),
        null_vec=torch.zeros(1, 7),
        mask=mask if conditioned else None,
        reference=mask.expand(-1, 4, -1, -1, -1) if conditioned else None,
        guidance_txt=7.5,
        guidance_img=3.0,
        oscillate_txt=True,
        oscillate_img=True,
        dynamic_img_guidance=True,
        ranks=ranks,
    )
    return model.tokens, latent


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("conditioned", "passes"), [(False, 80), (True, 110)])
def test_the_ranks_share_the_passes_of_one_process(ranks, conditioned, passes, size):
    tokens_of_one, latent = counted(conditioned, 1)
    assert tokens_of_one == passes * 3 * 2 * 3
    results = ranks(size).run(f"{FILE}:counted", conditioned, size)
    shares = [tokens for tokens, _ in results]
    assert sum(shares) == tokens_of_one  # nothing is computed twice
    assert max(shares) - min(shares) <= passes  # nobody is idle: parts of a sequence differ by one token
    for _, rank_latent in results:
        torch.testing.assert_close(rank_latent, latent, rtol=EXACT, atol=EXACT)


# What ranks tell each other.


def shared():
    ranks = here()
    value = ranks.share({"prompt": "rain"} if ranks.rank == 0 else None)
    own = torch.full((2, 3), float(ranks.rank))
    tensors = [ranks.share_tensor(own if ranks.rank == source else None, source) for source in range(ranks.size)]
    narrow = ranks.share_tensor(torch.ones(3, 4, dtype=torch.bfloat16).t() if ranks.rank == 0 else None)
    return value, [float(x.mean()) for x in tensors], narrow.shape == (4, 3) and narrow.dtype == torch.bfloat16


def test_values_and_tensors_reach_every_rank(ranks):
    assert ranks(3).run(f"{FILE}:shared") == [({"prompt": "rain"}, [0.0, 1.0, 2.0], True)] * 3


def agreed(failing: list[int]):
    ranks = here()
    error = UserError(f"rank {ranks.rank} has no file") if ranks.rank in failing else None
    try:
        ranks.agree(error)
    except AgreedError as raised:
        return str(raised)
    return "went on"


def test_an_error_of_one_rank_is_that_of_all(ranks):
    assert ranks(3).run(f"{FILE}:agreed", []) == ["went on"] * 3
    assert ranks(3).run(f"{FILE}:agreed", [2]) == ["rank 2 has no file"] * 3
    assert ranks(3).run(f"{FILE}:agreed", [1, 2]) == ["rank 1 has no file"] * 3


def tiles_of(number: int):
    ran = []

    def apply(x: torch.Tensor) -> torch.Tensor:
        ran.append(int(x[0]))
        return torch.cat([x, x])[: 1 + int(x[0]) % 2].double()

    results = here().tiles(apply, [torch.tensor([float(index)]) for index in range(number)])
    return ran, [x.tolist() for x in results], {x.dtype for x in results}


def test_tiles_are_dealt_out_and_all_results_reach_all(ranks):
    expected = [[float(index)] * (1 + index % 2) for index in range(5)]
    results = ranks(3).run(f"{FILE}:tiles_of", 5)
    assert [ran for ran, _, _ in results] == [[0, 3], [1, 4], [2]]
    for _, tiles, dtypes in results:
        assert tiles == expected
        assert dtypes == {torch.float64}
    assert ranks(4).run(f"{FILE}:tiles_of", 2)[3] == ([], expected[:2], {torch.float64})  # fewer tiles than ranks
    assert ranks(3).run(f"{FILE}:tiles_of", 1) == [([0], expected[:1], {torch.float64})] * 3


def failing_tile():
    def apply(x: torch.Tensor) -> torch.Tensor:
        if x[0] == 1:
            raise MemoryError("tile 1 is too large")
        return x

    try:
        here().tiles(apply, [torch.tensor([float(index)]) for index in range(3)])
    except AgreedError as error:
        return f"{type(error).__name__}: {error}"


def test_a_tile_that_fails_ends_the_call_on_every_rank(ranks):
    expected = "AgreedError: tiles of the autoencoder failed on rank 1: MemoryError: tile 1 is too large"
    assert ranks(3).run(f"{FILE}:failing_tile") == [expected] * 3


@given(sizes=st.lists(st.integers(1, 100), max_size=20), size=st.integers(1, 8))
def test_no_rank_has_a_tile_more_than_it_must(sizes, size):
    dealt = deal(sizes, size)
    assert sorted(index for indexes in dealt for index in indexes) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in indexes) for indexes in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_narrow_tiles_are_not_all_one_ranks():
    """Whole tiles and narrow ones by turns: dealt out in turn, every other rank would have twice as much."""
    assert deal([2, 1] * 6, 4) == [[0, 8, 9], [2, 10, 11], [4, 1, 5], [6, 3, 7]]


def loaded():
    loads, asked = [], []

    class Asked(Letters):
        def encode(self, prompts):
            asked.append(prompts)
            return super().encode(prompts)

    def load():
        loads.append(here().rank)
        return Asked()

    text = SharedTextEncoders.load(load, here())
    encoded = text.encode(PROMPTS)
    null = text.null()
    assert torch.equal(text.null()[0], null[0])
    return loads, asked, [*encoded, *null]


def test_one_rank_loads_the_encoders_for_all(ranks):
    expected = [*Letters().encode(PROMPTS), *Letters().null()]
    for rank, (loads, asked, tensors) in enumerate(ranks(3).run(f"{FILE}:loaded")):
        assert loads == ([0] if rank == 0 else [])
        assert asked == ([PROMPTS, [""]] if rank == 0 else [])
        for tensor, wanted in zip(tensors, expected, strict=True):
            assert torch.equal(tensor, wanted)


def missing_encoders():
    def load():
        raise UserError("text encoder folder /none does not exist")

    try:
        SharedTextEncoders.load(load, here())
    except UserError as error:
        return str(error)


def test_encoders_that_rank_0_misses_are_an_error_of_all(ranks):
    assert ranks(2).run(f"{FILE}:missing_encoders") == ["text encoder folder /none does not exist"] * 2


def joined_within():
    with joined() as ranks:
        return (ranks.rank, ranks.size, leave(5)) if ranks else (None, leave(5))


def test_a_group_that_is_there_is_used_and_kept(ranks):
    for _ in range(2):
        assert ranks(2).run(f"{FILE}:joined_within") == [(0, 2, 5), (1, 2, 5)]
    assert joined_within() == (None, 5)


@pytest.mark.parametrize("negatives", [["a", "b", "c"], []])
def test_negative_prompts_of_another_number_are_refused(negatives):
    model, autoencoder = models()
    with pytest.raises(UserError, match=f"negative_prompts has {len(negatives)} entries for 2 prompts"):
        sample(model, autoencoder, Letters(), PROMPTS, SETTINGS, negative_prompts=negatives)


def test_a_negative_prompt_steers_and_an_empty_one_is_none():
    model, autoencoder = models()
    brief = replace(SETTINGS, steps=2)
    plain = sample(model, autoencoder, Letters(), ["rain"], brief)
    assert torch.equal(plain, sample(model, autoencoder, Letters(), ["rain"], brief, negative_prompts=[""]))
    away = sample(model, autoencoder, Letters(), ["rain"], brief, negative_prompts=["blurry"])
    assert (plain - away).abs().max() > 1e-3
