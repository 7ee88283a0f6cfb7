"""The modulation of every block for all steps of a video, computed before the first: the schedule is known then.

One matrix product per block for S V rows takes the place of S products for V rows each. At so few rows a product costs
what reading its matrix does, so a video reads the modulation matrices (27 % of the weights) once rather than S times.
The result is small: in bfloat16 2 MB a row for the released model, 0.2 GB for 50 steps of one prompt and the empty one.

Shapes   S steps, V distinct pooled text vectors, B items of a model call, D channels of a vector; row s V + v of the
         whole is step s with vector v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_fast.mmdit import MMDiT, Modulation


@dataclass(frozen=True)
class ModulationSchedule:
    """See `of`."""

    modulation: Modulation  # of S V rows
    num_vectors: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: MMDiT, timesteps: Tensor, vectors: Tensor, guidance: Tensor | None = None) -> ModulationSchedule:
        """The modulation at `timesteps` [S] (those at which the model is called) for each of `vectors` [V, D].

        `guidance` is the scale of a guidance-distilled model for each vector [V]. Raises UserError where
        `MMDiT.modulation` does.
        """
        steps, num_vectors = len(timesteps), len(vectors)
        modulation = model.modulation(
            timesteps.repeat_interleave(num_vectors),
            vectors.repeat(steps, 1),
            None if guidance is None else guidance.repeat(steps),
        )
        return cls(modulation, num_vectors)

    def rows(self, step: int, index_B: Tensor) -> Modulation:
        """The modulation of a batch at 0-based `step`, item b of which has vector `index_B[b]` (int64 [B])."""
        return self.modulation.rows(step * self.num_vectors + index_B)
