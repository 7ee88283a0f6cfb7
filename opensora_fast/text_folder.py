"""What of a text encoder's folder is whole, asked before anything of its weights is read.

transformers makes up weights that are missing, passes over those it does not know, and reads prompts with an empty
vocabulary where the file of it is away. Here each of these is an error that names the file or the tensor. Of the
weights only headers are read, which say where each parameter lies; pickled code is never run.

What belongs to the other half of the model that the encoder was taken from (T5's decoder, CLIP's image side) may be
there, and is left alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opensora_fast.errors import UserError
from opensora_fast.released import check_tensors
from opensora_fast.weight_files import WeightFiles

# By model: the types that config.json may say, and tensors of the whole model that its text encoder has no use for.
TYPES = {"T5EncoderModel": ("t5",), "CLIPTextModel": ("clip", "clip_text_model")}
OTHER_HALF = {
    "T5EncoderModel": r"decoder\.|lm_head\.|encoder\.embed_tokens\.",  # the last is shared.weight once more
    "CLIPTextModel": r"vision_model\.|visual_projection\.|text_projection\.|logit_scale$|.*\.position_ids$",
}
CLIP_PREFIX = "text_model."  # of the names in a file, or of all names in a model, or not, by the version that wrote it


class TextWeights(NamedTuple):
    """A model of transformers on the meta device, and the tensor of `files` that each of its parameters is."""

    model: Any
    files: WeightFiles
    keys: dict[str, str]  # by the parameter's name


def open_weights(folder: Path, model_class: Any) -> TextWeights:
    """The model of the folder's config.json and its weights, of which nothing has been read.

    model_class  a class of transformers: T5EncoderModel or CLIPTextModel

    Raises UserError when the weights are not those of the model, tensor by tensor.
    """
    name = model_class.__name__
    _check_type(folder, name)
    files = WeightFiles.open(_weights(folder, name))
    config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = model_class(config)
    model.set_input_embeddings(model.get_input_embeddings())  # T5's have two names, which need not be tied yet
    other_half = re.compile(OTHER_HALF[name])
    found = {key: spec for key, spec in files.specs.items() if not other_half.match(key)}
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items() if not other_half.match(key)}
    keys = {key: key for key in shapes}
    if name == "CLIPTextModel":
        prefix = CLIP_PREFIX if any(key.startswith(CLIP_PREFIX) for key in found) else ""
        keys = {key: prefix + key.removeprefix(CLIP_PREFIX) for key in shapes}
    check_tensors(found, {keys[key]: shape for key, shape in shapes.items()}, files.path)
    return TextWeights(model, files, keys)


def check_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Raises UserError when files that the tokenizer is made of are not in the folder.

    A tokenizer lies there in one file (tokenizer.json), or in its own form (spiece.model; vocab.json and merges.txt).
    """
    names = dict(tokenizer.vocab_files_names)  # none for a tokenizer of bytes
    whole = names.pop("tokenizer_file", None)
    missing = [name for name in names.values() if not (folder / name).is_file()]
    if missing and not (whole and (folder / whole).is_file()):
        raise UserError(
            f"text encoder folder {folder} lacks {' and '.join(missing)}, its tokenizer's vocabulary: download the "
            "folder again"
        )


def _check_type(folder: Path, name: str) -> None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"text encoder folder {folder} holds no {name}: its config.json cannot be read ({error}); download it again"
        ) from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in TYPES[name]:
        raise UserError(f"text encoder folder {folder} holds no {name}: its config.json is of the type {found!r}")


def _weights(folder: Path, name: str) -> Path:
    """What transformers will read: one file, shards with their index, or the pickle of older releases."""
    for file in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        if (folder / file).is_file():
            return folder if file.endswith(".json") else folder / file
    if (folder / "pytorch_model.bin.index.json").is_file():
        raise UserError(
            f"text encoder folder {folder} has its weights in several pytorch_model-*.bin, which are not read: "
            "download its .safetensors files, or load it with transformers and write it again with save_pretrained"
        )
    raise UserError(
        f"text encoder folder {folder} holds no {name}: it has no model.safetensors, shards with their index, or "
        "pytorch_model.bin; download it again"
    )
