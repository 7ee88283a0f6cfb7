"""The Hunyuan autoencoder: the released numbers, the released tiling, and what it does in place of diffusers' parts.

diffusers' own AutoencoderKLHunyuanVideo, dense mask and all, is the second opinion.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast import hunyuan_vae
from opensora_fast.config import HunyuanVAEConfig, config_from_dict
from opensora_fast.errors import UserError
from opensora_fast.hunyuan_vae import HunyuanVAE, frame_causal_attention
from opensora_fast.memory_plan import CONTEXT
from opensora_fast.tiling import BatchedTiles

pytest.importorskip("diffusers", reason="the Hunyuan autoencoder is built from diffusers' parts")

SMALL = HunyuanVAEConfig(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
# tiles of 4 latents every 3 in space, of 8 latents (beside the first) every 6 in time
TILED = {"use_spatial_tiling": True, "use_temporal_tiling": True, "sample_size": 32, "sample_tsize": 32}


def small_model(**changes) -> HunyuanVAE:
    torch.manual_seed(0)
    return HunyuanVAE(replace(SMALL, **changes)).eval().requires_grad_(False)


def small_video(batch: int = 1, frames: int = 9, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def as_diffusers(model: HunyuanVAE):
    """diffusers' autoencoder with the weights and the tiles of a model; its latents are not scaled."""
    from diffusers import AutoencoderKLHunyuanVideo

    config = model.config
    theirs = AutoencoderKLHunyuanVideo(
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
    )
    theirs.load_state_dict(model.state_dict())
    theirs.enable_tiling(
        tile_sample_min_height=config.sample_size,
        tile_sample_min_width=config.sample_size,
        tile_sample_min_num_frames=config.sample_tsize,
        tile_sample_stride_height=int(config.sample_size * (1 - config.tile_overlap_factor)),
        tile_sample_stride_width=int(config.sample_size * (1 - config.tile_overlap_factor)),
        tile_sample_stride_num_frames=int(config.sample_tsize * (1 - config.tile_overlap_factor)),
    )
    theirs.use_tiling = config.use_spatial_tiling
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = config.use_temporal_tiling
    return theirs.eval().requires_grad_(False)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_equals_diffusers(model: HunyuanVAE, video: torch.Tensor) -> None:
    """In float64, where rounding cannot be taken for a difference, nor hide one."""
    model, video = model.double(), video.double()
    theirs, scale = as_diffusers(model).double(), model.config.scaling_factor
    latent = theirs.encode(video).latent_dist.mode() * scale
    assert relative_error(model.encode(video), latent) < 1e-10
    assert relative_error(model.decode(latent), theirs.decode(latent / scale).sample) < 1e-10


def test_encodes_and_decodes_as_the_released_model_does(golden):
    config, groups = golden("hunyuan_vae_tiny")
    model = HunyuanVAE(config_from_dict(HunyuanVAEConfig, config)).requires_grad_(False)
    model.load_state_dict(groups["weight"])
    latent, video = groups["output"]["latent"], groups["output"]["reconstruction"]
    assert relative_error(model.encode(groups["input"]["video"]), latent) < 1e-5
    assert relative_error(model.decode(latent), video) < 1e-5


def test_default_configuration_has_the_released_names_and_sizes():
    listed = (Path(__file__).parents[1] / "released_keys" / "opensora_hunyuan_vae_keys.txt").read_text().splitlines()
    released = dict(line.split("\t") for line in listed if not line.startswith("#"))
    with torch.device("meta"):
        model = HunyuanVAE(HunyuanVAEConfig())
    assert {name: str(tuple(tensor.shape)) for name, tensor in model.state_dict().items()} == released
    assert sum(parameter.numel() for parameter in model.parameters()) == 246_478_803
    assert (model.latent_channels, model.compression, model.causal) == (16, (4, 8, 8), True)
    assert model.latent_shape(129, 768, 1024) == (33, 96, 128)
    assert model.channels_last() is model


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_untiled_equals_diffusers_for_images_and_videos(frames):
    assert_equals_diffusers(small_model(), small_video(batch=2, frames=frames))


def test_three_layers_a_block_equal_diffusers():
    assert_equals_diffusers(small_model(layers_per_block=3, norm_num_groups=2), small_video(frames=5))


@pytest.mark.parametrize(("height", "width"), [(32, 40), (56, 32), (64, 80), (40, 104)])
def test_spatial_tiling_is_the_released_one(height, width):
    model = small_model(**TILED | {"use_temporal_tiling": False})
    assert_equals_diffusers(model, small_video(frames=5, height=height, width=width))


@pytest.mark.parametrize("frames", [29, 33, 37, 49, 53, 73, 81])
def test_temporal_tiling_is_the_released_one(frames):
    """Among them lengths whose last tile would hold nothing but the frame that is dropped."""
    model = small_model(**TILED | {"use_spatial_tiling": False})
    assert_equals_diffusers(model, small_video(frames=frames))


def test_tiling_in_space_and_time_is_the_released_one():
    assert_equals_diffusers(small_model(**TILED), small_video(frames=41, height=40, width=56))


def test_released_tile_sizes_in_time():
    """64 frames every 48; 129 frames are three tiles, whose overlaps are 16 frames or 4 latents."""
    model = small_model(use_temporal_tiling=True)
    assert model.decode(torch.zeros(1, 4, 17, 1, 1)).shape[2] == 65
    assert_equals_diffusers(model, small_video(frames=129, height=8, width=8))


def test_released_tile_sizes_in_space():
    """256 pixels every 192."""
    assert_equals_diffusers(small_model(use_spatial_tiling=True), small_video(frames=1, height=264, width=200))


@pytest.mark.slow
@settings(max_examples=20)
@given(
    size=st.sampled_from([32, 64]),
    tsize=st.sampled_from([16, 32, 64]),
    space=st.booleans(),
    latents=st.tuples(st.integers(1, 24), st.integers(1, 9), st.integers(1, 9)),
)
def test_any_size_is_tiled_as_released(size, tsize, space, latents):
    frames, height, width = latents[0] * 4 - 3, latents[1] * 8, latents[2] * 8
    model = small_model(use_spatial_tiling=space, use_temporal_tiling=True, sample_size=size, sample_tsize=tsize)
    assert_equals_diffusers(model, small_video(frames=frames, height=height, width=width))


def test_tiling_changes_nothing_for_a_clip_of_one_tile_and_something_for_more():
    plain, tiled = small_model(), small_model(**TILED)
    video = small_video(frames=29, height=32, width=32)
    assert torch.equal(tiled.encode(video), plain.encode(video))
    video = small_video(frames=33)
    assert relative_error(tiled.encode(video), plain.encode(video)) > 1e-3


@pytest.mark.parametrize("batch", [2, 3, 64])
def test_tiles_that_are_stacked_give_what_they_give_alone(batch):
    model, calls = small_model(**TILED), []
    video = small_video(batch=2, frames=41, height=40, width=56)
    latent = model.encode(video)
    reconstruction = model.decode(latent)
    model.decoder.register_forward_hook(lambda module, given, output: calls.append(given[0].shape[0]))
    model.run_tiles = BatchedTiles(batch)
    torch.testing.assert_close(model.encode(video), latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(latent), reconstruction, rtol=1e-4, atol=1e-5)
    assert 2 < max(calls) <= 2 * batch


def test_a_batch_gives_what_its_clips_give_alone():
    model, video = small_model(), small_video(batch=2)
    latent = model.encode(video)
    torch.testing.assert_close(latent, torch.cat([model.encode(clip[None]) for clip in video]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4000, 20000], ids=["a frame", "a few frames", "most frames"])
def test_convolutions_in_pieces_of_time_change_nothing(chunk, monkeypatch):
    model, video = small_model(), small_video(frames=17)
    latent = model.encode(video)
    reconstruction = model.decode(latent)
    monkeypatch.setattr(hunyuan_vae, "CHUNK", chunk)
    torch.testing.assert_close(model.encode(video), latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(latent), reconstruction, rtol=1e-4, atol=1e-5)


def test_no_convolution_of_the_released_decoder_pads_more_than_a_gpu_can_address(monkeypatch):
    """129 frames of 256 x 256 pixels, on the meta device: 2^31 elements is one too many for an int32."""
    pad, largest = torch.nn.functional.pad, []

    def measured(x, *args, **kwargs):
        padded = pad(x, *args, **kwargs)
        largest.append(padded.numel())
        return padded

    monkeypatch.setattr(hunyuan_vae.F, "pad", measured)
    with torch.device("meta"):
        model = HunyuanVAE(HunyuanVAEConfig()).to(torch.bfloat16)
        video = model.decode(torch.empty(1, 16, 33, 32, 32))
    assert video.shape == (1, 3, 129, 256, 256)
    assert max(largest) <= hunyuan_vae.CHUNK < 2**31
    # In bfloat16 a piece and its result in another layout are within what a memory budget leaves beside its plan.
    assert 2 * 2 * max(largest) <= CONTEXT


def test_attention_sees_no_later_frame_and_builds_no_mask(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5 * 6, 8).unbind()
    frame = torch.arange(30) // 6
    mask = frame[:, None] >= frame
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(frame_causal_attention(q, k, v, frames=5), expected)

    sdpa, pairs = torch.nn.functional.scaled_dot_product_attention, []

    def measured(q, k, v, *args, **kwargs):
        assert not args
        assert not kwargs
        pairs.append(q.shape[-2] * k.shape[-2])
        return sdpa(q, k, v)

    monkeypatch.setattr(hunyuan_vae.F, "scaled_dot_product_attention", measured)
    frame_causal_attention(q, k, v, frames=5)
    assert sum(pairs) == mask.sum()


@settings(max_examples=30)
@given(frames=st.integers(1, 7), in_frame=st.integers(1, 9), cut=st.integers(1, 7))
def test_attention_of_the_first_frames_does_not_depend_on_later_ones(frames, in_frame, cut):
    q, k, v = torch.randn(3, 1, frames * in_frame, 4, generator=torch.Generator().manual_seed(frames)).unbind()
    first = min(cut, frames) * in_frame
    whole = frame_causal_attention(q, k, v, frames=frames)
    part = frame_causal_attention(q[:, :first], k[:, :first], v[:, :first], frames=min(cut, frames))
    torch.testing.assert_close(whole[:, :first], part)


def test_a_lone_latent_or_frame_is_an_image():
    model = small_model()
    latent = model.encode(small_video(frames=1))
    assert latent.shape == (1, 4, 1, 2, 3)
    assert model.decode(latent).shape == (1, 3, 1, 16, 24)


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (33, 9), (129, 33)])
def test_frames_in_latents_and_frames_out(frames, latent_frames):
    with torch.device("meta"):
        model = small_model()
        latent = model.encode(torch.empty(2, 3, frames, 16, 24))
        assert latent.shape == (2, 4, *model.latent_shape(frames, 16, 24)) == (2, 4, latent_frames, 2, 3)
        assert model.decode(latent).shape == (2, 3, frames, 16, 24)
    assert model.frames_of(latent_frames) == frames


def test_latents_are_shifted_and_scaled_and_decoding_undoes_it():
    plain, scaled = small_model(scaling_factor=1.0), small_model(scaling_factor=0.5, shift_factor=0.25)
    video = small_video()
    latent = plain.encode(video)
    torch.testing.assert_close(scaled.encode(video), (latent - 0.25) * 0.5)
    torch.testing.assert_close(scaled.decode(scaled.encode(video)), plain.decode(latent))


def test_the_posterior_is_sampled_only_with_a_generator():
    model, video = small_model(), small_video()
    assert torch.equal(model.encode(video), model.encode(video))
    drawn, again = (model.encode(video, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(drawn, again)
    posterior = as_diffusers(model).encode(video).latent_dist
    deviation = (drawn / model.config.scaling_factor - posterior.mode()) / posterior.std
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(deviation, noise, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_runs_in_the_dtype_of_its_weights(dtype):
    model, video = small_model(), small_video()
    expected = model.encode(video)
    reconstruction = model.decode(expected)
    model.to(dtype)
    latent = model.encode(video)
    assert latent.dtype == model.decode(expected).dtype == dtype
    bound = 1e-4 if dtype == torch.float64 else 0.3  # random weights multiply what rounding does
    assert relative_error(latent.float(), expected) < bound
    assert relative_error(model.decode(expected).float(), reconstruction) < bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives():
    model, video = small_model(**TILED), small_video(frames=41, height=40, width=56)
    latent = model.encode(video)
    reconstruction = model.decode(latent)
    model.cuda()
    torch.testing.assert_close(model.encode(video.cuda()).cpu(), latent, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(model.decode(latent.cuda()).cpu(), reconstruction, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16, 16, 24), "frames=16 does not fit the autoencoder: use 13 or 17"),
        ((2, 16, 24), "frames=2 does not fit the autoencoder: use 1 or 5"),
        ((0, 16, 24), "frames=0 does not fit the autoencoder: use 1"),
        ((9, 20, 24), "height=20 does not fit the autoencoder: use 16 or 24"),
        ((9, 16, 3), "width=3 does not fit the autoencoder: use 8"),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_the_nearest_that_do(size, message):
    with pytest.raises(UserError, match=message):
        small_model().encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_out_channels": (8, 8, 16)}, "block_out_channels"),
        ({"norm_num_groups": 3}, "block_out_channels"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"scaling_factor": 0.0}, "scaling_factor"),
        ({"tile_overlap_factor": 1.0}, "tile_overlap_factor"),
        ({"sample_size": 100}, "sample_size=100 must be a multiple of the compression, 8"),
        ({"sample_tsize": 0}, "sample_tsize=0 must be a multiple of the compression, 4"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_field(changes, named):
    with pytest.raises(UserError, match=named):
        replace(SMALL, **changes)


WITHOUT_DIFFUSERS = """
import sys
sys.modules["diffusers"] = None
from opensora_fast.config import HunyuanVAEConfig
from opensora_fast.errors import UserError
from opensora_fast.hunyuan_vae import HunyuanVAE
try:
    HunyuanVAE(HunyuanVAEConfig())
except UserError as error:
    print(error)
"""


def test_without_diffusers_the_error_is_one_line_that_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", WITHOUT_DIFFUSERS], capture_output=True, text=True, check=True)
    assert "needs diffusers" in done.stdout
    assert "pip install 'opensora-fast[diffusers]'" in done.stdout
    assert done.stdout.count("\n") == 1


def test_importing_it_does_not_import_diffusers():
    code = "import sys, opensora_fast.hunyuan_vae; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
