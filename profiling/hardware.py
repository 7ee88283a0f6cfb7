"""What a GPU can do, for models of time until measurements replace them: peaks, and rates that others published."""

from dataclasses import dataclass

from opensora_fast.kernels import context_plan


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Rates in FLOP/s and bytes/s."""

    name: str
    peak_flops: float  # dense bfloat16
    peak_bytes: float  # device memory
    copy_bytes: float  # what a copy kernel reaches
    matmul_flops: float  # large bfloat16 products
    convolution_flops: float  # 3D convolutions of bfloat16
    attention_forward_flops: float  # 4 S^2 K a head
    attention_backward_flops: float  # 10 S^2 K a head


H200 = Hardware(
    name="H200",
    peak_flops=989e12,  # NVIDIA's data sheet, without sparsity
    peak_bytes=4.8e12,  # the same
    copy_bytes=context_plan.MEMORY_BYTES_PER_S,  # assumed: 83 % of the peak
    matmul_flops=750e12,  # assumed: 76 % of the peak
    # A tiled decode of 77 frames of 848 x 480 by the Hunyuan autoencoder, published as 5.7 s on an H200 (pull request
    # 36012 of sgl-project/sglang), has 1,076 TFLOP of them; what else that decode does is in those seconds, too.
    convolution_flops=190e12,
    attention_forward_flops=context_plan.FORWARD_FLOPS_PER_S,
    attention_backward_flops=context_plan.BACKWARD_FLOPS_PER_S,
)
