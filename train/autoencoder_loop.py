"""The reconstruction task: clips to the L1 loss of a Video DC-AE, its held-out PSNR, and the scale of its latents.

B batch, C channels, T frames, H W size; pixels in [-1, 1].
PSNR is 10 log10(4 / mean squared error) over a clip, averaged over clips; its yardstick is each clip's own mean colour.
Source: paper section 3 (reconstruction phase); the scale is the standard deviation that the released code divides
latents by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.train.checkpoint import RunFolder
from opensora_fast.train.config import AutoencoderRecipe, DataSection
from opensora_fast.train.feeds import fixed_feed, training_feed
from opensora_fast.train.loader import Batch
from opensora_fast.train.loop import train
from opensora_fast.train.metrics import mean

SCALE_CLIPS = 256  # enough for three digits of a standard deviation


def psnr(video_BCTHW: Tensor, other_BCTHW: Tensor) -> Tensor:
    """PSNR in dB per clip [B] of videos in [-1, 1]."""
    return 10 * torch.log10(4 / (video_BCTHW.float() - other_BCTHW.float()).square().mean(dim=(1, 2, 3, 4)))


class ReconstructionTask:
    """What the loop needs of an autoencoder run: the module to train, a loss, a held-out evaluation."""

    @staticmethod
    def architecture(recipe: dict) -> dict:
        """The part of a recipe that a checkpoint's weights depend on; the latents' scale is measured after them.

        Raises KeyError for a diffusion recipe, whose autoencoder is not what it trains.
        """
        if "model" in recipe:
            raise KeyError("model")
        return {key: value for key, value in recipe["autoencoder"]["config"].items() if key != "scaling_factor"}

    def __init__(self, recipe: AutoencoderRecipe, model: VideoDCAE, device: torch.device) -> None:
        self.recipe = recipe
        self.model = model
        self.device = device
        # on every device: at the end of training the loss lies far below bf16's resolution of a pixel
        self.dtype = torch.float32

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
        """Mean absolute error of a batch (fp32 scalar) and its number of latent positions. `generator` is not used."""
        video_BCTHW = self._input(batch)
        latent_size = self.model.latent_shape(*video_BCTHW.shape[2:])
        tokens = video_BCTHW.shape[0] * latent_size[0] * latent_size[1] * latent_size[2]
        return nn.functional.l1_loss(self.model.reconstruct(video_BCTHW).float(), video_BCTHW.float()), tokens

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Held-out L1 and PSNR in dB, beside that of each clip's mean colour; nothing without batches."""
        losses, quality, baseline = [], [], []
        for batch in batches:
            video_BCTHW = self._input(batch)
            reconstruction_BCTHW = self.model.reconstruct(video_BCTHW)
            losses.append((reconstruction_BCTHW.float() - video_BCTHW.float()).abs().mean().item())
            quality += psnr(video_BCTHW, reconstruction_BCTHW).tolist()
            baseline += psnr(video_BCTHW, video_BCTHW.float().mean(dim=(2, 3, 4), keepdim=True)).tolist()
        if not losses:
            return {}
        return {"loss": mean(losses), "psnr": mean(quality), "psnr_baseline": mean(baseline)}

    def _input(self, batch: Batch) -> Tensor:
        parameter = next(self.model.parameters())
        return batch.video_BCTHW.to(self.device, parameter.dtype, memory_format=torch.channels_last_3d)


@torch.no_grad()
def latent_deviation(autoencoder: VideoDCAE, batches: Iterable[Batch]) -> float:
    """Standard deviation of the unscaled latents over the clips of `batches` (all of them are read)."""
    assert autoencoder.config.scaling_factor is None, "latents are already scaled"
    parameter = next(autoencoder.parameters())
    count, total, total_square = 0, 0.0, 0.0
    for batch in batches:
        latent_BCTHW = autoencoder.encode(batch.video_BCTHW.to(parameter.device, parameter.dtype)).double()
        count += latent_BCTHW.numel()
        total += latent_BCTHW.sum().item()
        total_square += latent_BCTHW.square().sum().item()
    return max(total_square / count - (total / count) ** 2, 0.0) ** 0.5


def scaled_recipe(recipe: AutoencoderRecipe, deviation: float) -> AutoencoderRecipe:
    """The recipe with `scaling_factor` = the latents' standard deviation. Raises UserError outside 0.1 to 100."""
    if not 0.1 <= deviation <= 100:
        raise UserError(
            f"latent standard deviation {deviation:.3g} lies outside 0.1 to 100: the autoencoder has learnt no usable "
            "latent; train it longer (--loop.steps) or lower its learning rate (--optimizer.lr)"
        )
    config = dataclasses.replace(recipe.architecture, scaling_factor=deviation)
    return dataclasses.replace(recipe, autoencoder=dataclasses.replace(recipe.autoencoder, config=config))


def _without_images(data: DataSection) -> DataSection:
    """`data` for clips alone, if it has any: a lone image's latents are smaller than a clip's."""
    clips = {
        resolution: {frames: entry for frames, entry in by_frames.items() if frames > 1}
        for resolution, by_frames in data.buckets.items()
    }
    return dataclasses.replace(data, buckets=clips) if any(clips.values()) else data


def train_autoencoder(recipe: AutoencoderRecipe, run: RunFolder, device: torch.device, *, fresh: bool) -> bool:
    """Train the Video DC-AE of a recipe whose data are resolved. Returns False when interrupted (state saved).

    The last checkpoint's recipe holds the latents' standard deviation over training clips as `scaling_factor`.
    Raises UserError for clips that do not fit, and for latents of a useless scale.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.loop.seed)
        model = VideoDCAE(recipe.architecture)
    model = model.to(device).channels_last()
    multiple = model.compression[1]
    loader = training_feed(recipe.data, model, multiple=multiple, seed=recipe.loop.seed, device=device)
    heldout = fixed_feed(recipe.data.heldout_index, recipe.data, multiple=multiple)
    task = ReconstructionTask(recipe, model, device)
    if fresh:
        run.clear()

    def measure_scale(recipe: AutoencoderRecipe) -> AutoencoderRecipe:
        clips = fixed_feed(recipe.data.index, _without_images(recipe.data), multiple=multiple, clips=SCALE_CLIPS)
        return scaled_recipe(recipe, latent_deviation(model, clips))

    return train(task, recipe, run, loader, heldout, finish=measure_scale)
