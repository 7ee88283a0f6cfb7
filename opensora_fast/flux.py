"""Images from FLUX.1-dev: what a video can begin with (text-to-image-to-video).

FLUX is the ancestor of the video model, so its transformer is the project's own MMDiT with the guidance embedding: one
pass a step, where the scale of guidance is an input. It is read like the video model; T5 and CLIP are those of the
video model; the autoencoder is diffusers'. Times are shifted as for a video of one frame.

Shapes   B images, C latent channels, H, W pixels.
Source   Open-Sora 2.0 (arXiv 2503.09642) and its released text-to-image-to-video pipeline: 768px at the size of the
         training table, guidance 4, as many steps as the video, the schedule of the video model in place of FLUX's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.flow import sampling_schedule
from opensora_fast.flux_autoencoder import FluxAutoencoder, compression_of, diffusers_config, released_config
from opensora_fast.mmdit import MMDiT
from opensora_fast.parameter_source import open_parameters
from opensora_fast.released import load_mmdit_from
from opensora_fast.resolutions import video_size
from opensora_fast.sampling import denoise, initial_noise
from opensora_fast.text import PromptEncoding, SharedTextEncoders
from opensora_fast.weight_files import WeightFiles

if TYPE_CHECKING:
    from opensora_fast.sampling_ranks import SamplingRanks

# A folder as diffusers writes it, and the files of one as released (Open-Sora's names, then FLUX's own).
DIFFUSERS_PARTS = ("transformer", "vae")
TRANSFORMER_FILE = "flux1-dev.safetensors"
AUTOENCODER_FILES = ("flux1-dev-ae.safetensors", "ae.safetensors")


class FluxImages:
    """Transformer, autoencoder and the video model's text encoders; `model` and `autoencoder` are modules to place."""

    def __init__(self, model: MMDiT, autoencoder: FluxAutoencoder, text: PromptEncoding) -> None:
        """Raises UserError for a transformer that is no FLUX.1-dev, or whose latents are not the autoencoder's."""
        if not model.config.guidance_embed:
            raise UserError("the transformer of FLUX has no guidance embedding: FLUX.1-dev is needed")
        if model.config.latent_channels != autoencoder.latent_channels:
            raise UserError(
                f"the transformer of FLUX takes latents of {model.config.latent_channels} channels, its autoencoder "
                f"has {autoencoder.latent_channels}: take both from one model"
            )
        self.model = model
        self.autoencoder = autoencoder
        self.text = text

    @classmethod
    def from_folder(
        cls,
        path: Path | str,
        *,
        text: PromptEncoding,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> FluxImages:
        """From a diffusers folder (transformer/, vae/) or a released one (flux1-dev.safetensors, its autoencoder).

        Raises UserError naming what is missing, and as `load_mmdit_from` and `FluxAutoencoder` do.
        """
        transformer, autoencoder = flux_files(Path(path))
        small = read_autoencoder(autoencoder, device=device, dtype=dtype)  # first: what is wrong with it is told soon
        return cls(
            load_mmdit_from(WeightFiles.open(transformer), device=torch.device(device), dtype=dtype), small, text
        )

    @torch.no_grad()
    def image(
        self,
        prompts: Sequence[str],
        *,
        resolution: str = "768px",
        aspect_ratio: str = "16:9",
        steps: int = 50,
        seed: int = 0,
        guidance: float = 4.0,
        on_step: Callable[[int], None] | None = None,
        ranks: SamplingRanks | None = None,
    ) -> Tensor:
        """One image of each prompt, as it is: [B, 3, H, W] float32 in [-1, 1], on the model's device.

        Image b is drawn from seed + b alone. `on_step` is called with the number of steps done; with `ranks` all of
        them share the transformer's passes and have the images. Raises UserError for a size that has no name.
        """
        height, width = self.size(resolution, aspect_ratio)
        latent_rows, latent_columns = height // self.autoencoder.compression, width // self.autoencoder.compression
        device = self.model.device
        text = self.text
        if ranks is not None and not isinstance(text, SharedTextEncoders):
            text = SharedTextEncoders(text, ranks)
        txt_BLD, vec_BD = (x.to(device) for x in text.encode(list(prompts)))
        shape = (len(prompts), self.autoencoder.latent_channels, 1, latent_rows, latent_columns)
        tokens = latent_rows * latent_columns // self.model.config.patch_size**2
        latent_BCTHW = denoise(
            self.model,
            initial_noise(seed, shape).to(device),
            timesteps=sampling_schedule(steps, tokens, 1),
            txt=txt_BLD,
            vec=vec_BD,
            null_txt=txt_BLD[:1],  # not computed: the scale of guidance is an input of the model
            null_vec=vec_BD[:1],
            mask=None,
            reference=None,
            guidance_txt=1.0,
            guidance_img=1.0,
            oscillate_txt=False,
            oscillate_img=False,
            dynamic_img_guidance=False,
            embedded_guidance=guidance,
            ranks=ranks,
            on_step=on_step,
        )
        return self.autoencoder.decode(latent_BCTHW[:, :, 0]).float().clamp(-1, 1)

    def size(self, resolution: str, aspect_ratio: str) -> tuple[int, int]:
        """(height, width) of an image in pixels. Raises UserError for names that are none."""
        multiple = self.autoencoder.compression * self.model.config.patch_size
        return video_size(resolution, aspect_ratio, multiple, training=True)


def flux_files(folder: Path) -> tuple[Path, Path]:
    """Where a FLUX folder has its transformer and its autoencoder. Raises UserError naming what is not there."""
    if not folder.is_dir():
        raise UserError(f"--flux {folder}: no such folder; name one of FLUX.1-dev, released or of diffusers")
    if all((folder / part).is_dir() for part in DIFFUSERS_PARTS):
        transformer, autoencoder = (folder / part for part in DIFFUSERS_PARTS)
        return transformer, autoencoder
    transformer = folder / TRANSFORMER_FILE
    found = [folder / name for name in AUTOENCODER_FILES if (folder / name).is_file()]
    if not transformer.is_file() or not found:
        absent = TRANSFORMER_FILE if not transformer.is_file() else AUTOENCODER_FILES[0]
        raise UserError(
            f"--flux {folder}: holds no {absent}, and not both of transformer/ and vae/; name a folder of FLUX.1-dev"
        )
    return transformer, found[0]


def image_multiple(folder: Path) -> int:
    """The pixels that the sides of this FLUX's images are multiples of; of its weights the headers are read."""
    transformer, autoencoder = flux_files(folder)
    is_folder = autoencoder.is_dir()
    config = diffusers_config(autoencoder) if is_folder else released_config(WeightFiles.open(autoencoder))
    form: Any = open_parameters(transformer).config
    return compression_of(config) * form.patch_size


def read_autoencoder(path: Path, *, device: torch.device | str, dtype: torch.dtype) -> FluxAutoencoder:
    """Of diffusers' folder or the released file. Raises UserError as `FluxAutoencoder` does."""
    if path.is_dir():
        return FluxAutoencoder.from_diffusers(path, device=device, dtype=dtype)
    return FluxAutoencoder.from_released(WeightFiles.open(path), device=device, dtype=dtype)
