"""The velocity task over ranks that share a batch: one process's loss and gradients, and every clip encoded once."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from opensora_fast.conditions import encoded_pieces
from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.kernels.context_parallel import ContextParallel, context_of
from opensora_fast.kernels.flow_mix import velocity_loss
from opensora_fast.mmdit import MMDiT
from opensora_fast.sequence_shards import axes, gather, shard
from opensora_fast.train.cache_reader import EncodedBatch
from opensora_fast.train.config import DiffusionRecipe
from opensora_fast.train.diffusion import VelocityTask
from opensora_fast.train.gradient_reduction import reduce_gradients
from opensora_fast.train.recipes import find_recipe

FILE = "train/test_diffusion_ranks.py"
CPU = torch.device("cpu")
MODEL = MMDiTConfig(
    in_channels=16,
    vec_in_dim=6,
    context_in_dim=10,
    hidden_size=96,
    num_heads=6,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
)
VIDEO = (20, 48, 80)  # 5 x 3 x 5 tokens: no number of ranks divides them
ONE_TOKEN = (1, 16, 16)
CONDITIONS = {"t2v": 1.0, "i2v_head": 1.0, "i2v_loop": 1.0}
context = functools.cache(context_of)  # on a rank: that of (ulysses, ring)


class Cells:
    """An autoencoder of 4 x 8 x 8 whose latent is a cell's mean colour, mixed into four channels; counts its clips."""

    latent_channels, compression, causal = 4, (4, 8, 8), False

    def __init__(self) -> None:
        self.clips: list[int] = []

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        self.clips.append(len(video_BCTHW))
        frames = min(4, video_BCTHW.shape[2])
        cells = torch.nn.functional.avg_pool3d(video_BCTHW, (frames, 8, 8))
        mixing = torch.arange(12.0).view(4, 3).sin()
        return 3 * torch.einsum("dc,bcthw->bdthw", mixing, cells)


class Letters:
    """Text encoders that spell; they count their prompts."""

    def __init__(self) -> None:
        self.prompts: list[int] = []

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        self.prompts.append(len(prompts))
        letters = torch.tensor([[float(ord(letter)) for letter in prompt[:5].ljust(5)] for prompt in prompts])
        features = torch.arange(1, MODEL.context_in_dim + 1)
        return (letters[:, :, None] * features).sin(), (letters.sum(1)[:, None] * features[: MODEL.vec_in_dim]).cos()

    def null(self) -> tuple[Tensor, Tensor]:
        return self.encode([""])


def recipe() -> DiffusionRecipe:
    return dataclasses.replace(find_recipe("demo_stage2"), model=MODEL, condition_weights=CONDITIONS)


def task(here: ContextParallel | None) -> VelocityTask:
    torch.manual_seed(0)
    model = MMDiT(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return VelocityTask(recipe(), model, Cells(), Letters(), CPU, torch.float32, here)


def batch(clips: int, size: tuple[int, int, int]) -> SimpleNamespace:
    video = torch.rand(clips, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    names = [f"{number} rabbits" for number in range(clips)]
    fps = torch.full((clips,), 25.0)
    motion = [None] * clips
    return SimpleNamespace(video_BCTHW=video, text=names, paths=names, fps=fps, motion=motion, encoded=None)


def stored_batch(clips: int, size: tuple[int, int, int]) -> SimpleNamespace:
    """The same from a cache: no pixels."""
    of, autoencoder, text = batch(clips, size), Cells(), Letters()
    txt_BLD, vec_BD = text.encode([f"{name}. 25 FPS." for name in of.text])
    null_txt_1LD, null_vec_1D = text.null()
    pieces = encoded_pieces(CONDITIONS, autoencoder, size[0])
    of.encoded = EncodedBatch(
        latent_BCTHW=autoencoder.encode(of.video_BCTHW),
        txt_BLD=txt_BLD,
        vec_BD=vec_BD,
        null_txt_1LD=null_txt_1LD,
        null_vec_1D=null_vec_1D,
        references={piece: autoencoder.encode(piece.of(of.video_BCTHW)) for piece in pieces},
    )
    of.video_BCTHW = of.video_BCTHW.to("meta")
    return of


def step(here: ContextParallel | None, clips: int, size: tuple[int, int, int], steps: int, batch=batch):
    """Loss, tokens and gradients of the last of some steps, held-out loss, and what was encoded here until then."""
    of = task(here)
    for number in range(steps):
        of.model.zero_grad()
        loss, tokens = of.loss(batch(clips, size), torch.Generator().manual_seed(number))
        loss.backward()
    reduce_gradients(of.model.parameters(), [] if here is None else axes(here))
    encoded = (list(of.autoencoder.clips), list(of.text.prompts))
    gradients = {name: parameter.grad for name, parameter in of.model.named_parameters()}
    return loss.item(), tokens, gradients, of.evaluate([batch(clips, size)]), encoded


def step_of_rank(ulysses: int, ring: int, clips: int, size: tuple[int, int, int], steps: int):
    return step(context(ulysses, ring), clips, size, steps)


def stored_step_of_rank(ulysses: int, ring: int, clips: int, size: tuple[int, int, int], steps: int):
    return step(context(ulysses, ring), clips, size, steps, stored_batch)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [VIDEO, ONE_TOKEN], ids=["video", "one token"])
@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (3, 1), (2, 2)], ids="{0[0]}x{0[1]}".format)
def test_ranks_have_one_process_loss_and_gradients(ranks, mesh, clips, size):
    loss, tokens, gradients, heldout, alone = step(None, clips, size, steps=2)
    answers = ranks(mesh[0] * mesh[1]).run(f"{FILE}:step_of_rank", *mesh, clips, size, 2)
    for ours in answers:
        assert ours[0] == pytest.approx(loss, rel=1e-6)
        assert ours[1] == tokens
        assert ours[3] == pytest.approx(heldout, rel=1e-6)
        for name, expected in gradients.items():
            if expected.any():
                assert relative(ours[2][name], expected) < 1e-5, name
            else:
                assert not ours[2][name].any(), name
    for which in (0, 1):  # clips, prompts: as many as one process encodes, each by one rank
        assert sum(sum(encoded[which]) for *_, encoded in answers) == sum(alone[which])


def test_a_stored_batch_gives_the_same_without_encoders(ranks):
    loss, tokens, gradients, heldout, _ = step(None, 3, VIDEO, steps=2)
    alone = step(None, 3, VIDEO, 2, stored_batch)
    assert alone[0] == pytest.approx(loss, rel=1e-6)
    assert (alone[1], alone[4]) == (tokens, ([], []))
    for ours in ranks(2).run(f"{FILE}:stored_step_of_rank", 2, 1, 3, VIDEO, 2):
        assert ours[0] == pytest.approx(loss, rel=1e-6)
        assert ours[3] == pytest.approx(heldout, rel=1e-6)
        assert ours[4] == ([], [])
        for name, expected in gradients.items():
            assert not expected.any() or relative(ours[2][name], expected) < 1e-5, name


def encoders_of_rank(clips: int, steps: int):
    of = task(context(2, 1))
    of.recipe = dataclasses.replace(of.recipe, condition_weights={"t2v": 1.0})
    for number in range(steps):
        of.loss(batch(clips, VIDEO), torch.Generator().manual_seed(number))
    return of.autoencoder.clips, of.text.prompts


def test_with_one_clip_the_encoders_are_on_different_ranks(ranks):
    first, after_two_more = (ranks(2).run(f"{FILE}:encoders_of_rank", 1, steps) for steps in (1, 3))
    more = [
        tuple(len(now) - len(then) for now, then in zip(*of_rank, strict=True))
        for of_rank in zip(after_two_more, first, strict=True)
    ]
    assert sorted(more) == [(0, 2), (2, 0)]
    assert sum(sum(prompts) for _, prompts in first) == 2  # the clip's, and once the empty one


def refusal(seed_by_rank: list[int], clips_by_rank: list[int]) -> str:
    here = context(1, 3)
    generator = torch.Generator().manual_seed(seed_by_rank[here.rank])
    with pytest.raises(UserError) as refused:
        task(here).loss(batch(clips_by_rank[here.rank], ONE_TOKEN), generator)
    return str(refused.value)


def test_ranks_that_would_draw_or_hold_something_else_are_named(ranks):
    for answer in ranks(3).run(f"{FILE}:refusal", [7, 7, 8], [1, 1, 1]):
        assert answer.startswith(
            "rank 2 of a context-parallel group has another batch, generator, model or dtype than rank 0: "
        )
    for answer in ranks(3).run(f"{FILE}:refusal", [7, 7, 7], [1, 2, 1]):
        assert answer.startswith("rank 1 ")


TOKENS = 75  # on two ranks: 38 and 37


def narrow_velocities() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    velocity, target = (torch.randn(2, TOKENS, 16, generator=generator) for _ in range(2))
    return velocity.bfloat16(), target


def gradient_of_velocities() -> Tensor:
    here = context(2, 1)
    velocity_BND, target_BND = narrow_velocities()
    part_BND = shard(velocity_BND, here.rank, here.size).clone().requires_grad_()
    task(here)._mean_error(part_BND, target_BND).backward()
    return gather(part_BND.grad, TOKENS, here)


def test_no_weight_of_a_rank_is_rounded_to_the_velocities_dtype(ranks):
    """38/75 in bfloat16 would be off by 0.2 %, for all tokens of a rank."""
    velocity_BND, target_BND = narrow_velocities()
    velocity_BND.requires_grad_()
    velocity_loss(velocity_BND, target_BND).backward()
    for gradient in ranks(2).run(f"{FILE}:gradient_of_velocities"):
        for rank in range(2):
            ours, whole = (shard(x, rank, 2).double() for x in (gradient, velocity_BND.grad))
            assert abs(ours.norm() / whole.norm() - 1) < 2e-4
            assert relative(ours, whole) < 2**-9
