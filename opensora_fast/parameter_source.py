"""A model's parameters under our names, wherever they lie: in a run, in a released checkpoint, in diffusers' layout.

Opening a source reads names, dtypes and shapes, and checks that they are those of a whole model. Its parameters are
then read a few at a time, into memory of the caller: a model that is trained, or the parts of an export.

    run                     RUN, or one step-N of it: its parameters are stored under our names
    released layout         fused or split q, k, v; heads that rotate interleaved or half-split pairs
    diffusers' layout       FluxTransformer2DModel, or a pipeline's folder that has it under transformer/
    autoencoders            Video DC-AE and Hunyuan VAE, whose released names are ours and, of the latter, diffusers'
    as they are             T5, CLIP and FLUX's image autoencoder: tensors that are only copied
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora_fast.checkpoint_folder import Weights, best_weights, find_checkpoint, is_run
from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.config import HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig, config_from_dict
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.flux_autoencoder import FluxAutoencoder, released_config
from opensora_fast.hunyuan_vae import HunyuanVAE
from opensora_fast.mmdit import MMDiT
from opensora_fast.released import check_tensors, mmdit_segments, naming
from opensora_fast.released_form import TITLES, assumed_fields, kind_of, mmdit_form, vae_form
from opensora_fast.safetensors_file import TensorSpec
from opensora_fast.streamed_loading import Segment, Target, load_segments
from opensora_fast.text import require_transformers
from opensora_fast.text_folder import TYPES, open_weights
from opensora_fast.told_config import told_config
from opensora_fast.weight_files import WeightFiles

Architecture = MMDiTConfig | VideoDCAEConfig | HunyuanVAEConfig


class RunParameters:
    """The parameters of one checkpoint of a run. Raises UserError when it cannot be read or lacks `weights`.

    The attributes and methods are those of `FileParameters`.
    """

    assumed: Mapping[str, Any] = {}
    promoted: tuple[str, ...] = ()

    def __init__(self, step_folder: Path, weights: Weights | None) -> None:
        self.reader = CheckpointReader(step_folder)
        manifest = self.reader.manifest
        if weights == "ema" and best_weights(self.reader) != "ema":
            raise UserError(f"--weights ema: checkpoint {step_folder} keeps no moving average; use --weights model")
        self.weights: Weights = weights or best_weights(self.reader)
        self.title = f"{self.weights} weights of {step_folder}"
        self.origin = {"step": str(manifest.step), "weights": self.weights}
        self.config: Architecture = _trained(self.reader)
        shapes = on_meta(self.config).state_dict()
        self.reader.check_fit({f"{self.weights}.{name}": tensor for name, tensor in shapes.items()})
        self.specs = {
            name: TensorSpec(manifest.tensors[f"{self.weights}.{name}"].dtype, tuple(tensor.shape))
            for name, tensor in shapes.items()
        }

    def stored(self, name: str) -> list[str]:
        return [f"{self.weights}.{name}"]

    def change(self, name: str) -> str:
        return ""

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.reader.read({f"{self.weights}.{name}": tensor for name, tensor in tensors.items()})


@dataclass(frozen=True)
class FileParameters:
    """The parameters of weight files: each is a stack of rows of stored tensors.

    title       path and layout, in words
    config      the model's architecture
    assumed     fields that neither the files tell nor a shape says, with the released values that they have here
    specs       our parameters, in the model's order; dtypes as stored, the widest where that differs within one
    """

    files: WeightFiles
    title: str
    config: Architecture
    assumed: Mapping[str, Any]
    segments: dict[str, list[Segment]]
    specs: dict[str, TensorSpec]

    @property
    def promoted(self) -> tuple[str, ...]:
        """The parameters that are stacks of tensors of several dtypes, which have the widest of them here."""
        return tuple(
            name
            for name, spec in self.specs.items()
            if any(self.files.specs[key].dtype != spec.dtype for key in self.stored(name))
        )

    @property
    def origin(self) -> dict[str, str]:
        """What an export says of where its weights come from."""
        return {"source": self.files.path.name}

    def stored(self, name: str) -> list[str]:
        """The stored tensors that our parameter `name` is read from."""
        return list(dict.fromkeys(segment.key for segment in self.segments[name] if segment.key is not None))

    def change(self, name: str) -> str:
        """What makes these tensors our parameter, in words; nothing where only the name differs."""
        segments, stored = self.segments[name], self.stored(name)
        changes = []
        if len(stored) > 1:
            changes.append(f"{len(stored)} tensors stacked")
        elif len(segments) > 1 and not any(segment.head_shape for segment in segments):
            changes.append("halves swapped")
        if any(segment.head_shape for segment in segments):
            changes.append("head channels from interleaved to half-split pairs")
        if columns := segments[0].columns:
            changes.append(f"columns {columns[0]} to {columns[1]}")
        if segments[0].key is None:
            changes.append("zeros, its share being in img_in.bias")
        return ", ".join(changes)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Read whole parameters into given tensors, of any dtype. Raises UserError when they cannot be read."""
        load_segments(self.files, [Target(tensor, self.segments[name]) for name, tensor in tensors.items()])


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a text encoder or of FLUX's image autoencoder, as they are; attributes as of `FileParameters`.

    beside      the other files of the folder that make the model: its configuration and its vocabulary
    """

    files: WeightFiles
    title: str
    beside: tuple[Path, ...] = ()
    config: None = None
    assumed: Mapping[str, Any] = field(default_factory=dict)
    promoted: tuple[str, ...] = ()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self.files.specs

    @property
    def origin(self) -> dict[str, str]:
        """What an export says of where its weights come from, and the configuration that they tell."""
        told = {} if self.files.path.is_dir() else {"config": self.files.metadata.get("config", "")}
        return {"source": self.files.path.name} | {name: text for name, text in told.items() if text}

    def stored(self, name: str) -> list[str]:
        return [name]

    def change(self, name: str) -> str:
        return ""

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.files.fill(tensors)


ParameterSource = RunParameters | FileParameters | StoredTensors

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".onnx")


def open_parameters(path: Path, weights: Weights | None = None) -> ParameterSource:
    """The parameters that `path` holds; see the module. Raises UserError when it holds no whole model.

    weights: of a run, the moving average ("ema") or the last weights ("model"); None takes the former where kept.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name a run, one of its step-N folders, or a file of weights")
    if is_run(path):
        return RunParameters(find_checkpoint(path), weights)
    if weights is not None:
        raise UserError(f"--weights {weights}: {path} is no run and holds one set of weights; leave this option out")
    if (path / "transformer").is_dir():
        path = path / "transformer"
    return _text_encoder(path) or parameters_of(WeightFiles.open(path))


def assumptions(source: ParameterSource) -> str:
    """What was assumed of weights and can be said beside them, on one line; nothing where they tell all."""
    if not source.assumed or not isinstance(source, FileParameters):
        return ""
    path = source.files.path
    place = path / "config.json" if path.is_dir() else path.with_suffix(".json")
    values = ", ".join(f"{name}={value}" for name, value in sorted(source.assumed.items()))
    return f"assumed, as released, for nothing says it: {values}; say other values in {place}, as a JSON object"


def parameters_of(files: WeightFiles) -> FileParameters | StoredTensors:
    """The parameters of weight files, in whatever layout they are; text encoders are folders.

    Raises UserError naming the tensors that are missing, unexpected or misshapen, or that no layout has.
    """
    kind = kind_of(files.specs)
    if kind == "mmdit":
        return _transformer(files, "released")
    if kind == "mmdit_diffusers":
        return _transformer(files, "diffusers' layout")
    if kind in ("hunyuan_vae", "video_dc_ae"):
        return _autoencoder(files)
    if kind == "flux_ae":
        return _image_autoencoder(files)
    raise UserError(
        f"weights {files.path} hold {TITLES[None]} (they begin with {next(iter(files.specs), 'nothing')}): name a "
        "transformer's, an autoencoder's, or the folder of a text encoder"
    )


def read_parameters(source: ParameterSource, names: Iterable[str]) -> dict[str, Tensor]:
    """Some parameters, on the CPU, in the stored dtypes. Raises UserError when they cannot be read."""
    tensors = {name: torch.empty(source.specs[name].shape, dtype=source.specs[name].dtype) for name in names}
    source.fill(tensors)
    return tensors


def on_meta(config: Architecture) -> MMDiT | VideoDCAE | HunyuanVAE:
    """The model of an architecture, without memory."""
    with torch.device("meta"):
        if isinstance(config, MMDiTConfig):
            return MMDiT(config)
        if isinstance(config, VideoDCAEConfig):
            return VideoDCAE(config)
        return HunyuanVAE(config)


def _trained(reader: CheckpointReader) -> MMDiTConfig | VideoDCAEConfig:
    recipe = reader.manifest.recipe
    if "model" in recipe:
        return config_from_dict(MMDiTConfig, recipe["model"])
    if "autoencoder" in recipe:
        return config_from_dict(VideoDCAEConfig, recipe["autoencoder"]["config"])
    raise UserError(
        f"checkpoint {reader.step_folder} (recipe {recipe.get('name')}) holds neither a transformer nor an "
        "autoencoder: name another one"
    )


def _transformer(files: WeightFiles, layout: str) -> FileParameters:
    with naming(files):
        form = mmdit_form(files.specs, files.metadata)
        config = config_from_dict(MMDiTConfig, {field.name: form[field.name] for field in fields(MMDiTConfig)})
        with torch.device("meta"):
            model = MMDiT(config)
    if layout == "released":
        fused = "fused" if form["fused_qkv"] else "apart"
        layout = f"released layout: q, k, v {fused}, {'half-split' if form['use_liger_rope'] else 'interleaved'} heads"
    layout += f"; {config.depth} double and {config.depth_single_blocks} single blocks"
    segments = mmdit_segments(model, files, form)
    assumed = {name: form[name] for name in assumed_fields(files.specs, files.metadata, form)}
    return _of_files(files, layout, config, assumed, model, segments)


def _autoencoder(files: WeightFiles) -> FileParameters:
    with naming(files):
        kind, form = vae_form(files.specs, files.metadata)
        classes: dict[str, type[Architecture]] = {"hunyuan": HunyuanVAEConfig, "video_dc_ae": VideoDCAEConfig}
        config = config_from_dict(classes[kind], form)
    model = on_meta(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(files.specs, shapes, files.path)
    segments = {name: [Segment(name)] for name in shapes}
    return _of_files(files, TITLES[kind_of(files.specs)], config, {}, model, segments)


def _image_autoencoder(files: WeightFiles) -> StoredTensors:
    with torch.device("meta"):
        tensors = FluxAutoencoder(released_config(files)).released_state_dict()
    check_tensors(files.specs, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, files.path)
    return StoredTensors(files, f"{files.path} ({TITLES['flux_ae']}, as it is)")


def _text_encoder(folder: Path) -> StoredTensors | None:
    """The weights of a folder whose config.json says that it is T5's or CLIP's, checked; of others nothing."""
    try:
        told = told_config({"config": (folder / "config.json").read_text("utf-8")}, {"model_type": ""})
    except (OSError, ValueError, UserError):  # told by whoever reads the weights
        return None
    for class_name, types in TYPES.items():
        if told.get("model_type") in types:
            weights = open_weights(folder, getattr(require_transformers(), class_name))
            beside = tuple(path for path in sorted(folder.iterdir()) if path.is_file() and _describes(path))
            return StoredTensors(weights.files, f"{folder} ({class_name}, as it is)", beside)
    return None


def _describes(path: Path) -> bool:
    """Whether a file of a model's folder is none of its weights."""
    return path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(".index.json") and path.name[0] != "."


def _of_files(
    files: WeightFiles,
    layout: str,
    config: Architecture,
    assumed: Mapping[str, Any],
    model: nn.Module,
    segments: dict[str, list[Segment]],
) -> FileParameters:
    specs = {}
    for name, tensor in model.state_dict().items():
        dtypes = [files.specs[segment.key].dtype for segment in segments[name] if segment.key is not None]
        dtype = reduce(torch.promote_types, dtypes or [next(iter(files.specs.values())).dtype])
        specs[name] = TensorSpec(dtype, tuple(tensor.shape))
    return FileParameters(files, f"{files.path} ({layout})", config, assumed, segments, specs)
