"""A model's parameters under our names, wherever they lie: in a run, in a released checkpoint, in diffusers' layout.

Opening a source reads names, dtypes and shapes, and checks that they are those of a whole model. Its parameters are
then read a few at a time, into memory of the caller: a model that is trained, or the parts of an export.

    run                     RUN, or one step-N of it: its parameters are stored under our names
    released layout         fused or split q, k, v; heads that rotate interleaved or half-split pairs
    diffusers' layout       FluxTransformer2DModel, or a pipeline's folder that has it under transformer/
    autoencoders            Video DC-AE and Hunyuan VAE, whose released names are ours and, of the latter, diffusers'
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora_fast.checkpoint_folder import Weights, best_weights, find_checkpoint, step_folders
from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.config import HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig, config_from_dict
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.hunyuan_vae import HunyuanVAE
from opensora_fast.manifest import MANIFEST
from opensora_fast.mmdit import MMDiT
from opensora_fast.released import check_tensors, mmdit_segments, naming
from opensora_fast.released_form import kind_of, mmdit_form, vae_form
from opensora_fast.safetensors_file import TensorSpec
from opensora_fast.streamed_loading import Segment, Target, load_segments
from opensora_fast.weight_files import WeightFiles

Architecture = MMDiTConfig | VideoDCAEConfig | HunyuanVAEConfig


class RunParameters:
    """The parameters of one checkpoint of a run. Raises UserError when it cannot be read or lacks `weights`.

    The attributes and methods are those of `FileParameters`.
    """

    assumed: frozenset[str] = frozenset()

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
    assumed     fields of `config` that the files do not say, and no shape does: they have the released values
    specs       our parameters, in the model's order; dtypes as stored
    """

    files: WeightFiles
    title: str
    config: Architecture
    assumed: frozenset[str]
    segments: dict[str, list[Segment]]
    specs: dict[str, TensorSpec]

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


ParameterSource = RunParameters | FileParameters


def open_parameters(path: Path, weights: Weights | None = None) -> ParameterSource:
    """The parameters that `path` holds; see the module. Raises UserError when it holds no whole model.

    weights: of a run, the moving average ("ema") or the last weights ("model"); None takes the former where kept.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name a run, one of its step-N folders, or a file of weights")
    if path.is_dir() and ((path / MANIFEST).is_file() or (path / "recipe.json").is_file() or step_folders(path)):
        return RunParameters(find_checkpoint(path), weights)
    if weights is not None:
        raise UserError(f"--weights {weights}: {path} is no run and holds one set of weights; leave this option out")
    if (path / "transformer").is_dir():
        path = path / "transformer"
    return parameters_of(WeightFiles.open(path))


def parameters_of(files: WeightFiles) -> FileParameters:
    """The parameters of weight files, in whatever layout they are.

    Raises UserError naming the tensors that are missing, unexpected or misshapen, or that no layout has.
    """
    kind = kind_of(files.specs)
    if kind == "mmdit":
        return _transformer(files, "released")
    if kind == "mmdit_diffusers":
        return _transformer(files, "diffusers' layout")
    if kind in ("hunyuan_vae", "video_dc_ae"):
        return _autoencoder(files)
    raise UserError(
        f"weights {files.path} are neither a video transformer's nor those of a Video DC-AE or Hunyuan VAE (they begin "
        f"with {next(iter(files.specs), 'nothing')}): name other ones"
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
    segments = mmdit_segments(model, files, form)
    return _of_files(files, layout, config, _assumed(files, config), model, segments)


def _autoencoder(files: WeightFiles) -> FileParameters:
    with naming(files):
        kind, form = vae_form(files.specs, files.metadata)
        classes: dict[str, type[Architecture]] = {"hunyuan": HunyuanVAEConfig, "video_dc_ae": VideoDCAEConfig}
        config = config_from_dict(classes[kind], form)
    model = on_meta(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(files.specs, shapes, files.path)
    segments = {name: [Segment(name)] for name in shapes}
    layout = "Hunyuan VAE" if kind == "hunyuan" else "Video DC-AE"
    return _of_files(files, layout, config, frozenset(), model, segments)


def _of_files(
    files: WeightFiles,
    layout: str,
    config: Architecture,
    assumed: frozenset[str],
    model: nn.Module,
    segments: dict[str, list[Segment]],
) -> FileParameters:
    specs = {}
    for name, tensor in model.state_dict().items():
        dtypes = [files.specs[segment.key].dtype for segment in segments[name] if segment.key is not None]
        dtype = reduce(torch.promote_types, dtypes or [next(iter(files.specs.values())).dtype])
        specs[name] = TensorSpec(dtype, tuple(tensor.shape))
    return FileParameters(files, f"{files.path} ({layout})", config, assumed, segments, specs)


def _assumed(files: WeightFiles, config: MMDiTConfig) -> frozenset[str]:
    """The fields that no shape says, and the metadata neither."""
    said = json.loads(files.metadata.get("config", "{}"))
    if "_class_name" in said:  # diffusers' own
        said |= {"theta": None, "axes_dim": said.get("axes_dims_rope")}
        said.pop("patch_size", None)
    known = {"patch_size"} if config.cond_embed else set()
    return frozenset({"axes_dim", "theta", "patch_size"} - said.keys() - known)
