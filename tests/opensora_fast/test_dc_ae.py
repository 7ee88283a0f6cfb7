"""The video autoencoder: the released numbers, and the laws that it keeps at any size."""

from dataclasses import replace

import pytest
import torch

from opensora_fast import dc_ae
from opensora_fast.config import VideoDCAEConfig, config_from_dict
from opensora_fast.dc_ae import ChannelRMSNorm, VideoDCAE, relu_linear_attention
from opensora_fast.depthwise_conv import DepthwiseConv3d
from opensora_fast.errors import UserError
from opensora_fast.tiling import BatchedTiles

SMALL = VideoDCAEConfig(
    latent_channels=4,
    encoder_widths=(4, 8, 16),
    decoder_widths=(4, 16, 16),
    encoder_depths=(1, 1, 1),
    decoder_depths=(1, 1, 2),
    encoder_block_types=("ResBlock", "ResBlock", "EViTS5_GLU"),
    decoder_block_types=("ResBlock", "EViTS5_GLU", "EViTS5_GLU"),
    temporal_downsample=(True, True, False),
    heads_dim=8,
)


def small_model(**changes) -> VideoDCAE:
    """Weights large enough that every branch shows in the output."""
    torch.manual_seed(0)
    model = VideoDCAE(replace(SMALL, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5)
    return model


def small_video(batch: int = 1, frames: int = 8, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [
        ("dcae_tiny", torch.contiguous_format),
        ("dcae_tiny", torch.channels_last_3d),
        ("dcae_tiny_tiled", torch.channels_last_3d),
    ],
    ids=["NCDHW", "NDHWC", "tiled"],
)
@torch.no_grad()
def test_encodes_and_decodes_as_the_released_model_does(golden, name, memory_format):
    config, groups = golden(name)
    model = VideoDCAE(config_from_dict(VideoDCAEConfig, config))
    model.load_state_dict(golden("dcae_tiny")[1]["weight"])
    model.to(memory_format=memory_format)
    latent, video = groups["output"]["latent"], groups["output"]["reconstruction"]
    assert relative_error(model.encode(groups["input"]["video"]), latent) < 1e-5
    assert relative_error(model.decode(latent), video) < 1e-5


def test_default_configuration_is_the_released_size():
    with torch.device("meta"):
        model = VideoDCAE(VideoDCAEConfig())
    assert sum(p.numel() for p in model.parameters()) == 459_462_147
    assert sum(p.numel() for p in model.encoder.parameters()) == 220_439_936
    assert model.compression == (4, 32, 32)
    assert model.latent_shape(128, 768, 1024) == (32, 24, 32)


@torch.no_grad()
def test_a_batch_gives_what_its_clips_give_alone():
    model, video = small_model(), small_video(batch=2)
    latent = model.encode(video)
    torch.testing.assert_close(latent, torch.cat([model.encode(clip[None]) for clip in video]))
    torch.testing.assert_close(model.decode(latent), torch.cat([model.decode(z[None]) for z in latent]))


@pytest.mark.parametrize(("frames", "latent_frames", "decoded"), [(1, 1, 1), (4, 1, 1), (8, 2, 8), (20, 5, 20)])
@torch.no_grad()
def test_frames_in_latents_and_frames_out(frames, latent_frames, decoded):
    """A lone latent is decoded as an image, so a clip of exactly one latent comes back as one frame."""
    model, video = small_model(), small_video(frames=frames)
    latent = model.encode(video)
    assert latent.shape == (1, 4, *model.latent_shape(frames, 8, 12)) == (1, 4, latent_frames, 2, 3)
    assert model.decode(latent).shape == (1, 3, decoded, 8, 12)
    assert model.frames_of(latent_frames) == decoded


@torch.no_grad()
def test_a_frame_of_a_still_clip_is_not_encoded_as_an_image():
    """Image mode has its own shortcut (no mean over time), so it is no special case of video."""
    model, image = small_model(), small_video(frames=1)
    assert relative_error(model.encode(image.expand(-1, -1, 8, -1, -1))[:, :, :1], model.encode(image)) > 0.01


@torch.no_grad()
def test_the_scaling_factor_divides_latents_and_is_undone_in_decoding():
    plain, scaled, video = small_model(), small_model(scaling_factor=0.5), small_video()
    torch.testing.assert_close(scaled.encode(video), plain.encode(video) / 0.5)
    torch.testing.assert_close(scaled.decode(scaled.encode(video)), plain.reconstruct(video))


@torch.no_grad()
def test_tiling_changes_nothing_for_a_clip_of_one_tile():
    tiling = dict(use_spatial_tiling=True, use_temporal_tiling=True, spatial_tile_size=12, temporal_tile_size=8)
    plain, tiled, video = small_model(), small_model(**tiling), small_video()
    assert torch.equal(tiled.encode(video), plain.encode(video))
    assert torch.equal(tiled.decode(plain.encode(video)), plain.reconstruct(video))


@torch.no_grad()
def test_tiles_that_are_stacked_give_what_they_give_alone():
    """Whoever runs the tiles gets all of a call's, and hands out what the network made of each."""
    model = small_model(use_spatial_tiling=True, use_temporal_tiling=True, spatial_tile_size=8, temporal_tile_size=8)
    video, batches = small_video(batch=2, frames=16, height=16, width=20), []
    latent = model.encode(video)
    reconstruction = model.decode(latent)
    model.decoder.register_forward_hook(lambda module, given, output: batches.append(given[0].shape[0]))
    model.run_tiles = BatchedTiles(4)
    torch.testing.assert_close(model.encode(video), latent)
    torch.testing.assert_close(model.decode(latent), reconstruction)
    assert 2 < max(batches) <= 8


@pytest.mark.parametrize("latent_frames", [3, 4, 5, 6])
@torch.no_grad()
def test_tiled_decoding_keeps_every_frame(latent_frames):
    model = small_model(use_spatial_tiling=True, use_temporal_tiling=True, spatial_tile_size=8, temporal_tile_size=8)
    video = small_video(frames=4 * latent_frames, height=16, width=20)
    assert model.decode(model.encode(video)).shape == video.shape


def test_training_reaches_every_parameter_in_either_layout_alike():
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        model = small_model().to(memory_format=memory_format)
        video = small_video(batch=2)
        (model.reconstruct(video) - video).abs().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert relative_error(gradients[1][name], gradient) < 1e-3, name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=["NCDHW", "NDHWC"])
def test_padding_ahead_of_a_convolution_changes_nothing(memory_format, monkeypatch):
    """What a GPU does, on the CPU: the output and every gradient."""
    found = []
    for devices in ({"cuda"}, {"cuda", "cpu"}):
        monkeypatch.setattr(dc_ae, "PADDED_AHEAD", devices)
        model, video = small_model().to(memory_format=memory_format), small_video(batch=2)
        reconstruction = model.reconstruct(video)
        (reconstruction - video).abs().mean().backward()
        found.append([reconstruction.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < 1e-3


def test_fresh_residual_branches_start_near_zero():
    """So that the shortcuts alone carry the signal at first; the released start."""
    torch.manual_seed(0)
    model, x = VideoDCAE(SMALL), torch.randn(1, 16, 2, 4, 4)
    for block in (model.decoder.stages[2].op_list[0].context_module, model.decoder.stages[2].op_list[0].local_module):
        assert 0 < relative_error(block(x), x) < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_runs_in_the_dtype_of_its_weights(dtype):
    model, video = small_model(), small_video()
    expected = model.encode(video)
    latent = model.to(dtype).encode(video)
    assert latent.dtype == dtype
    assert relative_error(latent.float(), expected) < (1e-5 if dtype == torch.float64 else 0.1)


def test_linear_attention_equals_attention_over_all_pairs_of_tokens():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 8, 50).unbind()
    weights = torch.einsum("bndq,bndk->bnqk", q.relu(), k.relu())
    weights = (weights / weights.sum(dim=-1, keepdim=True)).nan_to_num(0)  # no q above zero: attends to nothing
    expected = torch.einsum("bnqk,bndk->bndq", weights, v)
    torch.testing.assert_close(relu_linear_attention(q, k, v), expected)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_depthwise_gradients(kernel_size, bias):
    torch.manual_seed(0)
    conv = DepthwiseConv3d(4, kernel_size, bias=bias).double()
    plain = torch.nn.Conv3d(4, 4, kernel_size, padding=kernel_size // 2, groups=4, bias=bias).double()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 2, 5, 3, dtype=torch.double, requires_grad=True)
    weight = torch.randn_like(x)
    for found, expected in zip(
        torch.autograd.grad((conv(x) * weight).sum(), [x, *conv.parameters()]),
        torch.autograd.grad((plain(x) * weight).sum(), [x, *plain.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_channel_norm_has_rms_one_before_its_affine_and_exact_gradients():
    torch.manual_seed(0)
    norm, x = ChannelRMSNorm(6).double(), 3 * torch.randn(2, 6, 2, 3, 4, dtype=torch.double)
    torch.testing.assert_close(norm(x).square().mean(dim=1), torch.ones(2, 2, 3, 4).double(), atol=1e-4, rtol=0)
    inputs = [t.detach().clone().normal_().requires_grad_() for t in (x, norm.weight, norm.bias)]
    call = lambda x, weight, bias: torch.func.functional_call(norm, {"weight": weight, "bias": bias}, x)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)


def test_autocast_reaches_every_parameter():
    model, video = small_model(), small_video(batch=2)
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction = model.reconstruct(video)
        with torch.no_grad():
            assert model.decode(model.encode(video).float()).shape == video.shape
    (reconstruction - video).abs().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    with torch.no_grad():
        assert relative_error(reconstruction.float(), model.reconstruct(video)) < 0.1


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((5, 8, 8), "frames=5 does not fit the autoencoder: use 4 or 8"),
        ((2, 8, 8), "frames=2 does not fit the autoencoder: use 1 or 4"),
        ((0, 8, 8), "frames=0 does not fit the autoencoder: use 1 or 4"),
        ((8, 10, 8), "height=10 does not fit the autoencoder: use 8 or 12"),
        ((8, 8, 3), "width=3 does not fit the autoencoder: use 4"),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_the_nearest_that_do(size, message):
    model = small_model()
    for call in (model.encode, model.reconstruct):
        with pytest.raises(UserError, match=message):
            call(torch.zeros(1, 3, *size))


def test_a_temporal_tile_of_one_latent_is_refused():
    with pytest.raises(UserError, match="temporal_tile_size=4 .* use 8 or more"):
        VideoDCAE(replace(SMALL, use_temporal_tiling=True, temporal_tile_size=4))
