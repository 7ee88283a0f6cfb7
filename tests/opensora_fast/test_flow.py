"""The times at which the path from noise to data is visited."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.flow import (
    sample_timesteps,
    sampling_schedule,
    shift_alpha,
    shift_timesteps,
)

SCHEDULES = json.loads((Path(__file__).parents[1] / "golden" / "schedule.json").read_text())
ALPHAS = st.floats(0.1, 50)


@pytest.mark.parametrize("name", SCHEDULES)
def test_released_schedules(name):
    sizes = {key: int(value) for key, value in (part.split("=") for part in name.split(","))}
    schedule = sampling_schedule(sizes["steps"], sizes["tokens_per_frame"], sizes["latent_frames"])
    torch.testing.assert_close(schedule, torch.tensor(SCHEDULES[name]), rtol=0, atol=1e-6)


@settings(deadline=None)
@given(steps=st.integers(1, 60), tokens=st.integers(1, 8192), frames=st.integers(1, 33))
def test_schedule_falls_from_exactly_one_to_exactly_zero(steps, tokens, frames):
    schedule = sampling_schedule(steps, tokens, frames)
    assert schedule[0] == 1
    assert schedule[-1] == 0
    assert (schedule.diff() < 0).all()


def test_schedule_needs_a_step():
    with pytest.raises(UserError, match="steps=0"):
        sampling_schedule(0, 256, 1)


@pytest.mark.parametrize(
    ("tokens_per_frame", "latent_frames", "alpha"),
    [(256, 1, 1.0), (4096, 1, 3.0), (252, 33, 5.73), (2304, 33, 11.87), (2304, 1, 2.07)],
)
def test_shift_of_known_sizes(tokens_per_frame, latent_frames, alpha):
    assert shift_alpha(tokens_per_frame, latent_frames) == pytest.approx(alpha, abs=0.005)


@settings(deadline=None)
@given(alpha=ALPHAS, beta=ALPHAS, times=st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_shifts_are_monotone_keep_the_ends_and_compose(alpha, beta, times):
    t = torch.tensor([0.0, *sorted(times), 1.0], dtype=torch.float64)
    shifted = shift_timesteps(t, alpha)
    assert (shifted.diff() >= 0).all()
    assert shifted[0] == 0
    assert shifted[-1].item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(shift_timesteps(shifted, beta), shift_timesteps(t, alpha * beta))


def test_training_times_are_the_shifted_logit_normal():
    t = sample_timesteps(20_000, 5.74, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    logits = torch.logit(shift_timesteps(t.double(), 1 / 5.74))
    assert logits.mean().item() == pytest.approx(0, abs=0.03)
    assert logits.std().item() == pytest.approx(1, abs=0.03)
