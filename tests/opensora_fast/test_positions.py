"""Packing and positions: exact inverses, the released orders, and the angles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.positions import patchify, position_ids_THW, rope_cos_sin, unpatchify

size = st.integers(1, 4)


@given(batch=size, channels=size, frames=size, rows=size, cols=size, patch=st.integers(1, 3))
def test_unpatchify_inverts_patchify(batch, channels, frames, rows, cols, patch):
    latent = torch.randn(batch, channels, frames, rows * patch, cols * patch)
    tokens = patchify(latent, patch)
    assert tokens.shape == (batch, frames * rows * cols, channels * patch**2)
    assert torch.equal(unpatchify(tokens, patch, tuple(latent.shape[2:])), latent)


def test_packing_order_is_the_released_one():
    """Token n is the (time, row, column) of `position_ids_THW`; its features are (channel, row, column) in it."""
    C, T, H, W, P = 3, 2, 4, 6, 2
    latent = torch.arange(C * T * H * W).view(1, C, T, H, W)
    tokens = patchify(latent, P)
    ids = position_ids_THW(T, H // P, W // P)
    assert ids.dtype == torch.float32
    for n, (t, row, col) in enumerate(ids.long().tolist()):
        patch = latent[0, :, t, row * P : (row + 1) * P, col * P : (col + 1) * P]
        assert torch.equal(tokens[0, n], patch.flatten())


def test_angles_are_position_times_frequency():
    ids = torch.tensor([[[3.0, 250.0, 7.0]]])
    cos, sin = rope_cos_sin(ids, (4, 4, 2), 10000)
    expected = [3, 3 * 10000**-0.5, 250, 250 * 10000**-0.5, 7]
    torch.testing.assert_close(cos[0, 0], torch.tensor([math.cos(angle) for angle in expected]), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[0, 0], torch.tensor([math.sin(angle) for angle in expected]), rtol=0, atol=1e-7)


def test_misfits_are_refused_by_name():
    with pytest.raises(UserError, match="patch_size=2"):
        patchify(torch.zeros(1, 4, 1, 5, 4), 2)
    with pytest.raises(UserError, match="no latent of 2 x 4 x 4"):
        unpatchify(torch.zeros(1, 7, 16), 2, (2, 4, 4))
    with pytest.raises(UserError, match="no latent of 1 x 4 x 4"):
        unpatchify(torch.zeros(1, 4, 15), 2, (1, 4, 4))
