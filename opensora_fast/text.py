"""Frozen text encoders: T5 gives the transformer its text tokens, CLIP one vector per prompt.

Prompts are padded to a fixed length and no attention mask is passed: T5 sees the padding and the transformer attends
to it, as the released weights were trained.  Models and tokenizers come from local folders that transformers'
`save_pretrained` wrote; nothing is ever downloaded.  Weights go from the files to the device in blocks, without a copy
on the host.  transformers is imported when the first encoder is made, not before.

Shapes   B prompts, L text tokens (max_length_t5), D features.  txt [B, L, D of T5], vec [B, D of CLIP].
Source   Open-Sora 2.0 (arXiv 2503.09642) section 3.2: T5-v1.1-XXL's last hidden state, CLIP-L's pooled output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.sampling_ranks import SamplingRanks, on_all
from opensora_fast.streamed_loading import Segment, Target, load_segments
from opensora_fast.text_folder import TextWeights, check_vocabulary, open_weights

# The released CLIP's configuration has this id where its end-of-prompt token is 49407; transformers then takes the
# largest id of a prompt, which is that token.
_CLIP_POOLS_AT_LARGEST_ID = 2


class PromptEncoding(Protocol):
    """What the sampler asks of text encoders."""

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(txt [B, L, D], vec [B, D])."""

    def null(self) -> tuple[Tensor, Tensor]:
        """(txt [1, L, D], vec [1, D]) of the empty prompt."""


class TextEncoders:
    """The two encoders, in eval mode and without gradients."""

    def __init__(self, t5: PromptEncoder, clip: PromptEncoder) -> None:
        self.t5 = t5
        self.clip = clip
        self._null: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_folders(
        cls,
        t5: Path,
        clip: Path,
        *,
        max_length_t5: int = 512,
        max_length_clip: int = 77,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TextEncoders:
        """Encoders from two folders, each with a model and its tokenizer; the maximal lengths count tokens.

        Longer prompts are cut. Raises UserError when transformers is not installed, a folder is missing or does not
        hold the model with all its weights, and when CLIP's positions or end token do not fit.
        """
        return cls(
            load_t5(Path(t5), max_length=max_length_t5, device=device, dtype=dtype),
            load_clip(Path(clip), max_length=max_length_clip, device=device, dtype=dtype),
        )

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(txt [B, L, D], vec [B, D]) in the encoders' dtype and device."""
        return self.t5(prompts), self.clip(prompts)

    def null(self) -> tuple[Tensor, Tensor]:
        """(txt [1, L, D], vec [1, D]) of the empty prompt, encoded once: what guidance steers away from."""
        if self._null is None:
            self._null = self.encode([""])
        return self._null


class SharedTextEncoders:
    """Encoders that rank 0 has and all ranks ask: the others hold no weights, and get its results on their device.

    All ranks make the same calls. A UserError of rank 0 is raised on every rank.
    """

    def __init__(self, encoders: PromptEncoding | None, ranks: SamplingRanks) -> None:
        """`encoders` are rank 0's; what other ranks pass is not used."""
        self._encoders = encoders
        self._ranks = ranks
        self._null: tuple[Tensor, Tensor] | None = None

    @classmethod
    def load(cls, load: Callable[[], PromptEncoding], ranks: SamplingRanks) -> SharedTextEncoders:
        """The encoders that `load` gives on rank 0, where alone it is called."""
        return cls(on_all(ranks, lambda: load() if ranks.rank == 0 else None), ranks)

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(txt [B, L, D], vec [B, D]) in the encoders' dtype."""
        return self._shared(lambda encoders: encoders.encode(prompts))

    def null(self) -> tuple[Tensor, Tensor]:
        """(txt [1, L, D], vec [1, D]) of the empty prompt, encoded once."""
        if self._null is None:
            self._null = self._shared(lambda encoders: encoders.null())
        return self._null

    def _shared(self, ask: Callable[[PromptEncoding], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What `ask` has from rank 0's encoders, on all ranks."""

        def answer() -> tuple[Tensor | None, Tensor | None]:
            if self._ranks.rank > 0:
                return None, None
            if self._encoders is None:
                raise ValueError("rank 0 has no text encoders: load them there")
            return ask(self._encoders)

        txt_BLD, vec_BD = on_all(self._ranks, answer)
        return self._ranks.share_tensor(txt_BLD), self._ranks.share_tensor(vec_BD)


class PromptEncoder:
    """One tokenizer and model; called with prompts it gives the model's output named `output`.

    In eval mode and without gradients; results have the encoder's dtype and device.
    """

    def __init__(
        self,
        model_class: str,
        output: str,
        folder: Path,
        max_length: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        if not folder.is_dir():
            raise UserError(
                f"text encoder folder {folder} does not exist: name one that holds a {model_class} and its tokenizer"
            )
        self.tokenizer, model = _load(model_class, folder, device, dtype)
        self.model = model.eval().requires_grad_(False)
        self.output = output
        self._max_length = max_length

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self._max_length, return_tensors="pt"
        )
        return getattr(self.model(input_ids=tokens.input_ids.to(self.model.device)), self.output)


def load_t5(folder: Path, *, max_length: int, device: torch.device | str, dtype: torch.dtype) -> PromptEncoder:
    """The encoder of text tokens alone; see `TextEncoders.from_folders`, also for errors."""
    return PromptEncoder("T5EncoderModel", "last_hidden_state", folder, max_length, device, dtype)


def load_clip(folder: Path, *, max_length: int, device: torch.device | str, dtype: torch.dtype) -> PromptEncoder:
    """The encoder of prompt vectors alone; see `TextEncoders.from_folders`, also for errors."""
    encoder = PromptEncoder("CLIPTextModel", "pooler_output", folder, max_length, device, dtype)
    config, tokenizer = encoder.model.config, encoder.tokenizer
    if max_length > config.max_position_embeddings:
        raise UserError(
            f"max_length_clip={max_length}: {folder} has {config.max_position_embeddings} positions; "
            "use at most that many"
        )
    # CLIP pools at this token: with a wrong one it would give every prompt the vector of its first token.
    if config.eos_token_id not in (_CLIP_POOLS_AT_LARGEST_ID, tokenizer.eos_token_id):
        raise UserError(
            f"{folder}: CLIP pools at token {config.eos_token_id} and its tokenizer ends prompts with "
            f"{tokenizer.eos_token_id}; set eos_token_id in its config.json"
        )
    return encoder


def cut_notes(t5: Path, max_length: int, prompts: Iterable[str]) -> list[str]:
    """One line for each prompt of which T5 reads only the beginning, with the number of tokens that are left out.

    Its tokenizer is loaded when a prompt is long enough to ask. Raises UserError when that cannot be.
    """
    # A token has a byte at least, but for the two that a tokenizer may put around a prompt.
    long = [prompt for prompt in dict.fromkeys(prompts) if len(prompt.encode()) + 2 > max_length]
    if not long:
        return []
    transformers = require_transformers()
    try:
        with _quiet(transformers):
            lengths = [len(ids) for ids in _tokenizer(transformers, t5)(long).input_ids]
    except Exception as error:  # a damaged vocabulary raises nearly anything
        reason = " ".join(str(error).split())
        raise UserError(f"text encoder folder {t5} holds no tokenizer that can be read: {reason}") from error
    return [
        f"prompt {prompt[:40]!r}...: has {length} tokens, of which T5 reads {max_length}; shorten it"
        for prompt, length in zip(long, lengths, strict=True)
        if length > max_length
    ]


def save_tiny_text_encoders(folder: Path, *, t5_dim: int, clip_dim: int, seed: int) -> None:
    """Write folder/t5 and folder/clip: two-layer encoders with random weights that read bytes, for demos and tests.

    Their features have unit scale and tell any two prompts apart, but know no language. Both dimensions must be even.
    """
    transformers = require_transformers()
    tokenizer = transformers.ByT5Tokenizer()  # 256 bytes and a few special tokens; needs no vocabulary file
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # CLIP pools at this token, the only one that has read the whole prompt
    }
    t5_config = transformers.T5Config(
        d_model=t5_dim, d_kv=t5_dim // 2, d_ff=2 * t5_dim, num_heads=2, num_layers=2, **special
    )
    clip_config = transformers.CLIPTextConfig(
        hidden_size=clip_dim,
        intermediate_size=2 * clip_dim,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=512,  # bytes: a prompt has several times as many as it has words
        initializer_factor=2.0,  # one changed word moves the vector by 0.8 of its length (by 0.3 at 1)
        bos_token_id=tokenizer.pad_token_id,  # ByT5 begins with no token of its own
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = {"t5": transformers.T5EncoderModel(t5_config), "clip": transformers.CLIPTextModel(clip_config)}
    with _quiet(transformers):
        for name, model in models.items():
            model.save_pretrained(Path(folder) / name)
            tokenizer.save_pretrained(Path(folder) / name)


def _load(model_class: str, folder: Path, device: torch.device | str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and model of a folder, checked before it is read, and read straight to the device."""
    transformers = require_transformers()
    try:
        with _quiet(transformers):
            weights = open_weights(folder, getattr(transformers, model_class))
            tokenizer = _tokenizer(transformers, folder)
            check_vocabulary(folder, tokenizer)
            return tokenizer, _filled(weights, device, dtype)
    except UserError:
        raise
    except Exception as error:  # configurations and vocabularies that are damaged raise nearly anything
        reason = " ".join(str(error).split())
        raise UserError(f"text encoder folder {folder} holds no {model_class} with its tokenizer: {reason}") from error


def _tokenizer(transformers: ModuleType, folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _filled(weights: TextWeights, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The model with its weights; the host holds two blocks of rows beside them (`load_segments`)."""
    model = weights.model.to(dtype)
    if dtype == torch.float16:  # layers that would overflow, by their last name: T5's `wo`
        wide = tuple(model._keep_in_fp32_modules or ())
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in wide:
                module.float()
    model.to_empty(device=device)
    for name, positions in model.named_buffers():  # counted, not stored
        assert name.endswith("position_ids"), name
        positions.copy_(torch.arange(positions.shape[-1], device=positions.device).expand_as(positions))
    parameters = model.state_dict(keep_vars=True)
    load_segments(weights.files, [Target(parameters[name], [Segment(key)]) for name, key in weights.keys.items()])
    return model


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """No progress bars, and no list of weights that are rightly left alone (T5's decoder, CLIP's image side)."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def require_transformers() -> ModuleType:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"the text encoders need transformers ({error}): run pip install 'opensora-fast[text]'"
        ) from error
