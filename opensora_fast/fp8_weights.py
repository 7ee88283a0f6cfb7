"""Weights kept in 8 bits: a matrix as float8_e4m3fn with one float32 scale per row, everything else as it is.

    scale_r = max_c |w_rc| / 448        q_rc = round_e4m3(w_rc / scale_r)        w'_rc = q_rc * scale_r

Half of bfloat16's bytes, in host memory or on the device; the products are computed with w' in the model's own dtype.
A value keeps 4 significant bits: the relative error of one is at most 1/16 (down to 2**-15 of its row's largest; below
that it is absolute), and about 0.026 in the mean square. The result is another video than the exact weights give, so
this is never chosen for the user, and its error is told.

Shapes  O output rows, I input columns.
Source  FP8 formats for deep learning (Micikevicius et al. 2022, arXiv 2209.05433): E4M3, largest value 448.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.packed_weights import packed_offsets

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max  # 448
_ROWS_AT_ONCE = 1 << 22  # elements: bounds the float32 temporaries of the conversion


@dataclass(frozen=True)
class Fp8Error:
    """How far 8-bit weights are from the exact ones: sqrt(sum (w' - w)^2 / sum w^2)."""

    relative: float  # of all matrices together
    worst: float  # of the matrix with the largest
    worst_name: str

    def __str__(self) -> str:
        return (
            f"fp8 weights are off by {self.relative:.2%} in the mean square "
            f"(at most {self.worst:.2%}, in {self.worst_name}): the video differs from that of the exact weights"
        )


class ErrorSum:
    """Adds up the errors of matrices."""

    def __init__(self) -> None:
        self._squares: dict[str, tuple[float, float]] = {}

    def add(self, name: str, squared_error: float, squared_weights: float) -> None:
        self._squares[name] = squared_error, squared_weights

    def total(self) -> Fp8Error:
        if not self._squares:
            return Fp8Error(0.0, 0.0, "no matrix")
        of = {name: _ratio(error, weights) for name, (error, weights) in self._squares.items()}
        worst = max(of, key=of.__getitem__)
        errors, weights = map(sum, zip(*self._squares.values(), strict=True))
        return Fp8Error(_ratio(errors, weights), of[worst], worst)


class Fp8Form:
    """How some weights are stored: matrices (two axes, `is_matrix`) in 8 bits, others as they are."""

    def __init__(self, weights: Sequence[Tensor], is_matrix: Sequence[bool]) -> None:
        """`weights` may be on the meta device: only their shapes and dtypes are read."""
        self._is_matrix = list(is_matrix)
        self._shapes = [(weight.shape, weight.dtype, weight.stride()) for weight in weights]
        sizes: list[int] = []
        for weight, matrix in zip(weights, is_matrix, strict=True):
            sizes += [weight.numel(), 4 * weight.shape[0]] if matrix else [weight.nbytes, 0]
        offsets, self.bytes = packed_offsets(sizes)
        self._spans = [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]

    def store(self, i: int, weight: Tensor, stored: Tensor, *, name: str) -> tuple[float, float]:
        """Write weight i into `stored` (uint8 [bytes]); (squared error, squared weights), zeros where it is exact.

        Raises UserError naming a matrix that is not finite.
        """
        if not self._is_matrix[i]:
            self._plain(i, stored).copy_(weight)
            return 0.0, 0.0
        quantised, scale_O = self._matrix(i, stored)
        return quantise(weight, quantised, scale_O, name=name)

    def expand(self, stored: Tensor, weights: Sequence[Tensor]) -> None:
        """Write the weights that `stored` holds into these tensors, on one device."""
        for i, (weight, matrix) in enumerate(zip(weights, self._is_matrix, strict=True)):
            if matrix:
                dequantise(*self._matrix(i, stored), weight)
            else:
                weight.copy_(self._plain(i, stored))

    def _plain(self, i: int, stored: Tensor) -> Tensor:
        shape, dtype, stride = self._shapes[i]
        flat = stored[slice(*self._spans[2 * i])].view(dtype)
        return flat.as_strided(shape, stride, flat.storage_offset())

    def _matrix(self, i: int, stored: Tensor) -> tuple[Tensor, Tensor]:
        values, scales = (stored[slice(*span)] for span in self._spans[2 * i : 2 * i + 2])
        return values.view(FP8).view(self._shapes[i][0]), scales.view(torch.float32)


@torch.no_grad()
def quantise(weight_OI: Tensor, out_OI: Tensor, scale_O: Tensor, *, name: str) -> tuple[float, float]:
    """Write a matrix as float8_e4m3fn [O, I] and float32 scales [O]; returns (sum (w' - w)^2, sum w^2).

    Raises UserError with the matrix's name when it is not finite.
    """
    error = total = 0.0
    rows = max(1, _ROWS_AT_ONCE // max(1, weight_OI.shape[1]))
    for start in range(0, len(weight_OI), rows):
        piece = slice(start, start + rows)
        weight = weight_OI[piece].float()
        largest_O1 = weight.abs().amax(dim=1, keepdim=True)
        if not largest_O1.isfinite().all():
            raise UserError(f"weight {name} is not finite and cannot be kept in 8 bits: repair it, or drop fp8")
        # A row of zeros has the smallest scale, which also keeps w / scale finite for denormal rows.
        scale_O1 = (largest_O1 / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        quantised = (weight / scale_O1).to(FP8)
        out_OI[piece] = quantised
        scale_O[piece] = scale_O1[:, 0]
        error += (quantised.float() * scale_O1 - weight).square().sum(dtype=torch.float64).item()
        total += weight.square().sum(dtype=torch.float64).item()
    return error, total


@torch.no_grad()
def dequantise(quantised_OI: Tensor, scale_O: Tensor, out_OI: Tensor) -> None:
    """out = q * scale, rounded once to out's dtype, which holds every e4m3 value exactly; no other memory on a GPU."""
    out_OI.copy_(quantised_OI)
    out_OI.mul_(scale_O[:, None])


def _ratio(error: float, weights: float) -> float:
    return math.sqrt(error / weights) if weights else 0.0
