"""Where a token is: packing latents into tokens, their (time, row, column) ids, and the rotation those ids mean.

Shapes  B batch; C latent channels; T, H, W latent frames, rows, columns; N tokens, ordered (time, row, column);
        P patch size; S positions of a sequence; K channels of a head; K2 = K / 2 rotation frequencies.
"""

import torch
from torch import Tensor

from opensora_fast.errors import UserError


def patchify(latent_BCTHW: Tensor, patch_size: int) -> Tensor:
    """Pack a latent [B, C, T, H, W] into tokens [B, T * H/P * W/P, C * P * P], channels ordered (C, row, column).

    Raises UserError when `patch_size` does not divide H and W. Source: the packing of FLUX and Open-Sora 2.0.
    """
    B, C, T, H, W = latent_BCTHW.shape
    P = patch_size
    if H % P or W % P:
        raise UserError(
            f"latent is {H} x {W}, which patch_size={P} does not divide: use a multiple of {P} on both sides"
        )
    patches = latent_BCTHW.view(B, C, T, H // P, P, W // P, P)
    return patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(B, T * (H // P) * (W // P), C * P * P)


def unpatchify(tokens_BND: Tensor, patch_size: int, latent_thw: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify`: tokens [B, N, C * P * P] to a latent [B, C, T, H, W], with `latent_thw` = (T, H, W).

    Raises UserError when the tokens are not those of such a latent.
    """
    T, H, W = latent_thw
    P = patch_size
    B, N, D = tokens_BND.shape
    if H % P or W % P or N != T * (H // P) * (W // P) or D % P**2:
        raise UserError(
            f"tokens are [B, {N}, {D}], which is no latent of {T} x {H} x {W} in patches of {P}: "
            f"pass the latent_thw and patch_size that packed them"
        )
    patches = tokens_BND.view(B, T, H // P, W // P, D // P**2, P, P)
    return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(B, D // P**2, T, H, W)


def position_ids_THW(
    latent_frames: int, patch_rows: int, patch_cols: int, device: torch.device | str | None = None
) -> Tensor:
    """(time, row, column) of every video token, float32 [latent_frames * patch_rows * patch_cols, 3], from 0.

    Rows and columns count patches, not latent pixels. Text tokens have the ids (0, 0, 0), which rotate by nothing.
    """
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in (latent_frames, patch_rows, patch_cols)]
    return torch.cartesian_prod(*axes)


def rope_cos_sin(ids_BS3: Tensor, axes_dim: tuple[int, ...], theta: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation angle, two float32 tensors [B, S, K2], frequencies ordered (time, row, column).

    An axis with d channels has the d / 2 frequencies theta^(-2j/d), and K2 = sum(axes_dim) / 2; the angle is frequency
    times position. Angles are computed in float64: a float32 angle of 256 radians is off by 1.5e-5.
    Source: Su et al. 2021 (RoFormer), one axis of it per coordinate as in FLUX.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids_BS3.device) / dim
        angles.append(ids_BS3[..., axis, None].double() * theta**-exponents)
    angle_BSK2 = torch.cat(angles, dim=-1)
    return angle_BSK2.cos().float(), angle_BSK2.sin().float()
