"""The autoencoder's decoder and the text encoders as TensorRT engines, for whoever asks for them.

A network is exported by `torch.export` and compiled by Torch-TensorRT, once for every shape of its input, in the dtype
of its weights. What TensorRT has no operator for stays with PyTorch inside the compiled graph. The network itself is
kept: another shape needs another engine. Nothing is compiled unless one of the two functions is called, and nothing
falls back: an engine that cannot be built is an error.

Shapes   B videos, C latent channels, t, h, w latent frames, rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.errors import UserError
from opensora_fast.text import PromptEncoder, TextEncoders


class Engines(nn.Module):
    """A network of one tensor as engines: that of the input's shape is built when the shape first comes."""

    def __init__(self, name: str, network: nn.Module) -> None:
        """`name` says in messages what it is. Raises UserError when Torch-TensorRT is not installed."""
        super().__init__()
        self._compiler = require_tensorrt()
        self._name = name
        self.network = network
        self._engines: dict[tuple[torch.Size, torch.dtype, torch.device], nn.Module] = {}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """What the network gives. Raises UserError when the network cannot be compiled for this shape."""
        key = (x.shape, x.dtype, x.device)
        if key not in self._engines:
            self._engines[key] = self._build(x)
        return self._engines[key](x)

    def _build(self, x: Tensor) -> nn.Module:
        try:
            program = torch.export.export(self.network, (x,))
            return self._compiler.dynamo.compile(
                program, arg_inputs=(x,), use_explicit_typing=True, pass_through_build_failures=True
            )
        except Exception as error:  # neither names what it may raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--tensorrt: the {self._name} cannot be compiled for input {list(x.shape)} of {x.dtype}, "
                f"{type(error).__name__}: {reason}; sample without --tensorrt"
            ) from error


def compile_decoder(autoencoder: Autoencoder, latents: Sequence[tuple[int, ...]] = ()) -> None:
    """Decode with engines from now on; `latents` are shapes [B, C, t, h, w] whose engines are built at once.

    A latent that is cut into tiles needs one engine for every shape of tile. Building them ahead decodes zeros of these
    shapes, so that what cannot be compiled is known before anything is sampled.
    Raises UserError when Torch-TensorRT is not installed or refuses the decoder.
    """
    network = getattr(autoencoder, "decoder", None)
    if not isinstance(network, nn.Module):
        raise UserError(
            f"--tensorrt: {type(autoencoder).__name__} has no decoder to compile; sample without --tensorrt"
        )
    if not isinstance(network, Engines):
        network = Engines("autoencoder's decoder", network)
        autoencoder.decoder = network  # type: ignore[attr-defined]  # asked for above; the protocol has none
    parameter = next(network.parameters())
    for shape in latents:
        autoencoder.decode(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))


def compile_text_encoder(text: TextEncoders) -> None:
    """Encode prompts with engines from now on, one for each number of prompts; that of one prompt is built at once.

    Raises UserError when Torch-TensorRT is not installed or refuses an encoder.
    """
    for encoder in (text.t5, text.clip):
        if not isinstance(encoder.model, CompiledEncoder):
            encoder.model = CompiledEncoder(encoder)
            encoder([""])


class CompiledEncoder(nn.Module):
    """Stands in for the model of a `PromptEncoder`, giving only the output that the encoder takes from it."""

    def __init__(self, encoder: PromptEncoder) -> None:
        super().__init__()
        self.config = encoder.model.config
        self.output = encoder.output
        self.engines = Engines(type(encoder.model).__name__, _OneOutput(encoder.model, encoder.output))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(**{self.output: self.engines(input_ids)})


class _OneOutput(nn.Module):
    """A model of transformers as a function of token ids to one tensor."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self._output = output

    def forward(self, input_ids: Tensor) -> Any:
        return getattr(self.model(input_ids=input_ids), self._output)


def require_tensorrt() -> ModuleType:
    """Torch-TensorRT. Raises UserError with the command that installs it."""
    try:
        return import_module("torch_tensorrt")
    except (ImportError, OSError) as error:  # its libraries may be missing where the package is there
        reason = " ".join(str(error).split())
        raise UserError(
            f"--tensorrt needs Torch-TensorRT ({reason}): run pip install 'opensora-fast[tensorrt]' "
            "--extra-index-url https://pypi.nvidia.com"
        ) from error
