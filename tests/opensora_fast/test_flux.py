"""FLUX: folders in both layouts give the images of diffusers' own transformer and autoencoder, in one pass a step."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora_fast.config import MMDIT_PRESETS
from opensora_fast.errors import UserError
from opensora_fast.flow import sampling_schedule
from opensora_fast.flux import FluxImages, flux_files
from opensora_fast.flux_autoencoder import FluxAutoencoder
from opensora_fast.mmdit import MMDiT
from opensora_fast.released import to_released_state_dict
from opensora_fast.sampling_ranks import SamplingRanks
from opensora_fast.text import SharedTextEncoders

diffusers = pytest.importorskip("diffusers")

CONFIG = replace(MMDIT_PRESETS["tiny"], cond_embed=False, guidance_embed=True)
AUTOENCODER = {
    "block_out_channels": [16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": CONFIG.latent_channels,
    "norm_num_groups": 8,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
PROMPTS = ["a red boat", "a green hill under clouds"]
SIZE = {"resolution": "32px", "aspect_ratio": "3:2", "steps": 3}


class Text:
    """Features of prompts without an encoder."""

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
        txt_BLD = torch.stack([torch.randn(7, CONFIG.context_in_dim, generator=generator) for generator in generators])
        return txt_BLD, torch.stack([torch.randn(CONFIG.vec_in_dim, generator=generator) for generator in generators])

    def null(self) -> tuple[Tensor, Tensor]:
        return self.encode([""])


def random_weights(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights would hide mistakes behind their many zeros
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / (2 * fan) ** 0.5)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released folder with tiny random weights: fused, interleaved, under FLUX's names."""
    folder = tmp_path_factory.mktemp("released")
    model, autoencoder = MMDiT(CONFIG), FluxAutoencoder(AUTOENCODER)
    random_weights(model, 0)
    random_weights(autoencoder, 1)
    weights = to_released_state_dict(model, {"fused_qkv": True, "use_liger_rope": False})
    axes = {"config": json.dumps({"num_heads": CONFIG.num_heads, "axes_dim": CONFIG.axes_dim})}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "flux1-dev.safetensors", axes)
    told = {"config": json.dumps({"norm_num_groups": 8})}
    save_file(autoencoder.released_state_dict(), folder / "flux1-dev-ae.safetensors", told)
    return folder


@pytest.fixture(scope="module")
def folder_of_diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that diffusers writes for models of its own."""
    folder = tmp_path_factory.mktemp("diffusers")
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=CONFIG.in_channels,
        num_layers=CONFIG.depth,
        num_single_layers=CONFIG.depth_single_blocks,
        attention_head_dim=CONFIG.head_dim,
        num_attention_heads=CONFIG.num_heads,
        joint_attention_dim=CONFIG.context_in_dim,
        pooled_projection_dim=CONFIG.vec_in_dim,
        guidance_embeds=True,
        axes_dims_rope=CONFIG.axes_dim,
    )
    autoencoder = diffusers.AutoencoderKL(**AUTOENCODER)
    random_weights(transformer, 2)
    random_weights(autoencoder, 3)
    transformer.save_pretrained(folder / "transformer")
    autoencoder.save_pretrained(folder / "vae")
    return folder


def test_images_are_those_of_diffusers_models(folder_of_diffusers: Path) -> None:
    images = FluxImages.from_folder(folder_of_diffusers, text=Text()).image(PROMPTS, seed=5, guidance=3.5, **SIZE)

    transformer = diffusers.FluxTransformer2DModel.from_pretrained(folder_of_diffusers / "transformer")
    autoencoder = diffusers.AutoencoderKL.from_pretrained(folder_of_diffusers / "vae")
    height, width = 28, 36  # near 32 x 32 at 3:2 in steps of 4 pixels: two to a latent, two latents to a patch
    rows, columns = height // 4, width // 4
    C = CONFIG.latent_channels
    noise = [torch.randn(C, 1, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(5 + b)) for b in (0, 1)]
    txt_BLD, vec_BD = Text().encode(PROMPTS)
    state_BCHW = torch.stack(noise)[:, :, 0]
    ids_N3 = torch.cartesian_prod(torch.zeros(1), torch.arange(1.0 * rows), torch.arange(1.0 * columns))
    times = sampling_schedule(3, rows * columns, 1)
    with torch.no_grad():
        for now, then in zip(times[:-1], times[1:], strict=True):
            patches = state_BCHW.view(2, C, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, -1, 4 * C)
            velocity = transformer(
                hidden_states=patches,
                encoder_hidden_states=txt_BLD,
                pooled_projections=vec_BD,
                timestep=now.expand(2),
                img_ids=ids_N3,
                txt_ids=torch.zeros(7, 3),
                guidance=torch.full((2,), 3.5),
            ).sample
            velocity = velocity.view(2, rows, columns, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(state_BCHW.shape)
            state_BCHW = state_BCHW + (then - now) * velocity
        expected = autoencoder.decode(state_BCHW / 0.3611 + 0.1159).sample.clamp(-1, 1)
    assert images.shape == (2, 3, height, width)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


def test_a_released_folder_is_read_and_is_what_its_models_are(released: Path) -> None:
    flux = FluxImages.from_folder(released, text=Text())
    model, autoencoder = MMDiT(CONFIG), FluxAutoencoder(AUTOENCODER)
    random_weights(model, 0)
    random_weights(autoencoder, 1)
    expected = FluxImages(model, autoencoder, Text())
    assert torch.equal(flux.image(PROMPTS, **SIZE), expected.image(PROMPTS, **SIZE))
    assert flux.autoencoder.network.config.norm_num_groups == 8


def test_one_pass_a_step_and_neighbours_do_not_matter(released: Path) -> None:
    flux = FluxImages.from_folder(released, text=Text())
    calls: list[int] = []
    flux.model.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    steps: list[int] = []
    both = flux.image(PROMPTS, seed=1, on_step=steps.append, **SIZE)
    assert (calls, steps) == ([2, 2, 2], [1, 2, 3])
    assert both.dtype == torch.float32
    assert both.abs().max() <= 1
    torch.testing.assert_close(both[1:], flux.image(PROMPTS[1:], seed=2, **SIZE), atol=1e-5, rtol=1e-5)
    assert not torch.equal(both, flux.image(PROMPTS, seed=1, guidance=1.0, **SIZE))


def image_of_rank(folder: Path) -> Tensor:
    """On a rank of several: the images that all of them make together, which only rank 0 has the text of."""
    ranks = SamplingRanks(torch.device("cpu"))
    text = SharedTextEncoders(Text() if ranks.rank == 0 else None, ranks)
    return FluxImages.from_folder(folder, text=text).image(PROMPTS, seed=1, ranks=ranks, **SIZE)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_make_the_image_of_one_process(ranks, released: Path, size: int) -> None:
    expected = FluxImages.from_folder(released, text=Text()).image(PROMPTS, seed=1, **SIZE)
    images = ranks(size).run("opensora_fast/test_flux.py:image_of_rank", released)
    assert len(images) == size
    for image in images:
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)


def test_sizes_are_those_of_the_training_table() -> None:
    with torch.device("meta"):
        model = MMDiT(replace(MMDIT_PRESETS["flux-dev"], depth=1, depth_single_blocks=1))
        levels = {"block_out_channels": [32] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4}
        autoencoder = FluxAutoencoder(
            AUTOENCODER | levels | {"up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 16}
        )
    flux = FluxImages(model, autoencoder, Text())
    assert flux.size("768px", "16:9") == (576, 1024)
    assert flux.size("768px", "2.39:1") == (496, 1184)
    assert flux.size("768px", "3:2") == (624, 944)


def test_what_a_folder_lacks_is_named(tmp_path: Path, released: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        flux_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no flux1-dev\.safetensors"):
        flux_files(tmp_path)
    (tmp_path / "flux1-dev.safetensors").write_bytes((released / "flux1-dev.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"holds no flux1-dev-ae\.safetensors"):
        flux_files(tmp_path)
    (tmp_path / "ae.safetensors").write_bytes((released / "flux1-dev-ae.safetensors").read_bytes())
    assert flux_files(tmp_path) == (tmp_path / "flux1-dev.safetensors", tmp_path / "ae.safetensors")


def test_models_that_do_not_fit_are_refused() -> None:
    with torch.device("meta"):
        undistilled, model = MMDiT(replace(CONFIG, guidance_embed=False)), MMDiT(CONFIG)
        autoencoder = FluxAutoencoder(AUTOENCODER | {"latent_channels": 2})
    with pytest.raises(UserError, match="no guidance embedding"):
        FluxImages(undistilled, autoencoder, Text())
    with pytest.raises(UserError, match="latents of 4 channels, its autoencoder has 2"):
        FluxImages(model, autoencoder, Text())
