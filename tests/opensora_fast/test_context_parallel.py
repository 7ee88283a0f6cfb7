"""The diffusion transformer over ranks that share a sequence: the velocity and the gradients of one process.

Every rank gets its part of the text and the video, uneven where they do not divide, and computes the part of the mean
squared error that its own tokens have; the sum over ranks of the parts' gradients must be the gradient of the whole.
"""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.config import MMDiTConfig
from opensora_fast.kernels.context_parallel import ContextParallel, context_of
from opensora_fast.mmdit import MMDiT
from opensora_fast.positions import position_ids_THW
from opensora_fast.released import load_released_mmdit
from opensora_fast.sequence_shards import axes, gather, joint_lengths, shard
from opensora_fast.train.gradient_reduction import reduce_gradients

FILE = "opensora_fast/test_context_parallel.py"
B = 2
SHARDED = ("img", "img_ids", "txt", "txt_ids", "cond")
EXACT = 1e-5  # relative, float32
NOISE = 1e-7  # of a gradient that is zero but for rounding, in parts of the largest

# (ulysses, ring, heads): heads that ulysses divides, and that no ring size does
MESHES = [(2, 1, 4), (3, 1, 3), (4, 1, 4), (1, 2, 3), (1, 3, 4), (1, 4, 3), (2, 2, 2)]
MESH_IDS = [f"{ulysses}x{ring}" for ulysses, ring, _ in MESHES]
context = functools.cache(context_of)  # on a rank: that of (ulysses, ring)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How the model is called."""

    text: int = 2  # tokens: fewer than a group of 3 or 4 has ranks
    video: int = 13  # which no number of ranks divides
    recompute: bool = False
    modulated: bool = False  # with the modulation computed beforehand
    compiled: bool = False
    agreed: bool = True  # the lengths are given to the context


def config(heads: int) -> MMDiTConfig:
    return MMDiTConfig(
        in_channels=8,
        vec_in_dim=12,
        context_in_dim=10,
        hidden_size=16 * heads,
        num_heads=heads,
        depth=2,
        depth_single_blocks=2,
        axes_dim=(4, 6, 6),
    )


def random_model(heads: int) -> MMDiT:
    """The same on every rank; fresh models predict zero."""
    torch.manual_seed(0)
    model = MMDiT(config(heads))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


def random_inputs(heads: int, text: int, video: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "img": torch.randn(B, video, 8),
        "img_ids": position_ids_THW(1, 1, video).expand(B, -1, -1),
        "txt": torch.randn(B, text, 10),
        "txt_ids": torch.zeros(B, text, 3),
        "timesteps": torch.tensor([0.9, 0.25]),
        "y_vec": torch.randn(B, 12),
        "cond": torch.randn(B, video, config(heads).cond_channels),
    }


def velocity_of(model: MMDiT, inputs: dict[str, torch.Tensor], way: Way, here: ContextParallel | None) -> torch.Tensor:
    more = {"checkpoint_double": 1, "checkpoint_single": 9} if way.recompute else {}
    if way.modulated:
        more["modulation"] = model.modulation(inputs["timesteps"], inputs["y_vec"])
    if way.compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    return model(**inputs, **more, context=here)


def part_of_one_process(ulysses: int, ring: int, heads: int, options: dict):
    """On a rank: the velocity of all tokens, and all gradients after the reduction."""
    here, way = context(ulysses, ring), Way(**options)
    model, inputs = random_model(heads), random_inputs(heads, way.text, way.video)
    local = {name: shard(value, here.rank, here.size) if name in SHARDED else value for name, value in inputs.items()}
    given = here.with_lengths(joint_lengths(way.text, way.video, here.size)) if way.agreed else here
    velocity = velocity_of(model, local, way, given)
    assert velocity.shape == local["img"].shape
    (velocity.square().sum() / inputs["img"].numel()).backward()
    reduce_gradients(model.parameters(), axes(here))
    return gather(velocity, way.video, here), [parameter.grad for parameter in model.parameters()]


@functools.cache
def one_process(heads: int, text: int, video: int):
    model = random_model(heads)
    velocity = velocity_of(model, random_inputs(heads, text, video), Way(), None)
    velocity.square().mean().backward()
    return velocity.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def check(ranks, mesh: tuple[int, int, int], way: Way) -> None:
    ulysses, ring, heads = mesh
    velocity, gradients = one_process(heads, way.text, way.video)
    floor = NOISE * max(float(gradient.norm()) for gradient in gradients.values())
    target, options = f"{FILE}:part_of_one_process", dataclasses.asdict(way)
    for found, reduced in ranks(ulysses * ring).run(target, ulysses, ring, heads, options):
        assert relative(found, velocity) < EXACT
        for (name, expected), ours in zip(gradients.items(), reduced, strict=True):
            assert (ours - expected).norm() <= EXACT * expected.norm() + floor, name


@pytest.mark.parametrize("text", [2, 9])
@pytest.mark.parametrize("mesh", MESHES, ids=MESH_IDS)
def test_ranks_give_the_velocity_and_gradients_of_one_process(ranks, mesh, text):
    check(ranks, mesh, Way(text=text))


@settings(max_examples=10)
@given(mesh=st.sampled_from(MESHES), text=st.integers(0, 7), video=st.integers(1, 10))
def test_any_lengths_can_be_shared_out(ranks, mesh, text, video):
    check(ranks, mesh, Way(text=text, video=video))


@pytest.mark.parametrize(
    "way",
    [Way(recompute=True), Way(modulated=True), Way(agreed=False)],
    ids=["recomputed", "modulation given", "lengths not given"],
)
@pytest.mark.parametrize("mesh", [(2, 1, 4), (1, 3, 4), (2, 2, 2)], ids=["2x1", "1x3", "2x2"])
def test_how_the_model_is_called_changes_nothing(ranks, mesh, way):
    check(ranks, mesh, way)


@pytest.mark.parametrize(
    ("mesh", "recompute"), [((2, 1, 4), False), ((1, 2, 3), True)], ids=["2x1 kept", "1x2 recomputed"]
)
def test_the_model_compiles_into_one_graph_on_every_rank(ranks, mesh, recompute):
    check(ranks, mesh, Way(compiled=True, recompute=recompute))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mesh", MESHES, ids=MESH_IDS)
def test_every_way_on_every_mesh(ranks, mesh, compiled, modulated, recompute):
    check(ranks, mesh, Way(compiled=compiled, modulated=modulated, recompute=recompute))


def bfloat16_velocity(ulysses: int, ring: int, heads: int) -> torch.Tensor:
    here, model, inputs = context(ulysses, ring), random_model(heads).bfloat16(), random_inputs(heads, 2, 13)
    local = {name: shard(value, here.rank, here.size) if name in SHARDED else value for name, value in inputs.items()}
    velocity = model(**local, context=here)
    velocity.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    return gather(velocity, 13, here)


@pytest.mark.parametrize("mesh", [(2, 1, 4), (1, 3, 4), (2, 2, 2)], ids=["2x1", "1x3", "2x2"])
def test_bfloat16_errs_on_ranks_as_it_does_in_one_process(ranks, mesh):
    inputs = random_inputs(mesh[2], 2, 13)
    exact, alone = (random_model(mesh[2]).to(dtype)(**inputs) for dtype in (torch.float32, torch.bfloat16))
    assert alone.dtype == torch.bfloat16
    for velocity in ranks(mesh[0] * mesh[1]).run(f"{FILE}:bfloat16_velocity", *mesh):
        assert velocity.dtype == torch.bfloat16
        assert relative(velocity, exact) < 1.2 * relative(alone, exact)


def golden_velocity(released_config: dict, weights: dict, inputs: dict) -> torch.Tensor:
    here = context(2, 1)
    local = {name: shard(value, here.rank, here.size) if name in SHARDED else value for name, value in inputs.items()}
    with torch.no_grad():
        velocity = load_released_mmdit(weights, released_config)(**local, context=here)
    return gather(velocity, inputs["img"].shape[1], here)


def test_two_ranks_give_the_released_models_velocity(ranks, golden):
    released_config, tensors = golden("mmdit_tiny_split")
    inputs = {name: value for name, value in tensors["input"].items() if name != "target"}
    for velocity in ranks(2).run(f"{FILE}:golden_velocity", released_config, tensors["weight"], inputs):
        assert relative(velocity, tensors["output"]["velocity"]) < 1e-4
