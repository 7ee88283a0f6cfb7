"""Flow matching: the times at which the path from noise to data is visited.

    x_t = (1 - t) x_0 + (1 - (1 - s)(1 - t)) x_1        x_0 data, x_1 ~ N(0, 1);  t = 1 is pure noise
    v   = d x_t / d t = (1 - s) x_1 - x_0               what the model predicts: noise minus data

x_t, v and s are `opensora_fast.kernels.flow_mix`'s. Times are shifted towards noise, the more so the longer the video:

    t <- a t / (1 + (a - 1) t),  a = shift_alpha(...).

Shapes   B batch.  t [B] fp32.
Source   Open-Sora 2.0 (arXiv 2503.09642) section 4.2, and its released code where they differ.  The paper predicts
         x_0 - x_1 and has no s; the code, and the released weights, predict (1 - s) x_1 - x_0.  The paper calls a
         proportional to T * H * W (frames, rows and columns); the code's a is affine in H * W and goes with the square
         root of T.  This project follows the code in both.
"""

import torch
from torch import Tensor

from opensora_fast.errors import UserError

# The shift of one frame is 1 at 256 tokens and 3 at 4096: images of 256 and 1024 pixels a side, 16 pixels to a token.
_FEW_TOKENS, _MANY_TOKENS = 256, 4096
_SMALL_SHIFT, _LARGE_SHIFT = 1.0, 3.0


def shift_alpha(tokens_per_frame: int, latent_frames: int) -> float:
    """How strongly times are shifted towards noise (1: not at all) for a latent of this size.

    `tokens_per_frame` counts what the transformer sees: latent rows * columns / patch_size**2, also in training.
    """
    slope = (_LARGE_SHIFT - _SMALL_SHIFT) / (_MANY_TOKENS - _FEW_TOKENS)
    return (_SMALL_SHIFT + slope * (tokens_per_frame - _FEW_TOKENS)) * latent_frames**0.5


def shift_timesteps(t: Tensor, alpha: float) -> Tensor:
    """a t / (1 + (a - 1) t): monotone, keeps 0 and 1, and two shifts compose to the product of their alphas."""
    return alpha * t / (1 + (alpha - 1) * t)


def sampling_schedule(num_steps: int, tokens_per_frame: int, latent_frames: int) -> Tensor:
    """The times between which `num_steps` Euler steps go: [num_steps + 1] fp32, falling from exactly 1 to exactly 0.

    Raises UserError when num_steps is under 1.
    """
    if num_steps < 1:
        raise UserError(f"steps={num_steps}: sampling needs at least 1 step")
    # In float64: rounded to fp32 afterwards, the ends are exact for every alpha.
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift_timesteps(even, shift_alpha(tokens_per_frame, latent_frames)).float()


def sample_timesteps(batch: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Training times [batch] fp32 in (0, 1) on the generator's device: sigmoid of a standard normal, then shifted."""
    normal_B = torch.randn(batch, generator=generator, device=generator.device)
    return shift_timesteps(torch.sigmoid(normal_B), alpha)
