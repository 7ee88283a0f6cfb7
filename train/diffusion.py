"""The velocity task: a batch of clips to the flow-matching loss of the video diffusion transformer.

    clip -> latent x0;  x_t = (1 - t) x0 + (1 - (1 - s)(1 - t)) x1;  loss = mean |model(x_t, t, text, condition) - ((1 -
    s) x1 - x0)|^2

Over several ranks that share a batch, each makes the same draws, encodes a part of the clips and prompts, and computes
the loss of its own video tokens; the mean over all of them is the sum of these parts, weighted by their numbers.

A batch that comes from a cache (`data.cache`) is encoded already: the same draws, without encoders. Its latents,
embeddings and references have the same bits as far as they were encoded in equal batches, and so has the loss; an
encoder's last bits may depend on what else is in its batch, and the loss is then equal within rounding.

B batch, C latent channels, T latent frames, H W latent size, N video tokens, L text tokens, D features.
Source: paper section 4.2 and the released code, which differs from it in sign and in the shift (see
`opensora_fast.flow`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from opensora_fast.autoencoder import Autoencoder, LatentLayout
from opensora_fast.checkpoint_folder import step_folders
from opensora_fast.conditions import condition_tokens, draw_condition, stored_condition, training_condition
from opensora_fast.flow import sample_timesteps, shift_alpha
from opensora_fast.initialisation import REPORT, InitialisationReport, initialise_mmdit, require_fit
from opensora_fast.kernels.context_parallel import ContextParallel
from opensora_fast.kernels.flow_mix import flow_mix, velocity_loss
from opensora_fast.mmdit import MMDiT
from opensora_fast.parameter_source import ParameterSource, open_parameters
from opensora_fast.positions import patchify, position_ids_THW
from opensora_fast.sampling import sample
from opensora_fast.sequence_shards import joint_lengths, shard, total
from opensora_fast.text import TextEncoders
from opensora_fast.train.cache_plan import prompts_of
from opensora_fast.train.cache_reader import EncodedBatch, EncoderCache
from opensora_fast.train.checkpoint import RunFolder
from opensora_fast.train.config import DiffusionRecipe
from opensora_fast.train.diffusion_inputs import cached_inputs, clip_inputs
from opensora_fast.train.loader import Batch
from opensora_fast.train.loop import train
from opensora_fast.train.metrics import mean
from opensora_fast.train.shared_encoding import (
    FLOPS_PER_PROMPT,
    SharedAutoencoder,
    SharedEncoding,
    Work,
    clips_work,
    require_alike,
)
from opensora_fast.video_io import write_image, write_video


class VelocityTask:
    """What the loop needs of a diffusion run: the module to train, a loss, a held-out evaluation.

    With a `context`, all of its ranks are given the same batches and generators; their gradients are parts of one sum,
    which `gradient_reduction.reduce_gradients` adds up before the optimiser's step.

    autoencoder, text: None where all batches come from a cache; `layout` is then that of its latents.
    """

    @staticmethod
    def architecture(recipe: dict) -> dict:
        """The part of a recipe that a checkpoint's weights depend on."""
        return recipe["model"]

    def __init__(
        self,
        recipe: DiffusionRecipe,
        model: MMDiT,
        autoencoder: Autoencoder | None,
        text: TextEncoders | None,
        device: torch.device,
        dtype: torch.dtype,
        context: ContextParallel | None = None,
        *,
        layout: LatentLayout | None = None,
    ) -> None:
        if layout is None:
            assert autoencoder is not None
            layout = autoencoder
        self.recipe = recipe
        self.model = model
        self.autoencoder = autoencoder
        self.text = text
        self.layout = layout
        self.device = device
        self.dtype = dtype
        self.context = context if context is not None and context.size > 1 else None
        self._encode = SharedEncoding(self.context, device)
        self._null: tuple[Tensor, Tensor] | None = None

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
        """Mean squared velocity error of one batch (fp32 scalar) and its number of tokens, text included.

        All randomness is drawn from `generator` (a CPU one, so that every device sees the same draws). Over several
        ranks, both figures are those of the whole batch; the loss's gradient is this rank's part.
        """
        config = self.recipe.model
        if self.context is not None:  # the device is waited for, but at the beginning of a step it has nothing to do
            drawn = (tuple(batch.video_BCTHW.shape), batch.paths, batch.text, generator.get_state().tolist())
            given = (drawn, config, self.dtype)  # all that the lengths and shapes of what is exchanged depend on
            require_alike("batch, generator, model or dtype", repr(given), self.context, self.device)
        conditions = self._draw_conditions(batch.video_BCTHW, generator)
        keep_2B = torch.rand(2, len(batch.text), generator=generator) >= self.recipe.text.dropout
        with torch.no_grad():
            if batch.encoded is None:
                latent_BCTHW, txt_BLD, vec_BD, cond_BND = self._encode_batch(batch, conditions, keep_2B)
            else:
                latent_BCTHW, txt_BLD, vec_BD, cond_BND = self._stored_batch(batch.encoded, conditions, keep_2B)
        batch_size, _, frames, rows, columns = latent_BCTHW.shape
        tokens_per_frame = rows * columns // config.patch_size**2
        t_B = sample_timesteps(batch_size, shift_alpha(tokens_per_frame, frames), generator).to(self.device)
        noise_BCTHW = torch.randn(latent_BCTHW.shape, generator=generator).to(self.device)
        mixed_BCTHW, velocity_BCTHW = flow_mix(latent_BCTHW, noise_BCTHW, t_B)
        img_BND, target_BND = (patchify(x_BCTHW, config.patch_size) for x_BCTHW in (mixed_BCTHW, velocity_BCTHW))
        ids_N3 = position_ids_THW(frames, rows // config.patch_size, columns // config.patch_size).to(self.device)
        video, text = img_BND.shape[1], txt_BLD.shape[1]
        context = self.context
        if context is not None:
            context = context.with_lengths(joint_lengths(text, video, context.size))
        velocity_BND = self.model(
            self._part(img_BND.to(self.dtype)),
            self._part(ids_N3.expand(batch_size, -1, -1)),
            self._part(txt_BLD.to(self.dtype)),
            self._part(torch.zeros(batch_size, text, 3, device=self.device)),
            t_B,
            vec_BD.to(self.dtype),
            cond=None if cond_BND is None else self._part(cond_BND.to(self.dtype)),
            checkpoint_double=self.recipe.parallel.checkpoint_double,
            checkpoint_single=self.recipe.parallel.checkpoint_single,
            context=context,
        )
        return self._mean_error(velocity_BND, target_BND), batch_size * (video + text)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss over `validation.draws` fixed draws of noise, time, condition and dropout; {} without batches."""
        losses = []
        for number, batch in enumerate(batches):
            for draw in range(self.recipe.validation.draws):
                generator = torch.Generator().manual_seed(1_000 * number + draw)
                losses.append(self.loss(batch, generator)[0].item())
        return {"loss": mean(losses)} if losses else {}

    def _part(self, x_BND: Tensor) -> Tensor:
        """This rank's tokens."""
        return x_BND if self.context is None else shard(x_BND, self.context.rank, self.context.size)

    def _mean_error(self, velocity_BND: Tensor, target_BND: Tensor) -> Tensor:
        """The mean over all video tokens, from this rank's velocities; its gradient is this rank's part of the whole's.

        The weight of a part is no power of two: it is multiplied in float32, where the loss's own backward would round
        it to the velocity's dtype.
        """
        if self.context is None:
            return velocity_loss(velocity_BND, target_BND)
        wide_BND = velocity_BND.to(torch.promote_types(velocity_BND.dtype, torch.float32))
        if not wide_BND.numel():  # of no tokens there is no mean; the zero keeps this rank in the others' backward
            return total(wide_BND.sum(), self.context)
        weight = wide_BND.shape[1] / target_BND.shape[1]
        return total(velocity_loss(wide_BND, self._part(target_BND)) * weight, self.context)

    def _draw_conditions(self, video_BCTHW: Tensor, generator: torch.Generator) -> list[str]:
        """The condition of every clip; none where the model takes none."""
        if not self.recipe.model.cond_embed:
            return []
        frames, layout = video_BCTHW.shape[2], self.layout
        return [
            draw_condition(self.recipe.condition_weights, frames, layout.causal, generator, layout.compression[0])
            for _ in range(video_BCTHW.shape[0])
        ]

    def _encode_batch(
        self, batch: Batch, conditions: list[str], keep_2B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Latents (fp32), T5 embeddings, CLIP vectors, and the condition's tokens where the model takes them."""
        assert self.autoencoder is not None
        assert self.text is not None
        text, video_BCTHW = self.text, batch.video_BCTHW.to(self.device)
        prompts = prompts_of(batch.text, batch.fps.tolist(), batch.motion)
        works = [
            clips_work(self.autoencoder, video_BCTHW),
            Work(
                signature=("text",),
                count=len(prompts),
                cost=FLOPS_PER_PROMPT,
                encode=lambda items: text.encode(prompts[items]),
            ),
        ]
        if self._null is None:
            works.append(Work(signature=("null",), count=1, cost=FLOPS_PER_PROMPT, encode=lambda _: text.null()))
        (latent_BCTHW,), (txt_BLD, vec_BD), *null = self._encode(works)
        latent_BCTHW = latent_BCTHW.float()
        self._null = self._null or (null[0][0], null[0][1])
        embeddings = _dropped((txt_BLD, vec_BD), self._null, keep_2B)
        if not self.recipe.model.cond_embed:
            return latent_BCTHW, *embeddings, None
        autoencoder = self.autoencoder if self.context is None else SharedAutoencoder(self.autoencoder, self._encode)
        mask_B1THW, reference_BCTHW = training_condition(autoencoder, video_BCTHW, latent_BCTHW, conditions)
        cond_BND = condition_tokens(mask_B1THW, reference_BCTHW, self.recipe.model.patch_size)
        return latent_BCTHW, *embeddings, cond_BND

    def _stored_batch(
        self, encoded: EncodedBatch, conditions: list[str], keep_2B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What `_encode_batch` gives, without encoders; every rank reads all of the batch."""
        encoded = encoded.to(self.device)
        latent_BCTHW = encoded.latent_BCTHW.float()
        null = (encoded.null_txt_1LD, encoded.null_vec_1D)
        embeddings = _dropped((encoded.txt_BLD, encoded.vec_BD), null, keep_2B)
        if not self.recipe.model.cond_embed:
            return latent_BCTHW, *embeddings, None
        condition = stored_condition(self.layout, latent_BCTHW, conditions, encoded.references)
        return latent_BCTHW, *embeddings, condition_tokens(*condition, self.recipe.model.patch_size)


def _dropped(embeddings: tuple[Tensor, Tensor], null: tuple[Tensor, Tensor], keep_2B: Tensor) -> tuple[Tensor, Tensor]:
    """T5's and CLIP's, each independently the empty prompt's where `keep_2B` is false."""
    (txt_BLD, vec_BD), (null_txt_1LD, null_vec_1D) = embeddings, null
    keep_2B = keep_2B.to(txt_BLD.device)
    return (
        torch.where(keep_2B[0, :, None, None], txt_BLD, null_txt_1LD),
        torch.where(keep_2B[1, :, None], vec_BD, null_vec_1D),
    )


def train_diffusion(recipe: DiffusionRecipe, run: RunFolder, device: torch.device, *, fresh: bool) -> bool:
    """Train the transformer of a recipe whose data are resolved. Returns False when interrupted (state saved).

    From a cache no encoder is loaded, unless samples are asked for.
    Raises UserError for encoders, weights, clips or a cache that do not fit the recipe.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    resumed = not fresh and len(step_folders(run.path)) > 0
    source = None
    if recipe.init_weights is not None and not resumed:
        source = open_parameters(Path(recipe.init_weights))
        require_fit(source, recipe.model, recipe.new_layers)  # before encoders are loaded
    if recipe.data.cache is None:
        inputs = clip_inputs(recipe, run.path, device, dtype)
    else:
        inputs = cached_inputs(recipe, EncoderCache.open(Path(recipe.data.cache)), device, dtype)
    recipe = inputs.recipe
    model, report = initial_model(recipe, source, device, resumed=resumed)
    task = VelocityTask(recipe, model, inputs.autoencoder, inputs.text, device, dtype, layout=inputs.layout)
    if fresh:
        run.clear()
        (run.path / REPORT).unlink(missing_ok=True)
    if report is not None:
        report.print()
        report.save(run.path)

    def sample_clips(step: int) -> None:
        _validation_samples(task, run.path, step)

    return train(task, recipe, run, inputs.loader, inputs.heldout, sample=sample_clips)


def initial_model(
    recipe: DiffusionRecipe, source: ParameterSource | None, device: torch.device, *, resumed: bool
) -> tuple[MMDiT, InitialisationReport | None]:
    """The model before its first step, fp32 on the device: other weights and what became of them, or drawn.

    Other weights go to the device as they are read, and never are on the host as a whole. All that is drawn is drawn
    on the CPU from the recipe's seed: what those weights lack, or every layer. Of a run that is `resumed` no weights
    are drawn: its checkpoint has them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.loop.seed)
        if source is None and not resumed:
            return MMDiT(recipe.model).to(device), None
        with torch.device("meta"):
            model = MMDiT(recipe.model)
        model.to_empty(device=device)
        return model, None if source is None else initialise_mmdit(model, source, new_layers=recipe.new_layers)


def _validation_samples(task: VelocityTask, run: Path, step: int) -> None:
    """One clip per validation prompt, in RUN/samples."""
    assert task.autoencoder is not None
    assert task.text is not None
    recipe = task.recipe
    settings = recipe.sampling_defaults
    for number, prompt in enumerate(recipe.validation.prompts):
        video_BCTHW = sample(task.model, task.autoencoder, task.text, [prompt], settings)
        path = run / "samples" / f"step-{step}-{number}.{'png' if settings.frames == 1 else 'mp4'}"
        path.parent.mkdir(exist_ok=True)
        record = {"comment": json.dumps({"prompt": prompt, "step": step, **dataclasses.asdict(settings)})}
        if settings.frames == 1:
            write_image(path, video_BCTHW[0, :, 0], record)
        else:
            write_video(path, video_BCTHW[0], settings.fps, record)
