"""The named runs say what the paper and the released configurations say, and the demo's are the same thing in small."""

import dataclasses
import json

import pytest

from opensora_fast.errors import UserError
from opensora_fast.train.config import AutoencoderRecipe, DiffusionRecipe, OptimizerSection, recipe_to_dict
from opensora_fast.train.launch import override
from opensora_fast.train.optimizer import learning_rate
from opensora_fast.train.recipes import RECIPES, find_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_carries_its_name_and_can_be_stored(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name
    assert json.loads(json.dumps(recipe_to_dict(recipe)))["name"] == name


def test_stage_values_of_the_paper() -> None:
    stages = [find_recipe(name) for name in ("stage1", "stage2", "stage3")]
    assert [stage.loop.steps for stage in stages] == [85_000, 13_000, 13_000]  # table 3
    assert [stage.parallel.context_parallel for stage in stages] == [1, 1, 4]  # table 3
    for stage in stages:  # section 4.2
        assert stage.optimizer.betas == (0.9, 0.999)
        assert stage.optimizer.eps == 1e-15
        assert stage.optimizer.weight_decay == 0
        assert stage.optimizer.gradient_clip == 1
    assert learning_rate(stages[0].optimizer, 40_000) == 5e-5
    assert learning_rate(stages[0].optimizer, 40_001) == 3e-5
    buckets = stages[0].data.buckets  # table 5
    assert [buckets["256px"][frames][1] for frames in (1, 33, 65, 97, 129)] == [45, 12, 6, 4, 3]
    assert buckets["768px"][1][1] == 13
    assert buckets["1024px"][1][1] == 7
    high = stages[2].data.buckets["768px"]  # table 6
    assert [high[frames][1] for frames in (1, 33, 65, 97, 129)] == [38, 6, 4, 3, 2]
    weights = stages[1].condition_weights
    assert weights["t2v"] / sum(weights.values()) == 0.125  # condition dropout


def test_the_two_dc_ae_parts_differ_in_length_alone() -> None:
    short, long = find_recipe("dcae_short"), find_recipe("dcae_long")
    assert (short.loop.steps, long.loop.steps) == (17_000, 8_000)  # section 4.3
    assert max(short.data.buckets["768px"]) == 32
    assert max(long.data.buckets["768px"]) == 128
    assert short.model == long.model
    assert short.autoencoder == long.autoencoder


def test_demo_recipes_use_the_types_of_the_full_ones() -> None:
    for stage in ("stage1", "stage2", "stage3"):
        full, demo = find_recipe(stage), find_recipe(f"demo_{stage}")
        assert type(full) is type(demo) is DiffusionRecipe
        assert full.condition_weights == demo.condition_weights
    assert isinstance(find_recipe("demo_ae"), AutoencoderRecipe)


def test_options_reach_every_depth_of_a_recipe() -> None:
    recipe = override(
        find_recipe("demo_stage2"),
        ["--optimizer.lr", "0", "1e-4", "10", "1e-5", "--checkpoint.every", "7", "--condition_weights.t2v", "3"]
        + ["--data.buckets.64px.16", "0.5", "9", "--model.depth", "1", "--optimizer.ema_decay", "None"],
    )
    assert recipe.optimizer.lr == ((0, 1e-4), (10, 1e-5))
    assert recipe.checkpoint.every == 7
    assert recipe.condition_weights["t2v"] == 3
    assert recipe.data.buckets["64px"][16] == (0.5, 9)
    assert recipe.model.depth == 1
    assert recipe.optimizer.ema_decay is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--optimizer.learning", "3"], "--optimizer.learning"),
        (["--optimizer.gradient_clip", "high"], "--optimizer.gradient_clip"),
        (["--optimizer.ema_decay", "2"], "optimizer.ema_decay=2.0"),
        (["--checkpoint.every", "0"], "checkpoint.every=0"),
        (["--loop.steps", "0"], "loop.steps=0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_line_that_names_it(words: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        override(find_recipe("demo_stage1"), words)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean demo_stage"):
        find_recipe("demo_stagel")


def test_conditions_need_a_model_that_takes_them() -> None:
    recipe = find_recipe("demo_stage2")
    with pytest.raises(UserError, match=r"model\.cond_embed=False"):
        dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, cond_embed=False))


def test_a_schedule_must_begin_at_the_beginning() -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        OptimizerSection(lr=((5, 1e-4),))
