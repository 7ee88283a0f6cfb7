"""cache.json: what all rows of a cache were made with, and whether that is what a recipe needs.

    {"format": 1, "recipe": name, "dtype": "bfloat16" or "float32", "decoder": "torchcodec" or "PyAV", "seed": N,
     "fps_max": N, "conditions": [names],
     "autoencoder": {"kind", "latent_channels", "compression": [T, H, W], "causal", "weights", "fingerprint", "config"},
     "text": {"t5", "t5_fingerprint", "max_length_t5", "clip", "clip_fingerprint", "max_length_clip"}}

A fingerprint is of the files that weights lie in, so that weights are known again wherever they are copied to: a digest
of their names, sizes and samples of their bytes, "-", and the CRC32C of all their bytes. `data cache` compares all of
it, and reads the files through each time; training compares the digest. It may be null, as may the paths and the
decoder, in a cache that other software has made; `config` is null where the weights bring their own.

What a recipe leaves open (no weights, or a stand-in for them) is what the cache was made with; what it names must be
the same. A cache that holds more than is needed (sizes, conditions, clips) serves as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensora_fast.autoencoder import LatentLayout, StoredLayout
from opensora_fast.checkpoint_folder import find_checkpoint, is_run, released_autoencoder_config, step_folders
from opensora_fast.conditions import CONDITIONS, encoded_pieces
from opensora_fast.config import config_from_dict
from opensora_fast.errors import UserError
from opensora_fast.native import native
from opensora_fast.train.config import AutoencoderSection, DiffusionRecipe
from opensora_fast.train.stand_ins import DEMO
from opensora_fast.video_decoder import choose_decoder
from opensora_fast.weight_files import WeightFiles

FORMAT = 1
FILE = "cache.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SAMPLES, SAMPLE_BYTES = 16, 2**16  # of a file, in a fingerprint
_PART_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecord:
    kind: str
    latent_channels: int
    compression: tuple[int, int, int]
    causal: bool
    weights: str | None
    fingerprint: str | None
    config: dict | None


@dataclass(frozen=True, kw_only=True)
class TextRecord:
    t5: str | None
    t5_fingerprint: str | None
    max_length_t5: int
    clip: str | None
    clip_fingerprint: str | None
    max_length_clip: int


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    recipe: str
    dtype: str
    decoder: str | None
    """Of videos: the pixels of two differ."""
    seed: int
    fps_max: int
    conditions: tuple[str, ...]
    """All that have a positive weight, sorted."""
    autoencoder: AutoencoderRecord
    text: TextRecord

    @property
    def layout(self) -> StoredLayout:
        """Of the latents."""
        record = self.autoencoder
        return StoredLayout(
            latent_channels=record.latent_channels, compression=record.compression, causal=record.causal
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def to_text(self) -> str:
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=2) + "\n"

    def identity(self) -> str:
        """Of this cache, stored in each of its shards."""
        return hashlib.blake2b(self.to_text().encode(), digest_size=16).hexdigest()


def settings_of(recipe: DiffusionRecipe, layout: LatentLayout, dtype: torch.dtype) -> CacheSettings:
    """What a cache of this recipe is made with; its encoders are resolved to paths.

    Raises UserError when a path holds no weights.
    """
    section, text = recipe.autoencoder, recipe.text
    assert section.weights is not None
    assert text.t5 is not None
    assert text.clip is not None
    return CacheSettings(
        recipe=recipe.name,
        dtype=next(name for name, known in DTYPES.items() if known == dtype),
        decoder=choose_decoder().name,
        seed=recipe.loop.seed,
        fps_max=recipe.data.fps_max,
        conditions=conditions_of(recipe),
        autoencoder=AutoencoderRecord(
            kind=section.kind,
            latent_channels=layout.latent_channels,
            compression=layout.compression,
            causal=layout.causal,
            weights=section.weights,
            fingerprint=fingerprint("autoencoder.weights", Path(section.weights), whole=True),
            config=_described_config(section),
        ),
        text=TextRecord(
            t5=text.t5,
            t5_fingerprint=fingerprint("text.t5", Path(text.t5), whole=True),
            max_length_t5=text.max_length_t5,
            clip=text.clip,
            clip_fingerprint=fingerprint("text.clip", Path(text.clip), whole=True),
            max_length_clip=text.max_length_clip,
        ),
    )


def read_settings(folder: Path) -> CacheSettings:
    """Raises UserError when the folder holds no cache, or one that this version does not read."""
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no cache ({FILE} is missing): make one with `opensora-fast data cache`"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): name another cache") from error
    return parse_settings(text, path)


def parse_settings(text: str, where: Path) -> CacheSettings:
    """What `CacheSettings.to_text` gave. Raises UserError, and nothing else, for any other text."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged (it is no JSON): copy it again, or make the cache anew") from error
    number = values.pop("format", None) if isinstance(values, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise UserError(f"{where}: format {number} is newer than this version reads ({FORMAT}): update opensora-fast")
    if number != FORMAT:
        raise UserError(f"{where} is damaged (its format is not {FORMAT}): copy it again, or make the cache anew")
    complaint = _complaint(values, _TOP, "")
    if complaint:
        raise UserError(f"{where} is damaged ({complaint}): copy it again, or make the cache anew")
    record = values["autoencoder"]
    return CacheSettings(
        **values
        | {
            "conditions": tuple(values["conditions"]),
            "autoencoder": AutoencoderRecord(**record | {"compression": tuple(record["compression"])}),
            "text": TextRecord(**values["text"]),
        }
    )


def require_same(ours: CacheSettings, there: CacheSettings, folder: Path) -> None:
    """Whether a cache can be gone on with. Raises UserError naming the first setting that differs."""
    theirs = _options(there)
    for option, value in _options(ours).items():
        if value != theirs[option]:
            raise UserError(_mismatch(folder, option, value, theirs[option], "use another --out"))


def adopt(recipe: DiffusionRecipe, there: CacheSettings, folder: Path) -> DiffusionRecipe:
    """A recipe to be trained from a cache, with the encoders that it leaves open filled in from there.

    Raises UserError naming the first thing that the recipe and the cache disagree on.
    """
    autoencoder, text, record = recipe.autoencoder, recipe.text, there.autoencoder
    mine: dict[str, object] = {
        "autoencoder.kind": autoencoder.kind,
        "data.fps_max": recipe.data.fps_max,
        "text.max_length_t5": text.max_length_t5,
        "text.max_length_clip": text.max_length_clip,
    }
    if autoencoder.weights is None:
        config = autoencoder.config
        if record.config is not None and record.kind == autoencoder.kind:
            config = config_from_dict(type(config), record.config)
        autoencoder = dataclasses.replace(autoencoder, weights=record.weights, config=config)
    else:
        path = Path(autoencoder.weights).resolve()
        autoencoder = dataclasses.replace(autoencoder, weights=str(path))
        mine["autoencoder.weights"] = fingerprint("autoencoder.weights", path)
        if mine["autoencoder.weights"] == str(record.fingerprint).partition("-")[0]:  # others are refused below
            mine["autoencoder.config"] = _described_config(autoencoder)
    text = dataclasses.replace(
        text,
        t5=_adopted("text.t5", text.t5, there.text.t5, mine),
        clip=_adopted("text.clip", text.clip, there.text.clip, mine),
    )
    stored = {
        option: value.partition("-")[0] if option in _WEIGHTS and isinstance(value, str) else value
        for option, value in _options(there).items()
    }
    for option, value in mine.items():
        if value != stored[option]:
            remedy = (
                "leave it open to take the cache's" if option in _WEIGHTS else "train with that, or make another cache"
            )
            raise UserError(_mismatch(folder, option, value, stored[option], remedy))
    if recipe.model.latent_channels != record.latent_channels:
        raise UserError(
            f"data.cache={folder} has latents of {record.latent_channels} channels, model.in_channels / patch_size^2 "
            f"is {recipe.model.latent_channels}: name another cache"
        )
    _require_pieces(recipe, there, folder)
    data = dataclasses.replace(recipe.data, cache=str(folder.resolve()))
    return dataclasses.replace(recipe, autoencoder=autoencoder, text=text, data=data)


def _adopted(option: str, named: str | None, theirs: str | None, mine: dict[str, object]) -> str | None:
    """The folder to use for a text encoder; one that the recipe names is noted in `mine`."""
    if named in (None, DEMO):
        return theirs
    path = Path(str(named)).resolve()
    mine[option] = fingerprint(option, path)
    return str(path)


def conditions_of(recipe: DiffusionRecipe) -> tuple[str, ...]:
    """All that can be drawn, sorted."""
    return tuple(sorted(name for name, weight in recipe.condition_weights.items() if weight > 0))


def fingerprint(option: str, path: Path, *, whole: bool = False) -> str:
    """Of the files of a folder that are not hidden, or of one file; of a run, those of its newest checkpoint.

    whole: with the checksum of all bytes behind it.

    Raises UserError naming `option` when there are none.
    """
    try:
        path = find_checkpoint(path) if path.is_dir() and step_folders(path) else path
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
        files = [file for file in files if not file.name.startswith(".")]
        digest, checksum = hashlib.blake2b(digest_size=16), 0
        for file in files:
            size = file.stat().st_size
            digest.update(f"{'' if file == path else file.name}\n{size}\n".encode())
            checksum = _checksum(file, checksum) if whole else 0
            with open(file, "rb") as content:
                if size <= SAMPLES * SAMPLE_BYTES:
                    digest.update(content.read())
                    continue
                for sample in range(SAMPLES):
                    content.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                    digest.update(content.read(SAMPLE_BYTES))
    except OSError as error:
        raise UserError(f"{option}={path}: {error.strerror or error}; name weights that can be read") from error
    if not files:
        raise UserError(f"{option}={path}: the folder is empty; name weights that can be read")
    return f"{digest.hexdigest()}-{checksum:08x}" if whole else digest.hexdigest()


def _checksum(file: Path, seed: int) -> int:
    """CRC32C of a file's bytes, behind others."""
    part, crc32c = np.empty(_PART_BYTES, np.uint8), native().crc32c
    with open(file, "rb", buffering=0) as content:
        while count := content.readinto(part.data):
            seed = crc32c(part.ctypes.data, count, seed=seed)
    return seed


def _described_config(section: AutoencoderSection) -> dict | None:
    """The configuration that released weights are read with; a run's checkpoint has its own."""
    path = Path(str(section.weights))
    if is_run(path) or not (path.is_file() or any(path.glob("*.safetensors*"))):
        return None
    described = {"kind": section.kind, "config": dataclasses.asdict(section.config)}
    return json.loads(json.dumps(released_autoencoder_config(WeightFiles.open(path), described)))


def _require_pieces(recipe: DiffusionRecipe, there: CacheSettings, folder: Path) -> None:
    for frames in sorted({frames for by_frames in recipe.data.buckets.values() for frames in by_frames}):
        stored = encoded_pieces(there.conditions, there.layout, frames)
        for name in conditions_of(recipe):
            if not set(encoded_pieces([name], there.layout, frames)) <= set(stored):
                raise UserError(
                    f"data.cache={folder} has no references for condition_weights.{name} at {frames} frames (it was "
                    f"made for {', '.join(there.conditions)}): set the weight to 0, or make another cache"
                )


_WEIGHTS = ("autoencoder.weights", "text.t5", "text.clip")


def _options(settings: CacheSettings) -> dict[str, object]:
    """What must agree, by the option of a recipe that sets it; weights by their fingerprint."""
    autoencoder, text = settings.autoencoder, settings.text
    return {
        "autoencoder.kind": autoencoder.kind,
        "autoencoder.weights": autoencoder.fingerprint,
        "autoencoder.config": autoencoder.config,
        "text.t5": text.t5_fingerprint,
        "text.max_length_t5": text.max_length_t5,
        "text.clip": text.clip_fingerprint,
        "text.max_length_clip": text.max_length_clip,
        "data.fps_max": settings.fps_max,
        "condition_weights": settings.conditions,
        "loop.seed": settings.seed,
        "dtype (by --loop.device)": settings.dtype,
        "decoder (by what is installed)": settings.decoder,
    }


def _mismatch(folder: Path, option: str, ours: object, theirs: object, remedy: str) -> str:
    if option in _WEIGHTS:
        said = "does not say which weights" if theirs is None else "was made with other weights than those"
        return f"{option}: the cache {folder} {said} this recipe names: {remedy}"
    shown, stored = (", ".join(value) if isinstance(value, tuple) else value for value in (ours, theirs))
    return f"{option} is {shown} here, and the cache {folder} was made with {stored}: {remedy}"


# JSON types of cache.json; a tuple lists alternatives, a dict is an object of these fields
_TOP: dict = {
    "recipe": str,
    "dtype": str,
    "decoder": (str, type(None)),
    "seed": int,
    "fps_max": int,
    "conditions": list,
    "autoencoder": {
        "kind": str,
        "latent_channels": int,
        "compression": list,
        "causal": bool,
        "weights": (str, type(None)),
        "fingerprint": (str, type(None)),
        "config": (dict, type(None)),
    },
    "text": {
        "t5": (str, type(None)),
        "t5_fingerprint": (str, type(None)),
        "max_length_t5": int,
        "clip": (str, type(None)),
        "clip_fingerprint": (str, type(None)),
        "max_length_clip": int,
    },
}


def _complaint(values: Any, kind: Any, name: str) -> str:
    """What is wrong with a value of cache.json, or nothing."""
    if isinstance(kind, dict):
        if not isinstance(values, dict) or values.keys() != kind.keys():
            return f"{name or 'it'} has other fields than {', '.join(kind)}"
        found = (_complaint(values[field], of, f"{name}.{field}".lstrip(".")) for field, of in kind.items())
        return next((complaint for complaint in found if complaint), "")
    if not isinstance(values, kind) or (isinstance(values, bool) and kind is not bool):
        return f"{name} is of another type"
    if name == "dtype" and values not in DTYPES:
        return f"dtype is none of {', '.join(DTYPES)}"
    if name == "conditions" and not all(isinstance(item, str) and item in CONDITIONS for item in values):
        return "conditions has unknown names"
    if name == "autoencoder.compression" and [type(item) is int and item > 0 for item in values] != [True] * 3:
        return "autoencoder.compression is not three positive numbers"
    return ""
