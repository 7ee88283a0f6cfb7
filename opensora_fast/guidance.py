"""How strongly each prediction of a sampling step counts.

    v = u2 + g_image (u1 - u2) + g_text (c - u1) = g_text c + (g_image - g_text) u1 + (1 - g_image) u2

with c the velocity given text and condition, u1 given the empty prompt and the condition, u2 given neither. Without a
condition u1 is u2 and their coefficients add. The scales oscillate to 1 in every other step after the first ten.

Source   Open-Sora 2.0 (arXiv 2503.09642) section 5.2 and the released sampler.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_STEADY_STEPS = 10  # guidance does not oscillate in these first steps, which lay out the scene


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly each of a step's predictions counts."""

    text: float
    image: float
    oscillate_text: bool
    oscillate_image: bool
    dynamic_image: bool
    num_steps: int
    latent_frames: int

    def weights(self, step: int, *, conditioned: bool) -> dict[str, Tensor]:
        """Weight of every prediction of 0-based `step` per latent frame: [T] or [1] float64 on the CPU, summing to 1.

        Keys: "text" (c), "condition" (u1, only when conditioned) and "nothing" (u2).
        """
        text = torch.tensor([self._scale(self.text, self.oscillate_text, step)], dtype=torch.float64)
        if not conditioned:
            return {"text": text, "nothing": 1 - text}
        image_T = self._image_scale(step)
        return {"text": text, "condition": image_T - text, "nothing": 1 - image_T}

    def table(self, *, conditioned: bool) -> tuple[list[str], Tensor]:
        """The keys of `weights` and its values for every step: K names and [steps, K, T] float64 on the CPU."""
        weights = [self.weights(step, conditioned=conditioned) for step in range(self.num_steps)]
        rows = [torch.stack([weight_T.expand(self.latent_frames) for weight_T in of.values()]) for of in weights]
        return list(weights[0]), torch.stack(rows)

    @staticmethod
    def _scale(scale: float, oscillate: bool, step: int) -> float:
        steady = step < _STEADY_STEPS or step % 2 == 0 or not oscillate
        return scale if steady else 1.0

    def _image_scale(self, step: int) -> Tensor:
        scale = self._scale(self.image, self.oscillate_image, step)
        if not (self.dynamic_image and scale > 1):
            return torch.tensor([scale], dtype=torch.float64)
        last = scale + (1 - scale) * step / self.num_steps
        return torch.linspace(1, last, self.latent_frames, dtype=torch.float64)
