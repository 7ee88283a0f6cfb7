"""The two losses, by hand: what the model is given, what it is asked for, and how latents are scaled."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.flow import shift_alpha
from opensora_fast.positions import patchify
from opensora_fast.train.autoencoder_loop import ReconstructionTask, latent_deviation, psnr, scaled_recipe
from opensora_fast.train.diffusion import VelocityTask
from opensora_fast.train.recipes import find_recipe

CPU = torch.device("cpu")
TEXT_DIM, VECTOR_DIM = 64, 32


class Recorder(nn.Module):
    """Predicts nothing and remembers what it was given."""

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y_vec: Tensor, **more
    ):
        self.given = SimpleNamespace(img=img, img_ids=img_ids, txt=txt, timesteps=timesteps, y_vec=y_vec, **more)
        return torch.zeros_like(img)


class FrameAverages:
    """An autoencoder of 4 x 8 x 8 whose latent is the mean colour of a cell, sixteen times."""

    latent_channels, compression, causal = 16, (4, 8, 8), False

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        frames = min(4, video_BCTHW.shape[2])
        cells = nn.functional.avg_pool3d(video_BCTHW.mean(dim=1, keepdim=True), (frames, 8, 8))
        return cells.expand(-1, 16, -1, -1, -1)


class Words:
    """Text embeddings that say which prompt they are of; null is -1."""

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        self.prompts = prompts
        numbers = torch.arange(len(prompts), dtype=torch.float32)
        return numbers.view(-1, 1, 1).expand(-1, 5, TEXT_DIM), numbers.view(-1, 1).expand(-1, VECTOR_DIM)

    def null(self) -> tuple[Tensor, Tensor]:
        return torch.full((1, 5, TEXT_DIM), -1.0), torch.full((1, VECTOR_DIM), -1.0)


def _task(stage: str, **changes) -> VelocityTask:
    recipe = dataclasses.replace(find_recipe(stage), **changes)
    return VelocityTask(recipe, Recorder(), FrameAverages(), Words(), CPU, torch.float32)


def _batch(size: int) -> SimpleNamespace:
    video = torch.rand(size, 3, 16, 48, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1
    fps = torch.full((size,), 25.0)
    text = ["a rabbit"] * size
    return SimpleNamespace(video_BCTHW=video, text=text, fps=fps, motion=[None] * size, encoded=None)


def test_the_velocity_loss_is_that_of_noise_minus_data_at_shifted_times() -> None:
    task, batch = _task("demo_stage1"), _batch(64)
    loss, tokens = task.loss(batch, torch.Generator().manual_seed(0))
    given = task.model.given
    assert tokens == 64 * (4 * 3 * 5 + 5)
    assert task.text.prompts[0] == "a rabbit. 25 FPS."

    data = patchify(task.autoencoder.encode(batch.video_BCTHW), 2)
    time = given.timesteps.view(-1, 1, 1)
    noise = (given.img - (1 - time) * data) / (1 - (1 - 1e-5) * (1 - time))
    assert abs(noise.std().item() - 1) < 0.02
    expected = ((1 - 1e-5) * noise - data).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)  # noise is recovered by a division

    # undoing the shift leaves a logit-normal: mean 0, deviation 1
    alpha = shift_alpha(15, 4)
    unshifted = given.timesteps / (alpha - (alpha - 1) * given.timesteps)
    logits = torch.logit(unshifted)
    assert abs(logits.mean().item()) < 4 / 64**0.5
    assert abs(logits.std().item() - 1) < 0.35


def test_text_is_dropped_per_encoder_at_its_rate() -> None:
    task = _task("demo_stage1")
    task.loss(_batch(400), torch.Generator().manual_seed(0))
    txt_dropped, vec_dropped = (task.model.given.txt[:, 0, 0] < 0), (task.model.given.y_vec[:, 0] < 0)
    for dropped in (txt_dropped, vec_dropped):
        assert abs(dropped.float().mean().item() - 0.316) < 0.08
    assert abs((txt_dropped & vec_dropped).float().mean().item() - 0.1) < 0.05


def test_conditions_reach_the_model_as_mask_and_lone_frame() -> None:
    task, batch = _task("demo_stage2", condition_weights={"i2v_head": 1.0}), _batch(2)
    task.loss(batch, torch.Generator().manual_seed(0))
    cond = task.model.given.cond
    mask, reference = cond[..., :4], cond[..., 4:]
    per_frame = 3 * 5
    assert (mask[:, :per_frame] == 1).all()
    assert (cond[:, per_frame:] == 0).all()
    alone = task.autoencoder.encode(batch.video_BCTHW[:, :, :1])
    torch.testing.assert_close(reference[:, :per_frame], patchify(alone, 2))

    task = _task("demo_stage2", condition_weights={"t2v": 1.0})
    task.loss(batch, torch.Generator().manual_seed(0))
    assert (task.model.given.cond == 0).all()


def test_without_held_out_clips_there_is_no_figure() -> None:
    assert _task("demo_stage1").evaluate([]) == {}


def test_psnr_of_a_known_error() -> None:
    video = torch.zeros(2, 3, 4, 8, 8)
    torch.testing.assert_close(psnr(video, video + 0.2), torch.full((2,), 20.0))


def test_reconstruction_loss_is_the_mean_absolute_error() -> None:
    recipe = find_recipe("demo_ae")
    torch.manual_seed(0)
    model = VideoDCAE(recipe.autoencoder.config)
    batch = SimpleNamespace(video_BCTHW=torch.rand(2, 3, 8, 16, 16) * 2 - 1)
    loss, tokens = ReconstructionTask(recipe, model, CPU).loss(batch, torch.Generator())
    assert tokens == 2 * 2 * 2 * 2
    torch.testing.assert_close(loss, (model.reconstruct(batch.video_BCTHW) - batch.video_BCTHW).abs().mean())


def test_the_latents_scale_is_their_deviation_over_all_clips() -> None:
    recipe = find_recipe("demo_ae")
    torch.manual_seed(0)
    model = VideoDCAE(recipe.autoencoder.config)
    batches = [SimpleNamespace(video_BCTHW=torch.rand(2, 3, 8, 16, 16) * scale) for scale in (1, 2)]
    with torch.no_grad():
        latents = torch.cat([model.encode(batch.video_BCTHW).flatten() for batch in batches])
        deviation = latent_deviation(model, batches)
    assert deviation == pytest.approx(latents.double().std(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("deviation", [0.09, 101.0, float("nan")])
def test_a_useless_scale_is_refused_with_the_remedy(deviation: float) -> None:
    with pytest.raises(UserError, match=r"outside 0\.1 to 100.*--loop\.steps"):
        scaled_recipe(find_recipe("demo_ae"), deviation)


def test_a_useful_scale_is_stored() -> None:
    assert scaled_recipe(find_recipe("demo_ae"), 0.5).autoencoder.config.scaling_factor == 0.5
