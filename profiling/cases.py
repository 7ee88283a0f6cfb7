"""What `opensora-fast bench` times and compiles ahead of time: for each op, the calls of the three stages' models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from opensora_fast.profiling import cases_autoencoder, cases_optimizer, cases_transformer
from opensora_fast.profiling.case import Case, Size

CASES: Mapping[str, Callable[[Size], Sequence[Case]]] = {
    "attention": cases_transformer.attention,
    "lse_merge": cases_transformer.lse_merge,
    "modulated_norm": cases_transformer.modulated_norm,
    "gated_residual": cases_transformer.gated_residual,
    "qk_norm_rope": cases_transformer.qk_norm_rope,
    "gelu": cases_transformer.gelu,
    "gated_linear": cases_transformer.gated_linear,
    "adamw": cases_optimizer.adamw,
    "flow_mix": cases_optimizer.flow_mix,
    "rms_norm_act": cases_autoencoder.rms_norm_act,
    "pixel_shuffle": cases_autoencoder.pixel_shuffle,
}
"""Op, which is a file of kernels/, -> its cases at a size."""
