"""Depthwise 3-D convolution with a backward as fast as its forward on the CPU.

With stride 1, odd kernels of size k and zero padding of k // 2, both gradients are depthwise convolutions themselves:

    dx[b, c] = dy[b, c] convolved with w[c], reversed along T, H and W
    dw[c]    = sum_b x[b, c] correlated with dy[b, c], which takes the place of the filter

oneDNN has a vectorised kernel for the forward of a 3-D depthwise convolution, but none for its backward, which PyTorch
calls.  Forward and backward, two cores of an AMD EPYC (Zen 4), channels_last_3d, float32, in ms:

    shape               k   PyTorch   here
    (2, 384, 2, 8, 14)  5      17      2.0
    (1, 512, 8, 32, 32) 3     298       96
    (1, 192, 8, 32, 32) 5     146       32

The rule is the device: tensors on the CPU come here, all others (whose libraries do have such kernels) go to PyTorch.

Shapes  B batch, C channels, T frames, H and W rows and columns; weight [C, 1, k, k, k].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DepthwiseConv3d(nn.Conv3d):
    """One k x k x k filter per channel, zero-padded to keep the size. k must be odd."""

    def __init__(self, channels: int, kernel_size: int, *, bias: bool = True):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        if x_BCTHW.device.type != "cpu":
            return super().forward(x_BCTHW)
        return _DepthwiseConv3d.apply(x_BCTHW, self.weight, self.bias)


class _DepthwiseConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BCTHW, weight)
        return F.conv3d(x_BCTHW, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BCTHW: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        # Under autocast the forward ran in dy's dtype.
        x_BCTHW, weight = (saved.to(dy_BCTHW.dtype) for saved in ctx.saved_tensors)
        B, C, *size = x_BCTHW.shape
        padding = weight.shape[-1] // 2
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = F.conv3d(dy_BCTHW, weight.flip(2, 3, 4), padding=padding, groups=C)
        if ctx.needs_input_grad[1]:
            images, filters = x_BCTHW.contiguous().view(1, B * C, *size), dy_BCTHW.contiguous().view(B * C, 1, *size)
            correlation = F.conv3d(images, filters, padding=padding, groups=B * C)
            dweight = correlation.view(B, *weight.shape).sum(dim=0)
        if ctx.needs_input_grad[2]:
            dbias = dy_BCTHW.sum(dim=(0, 2, 3, 4))
        return dx, dweight, dbias
