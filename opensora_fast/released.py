"""Released checkpoints: reading their files, turning their tensors into ours, and back without changing a bit.

A released MMDiT comes in four layouts, named by two fields of its configuration:

    fused_qkv       True: `qkv` and `linear1` hold q, k, v (and the MLP) as rows of one matrix.  False: one tensor each.
    use_liger_rope  True: heads rotate the channel pairs (i, i + K/2), half-split.  False: (2i, 2i + 1), interleaved.

Ours is fused and half-split, under other names, so each of our parameters is a stack of rows of released tensors, some
of them reordered inside every head. Reordering q, k and the scales of their norms together leaves every q k^T as it is.

Shapes  D hidden size; K channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from opensora_fast.attention_rows import StateDict, reorder_heads, rotary_rows, split_rows
from opensora_fast.config import HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig, config_from_dict
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.diffusers_layout import BIASES, WRITTEN_SUM, check_biases, diffusers_segments, diffusers_shapes
from opensora_fast.errors import UserError
from opensora_fast.hunyuan_vae import HunyuanVAE
from opensora_fast.mmdit import MMDiT
from opensora_fast.released_form import TITLES, VAE_KINDS, VaeKind, kind_of, mmdit_form, vae_form
from opensora_fast.safetensors_file import TensorSpec
from opensora_fast.streamed_loading import OnBytes, Segment, Target, load_segments, no_report
from opensora_fast.weight_files import WeightFiles, listed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
Model = TypeVar("Model", bound=nn.Module)

# What the released code assumes where its configuration is silent; other absent fields have our own defaults.
RELEASED_DEFAULTS = {"cond_embed": False, "fused_qkv": True, "use_liger_rope": False}

# Our layer -> theirs, for the layers of a block that are one matrix in every layout but under another name.
STREAM_LAYERS = {"modulation": "mod.lin", "qkv": "attn.qkv", "proj": "attn.proj", "mlp_in": "mlp.0", "mlp_out": "mlp.2"}
SINGLE_LAYERS = {"modulation": "modulation.lin", "qkv_mlp": "linear1", "proj": "linear2"}


def load_released_mmdit(state_dict: Mapping[str, Tensor], released_config: Mapping[str, Any]) -> MMDiT:
    """The model of a released checkpoint, in the dtype and on the device of its tensors.

    `released_config` has the released field names: those of the architecture and of the layout are read, others
    ignored, and absent ones are as the released code assumes. Tensors that need no rearranging are taken over, not
    copied.
    Raises UserError naming every tensor that is missing, unexpected or of another shape.
    """
    released = RELEASED_DEFAULTS | dict(released_config)
    with torch.device("meta"):
        model = MMDiT(_architecture(MMDiTConfig, released))
    check_tensors(state_dict, _shapes(to_released_state_dict(model, released)), None)
    ours = {}
    for name, parameter in model.state_dict().items():
        pieces = [state_dict[key] for key in _released_names(name, released["fused_qkv"])]
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if not released["use_liger_rope"]:
            rows = reorder_heads(rows, rotary_rows(name, model.config), (model.config.head_dim // 2, 2))
        ours[name] = rows.view(parameter.shape)
    model.load_state_dict(ours, assign=True)
    return model


def load_released_dc_ae(state_dict: Mapping[str, Tensor], released_config: Mapping[str, Any]) -> VideoDCAE:
    """The Video DC-AE of a released checkpoint, in the dtype and on the device of its tensors, which it takes over.

    Of `released_config` the fields of VideoDCAEConfig are read, others ignored.
    Raises UserError naming every tensor that is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        model = VideoDCAE(_architecture(VideoDCAEConfig, released_config))
    check_tensors(state_dict, _shapes(model.state_dict()), None)
    model.load_state_dict(state_dict, assign=True)
    return model


def load_released_hunyuan_vae(state_dict: Mapping[str, Tensor], released_config: Mapping[str, Any]) -> HunyuanVAE:
    """The Hunyuan VAE of a released checkpoint, in the dtype and on the device of its tensors, which it takes over.

    Of `released_config` the fields of HunyuanVAEConfig are read, others ignored.
    Raises UserError naming every tensor that is missing, unexpected or of another shape, or when diffusers is missing.
    """
    with torch.device("meta"):
        model = HunyuanVAE(_architecture(HunyuanVAEConfig, released_config))
    check_tensors(state_dict, _shapes(model.state_dict()), None)
    model.load_state_dict(state_dict, assign=True)
    return model


def load_mmdit_from(
    files: WeightFiles,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    released_config: Mapping[str, Any] | None = None,
    into: MMDiT | None = None,
    on_bytes: OnBytes = no_report,
) -> MMDiT:
    """The transformer of a checkpoint in a released layout or in diffusers', streamed to `device` in `dtype`.

    The host holds two blocks of rows (at most streamed_loading.BLOCK_BYTES each) beside the model's own weights. A new
    model is for evaluation: no parameter asks for a gradient.

    dtype: None is the stored one, where all tensors have the same, else float32.
    released_config: as in `load_released_mmdit`; None is what the tensors say (`released_form.mmdit_form`).
    into: the model to fill instead of a new one; its parameters keep device, dtype and `requires_grad`, and may lie on
        several devices. Of parameters that are DTensors each rank reads the rows of its shard.
    on_bytes: called with the bytes that were read, as reading goes on.

    Raises UserError naming the file and every tensor that is missing, unexpected, of another shape, or not of floating
    point numbers.
    """
    with naming(files):
        released = RELEASED_DEFAULTS | dict(released_config or mmdit_form(files.specs, files.metadata))
        config = into.config if into is not None else _architecture(MMDiTConfig, released)
        with torch.device("meta"):
            on_meta = MMDiT(config)
    segments = mmdit_segments(on_meta, files, released)
    return _stream(files, into if into is not None else _empty(on_meta, files, device, dtype), segments, on_bytes)


def load_dc_ae_from(
    files: WeightFiles,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    released_config: Mapping[str, Any] | None = None,
    into: VideoDCAE | None = None,
    on_bytes: OnBytes = no_report,
) -> VideoDCAE:
    """The Video DC-AE of a checkpoint; arguments and errors as in `load_mmdit_from`, its form that of `vae_form`."""
    model = into
    if model is None:
        with naming(files), torch.device("meta"):
            model = VideoDCAE(_architecture(VideoDCAEConfig, released_config or _vae_form(files, "video_dc_ae")))
    segments = _segments_as_named(model, files)
    return _stream(files, model if into is not None else _empty(model, files, device, dtype), segments, on_bytes)


def load_hunyuan_vae_from(
    files: WeightFiles,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    released_config: Mapping[str, Any] | None = None,
    into: HunyuanVAE | None = None,
    on_bytes: OnBytes = no_report,
) -> HunyuanVAE:
    """The Hunyuan VAE of a checkpoint, or of diffusers' folder of one; arguments and errors as in `load_dc_ae_from`.

    Raises UserError also when diffusers is missing.
    """
    model = into
    if model is None:
        with naming(files), torch.device("meta"):
            model = HunyuanVAE(_architecture(HunyuanVAEConfig, released_config or _vae_form(files, "hunyuan")))
    segments = _segments_as_named(model, files)
    return _stream(files, model if into is not None else _empty(model, files, device, dtype), segments, on_bytes)


def to_released_state_dict(model: MMDiT | VideoDCAE | HunyuanVAE, released_config: Mapping[str, Any]) -> StateDict:
    """The weights under their released names, in the layout of `released_config`: the exact inverse of loading them.

    Of `released_config` only `fused_qkv` and `use_liger_rope` are read, for an MMDiT: an autoencoder's names are the
    released ones. Tensors share memory with the model unless heads had to be reordered. On the meta device it lists
    names and shapes.
    """
    if not isinstance(model, MMDiT):
        return model.state_dict()
    theirs: StateDict = {}
    for name, parameter in model.state_dict().items():
        theirs |= to_released(name, parameter, model.config, released_config)
    return theirs


def to_released(name: str, parameter: Tensor, config: MMDiTConfig, released_config: Mapping[str, Any]) -> StateDict:
    """One parameter of an MMDiT as the released tensors that hold its rows; of all it is `to_released_state_dict`."""
    released = RELEASED_DEFAULTS | dict(released_config)
    rows = parameter.flatten() if name.endswith("qk_scale") else parameter
    rotary = rotary_rows(name, config)
    if not released["use_liger_rope"]:
        rows = reorder_heads(rows, rotary, (2, config.head_dim // 2))
    return split_rows(rows, _released_names(name, released["fused_qkv"]), rotary)


def read_weights(path: Path | str) -> StateDict:
    """Every tensor of a checkpoint, on the CPU, in the stored dtypes. Pickled code is never run.

    `path` is what `WeightFiles.open` takes; raises UserError as that does.
    """
    files = WeightFiles.open(path)
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in files.specs.items()}
    files.fill(tensors)
    return tensors


def mmdit_segments(on_meta: MMDiT, files: WeightFiles, released_config: Mapping[str, Any]) -> dict[str, list[Segment]]:
    """Every parameter of a model as rows of a checkpoint's tensors, in a released layout or in diffusers'.

    Raises UserError naming the file and every tensor that does not fit the model.
    """
    config, parameters = on_meta.config, on_meta.state_dict()
    if kind_of(files.specs) == "mmdit_diffusers":
        shapes = diffusers_shapes(config)
        if side_file := [name for name in (*BIASES, WRITTEN_SUM) if name in files.specs]:
            shapes |= dict.fromkeys((*BIASES, WRITTEN_SUM), (config.hidden_size,))
        check_tensors(files.specs, shapes, files.path)
        if side_file:
            check_biases(files)
        return {name: diffusers_segments(name, config, files.specs) for name in parameters}
    check_tensors(files.specs, _shapes(to_released_state_dict(on_meta, released_config)), files.path)
    return {name: released_segments(name, config, released_config) for name in parameters}


def released_segments(name: str, config: MMDiTConfig, released_config: Mapping[str, Any]) -> list[Segment]:
    """Our MMDiT parameter `name` as the rows of released tensors that it is a stack of."""
    released = RELEASED_DEFAULTS | dict(released_config)
    *upper, last = _released_names(name, released["fused_qkv"])
    rotary = rotary_rows(name, config)
    pairs = None if released["use_liger_rope"] or not rotary else (config.head_dim // 2, 2)
    if not upper and pairs is None:
        return [Segment(last)]
    if not upper:
        return [Segment(last, 0, rotary, pairs), Segment(last, rotary)]
    segments = [Segment(key, 0, rotary // 2, pairs) for key in upper]
    return [*segments, Segment(last, 0, None, pairs if name.endswith("qk_scale") else None)]


def _released_names(name: str, fused_qkv: bool) -> list[str]:
    """The released tensors whose rows, stacked in this order, are our MMDiT parameter `name`."""
    match name.split("."):
        case ["double_blocks", i, stream, "qk_scale"]:
            return [f"double_blocks.{i}.{stream}_attn.norm.{kind}_norm.scale" for kind in ("query", "key")]
        case ["double_blocks", i, stream, "qkv", leaf] if not fused_qkv:
            return [f"double_blocks.{i}.{stream}_attn.{kind}_proj.{leaf}" for kind in ("q", "k", "v")]
        case ["double_blocks", i, stream, layer, leaf]:
            return [f"double_blocks.{i}.{stream}_{STREAM_LAYERS[layer]}.{leaf}"]
        case ["single_blocks", i, "qk_scale"]:
            return [f"single_blocks.{i}.norm.{kind}_norm.scale" for kind in ("query", "key")]
        case ["single_blocks", i, "qkv_mlp", leaf] if not fused_qkv:
            return [f"single_blocks.{i}.{kind}.{leaf}" for kind in ("q_proj", "k_proj", "v_mlp")]
        case ["single_blocks", i, layer, leaf]:
            return [f"single_blocks.{i}.{SINGLE_LAYERS[layer]}.{leaf}"]
        case ["final_layer", "modulation", leaf]:
            return [f"final_layer.adaLN_modulation.1.{leaf}"]
    return [name]


def check_tensors(
    found: Mapping[str, Tensor] | Mapping[str, TensorSpec],
    expected: Mapping[str, Sequence[int]],
    where: Path | None,
) -> None:
    """Raises UserError naming every tensor that is not as `expected`, which has the names and shapes of all.

    where: what the tensors are of, for the message.
    """
    shapes = {key: list(tensor.shape) for key, tensor in found.items()}
    missing = [key for key in expected if key not in shapes]
    unexpected = [key for key in shapes if key not in expected]
    misshapen = [
        f"{key} is {shapes[key]}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in shapes and shapes[key] != list(shape)
    ]
    integral = [f"{key} is {tensor.dtype}" for key, tensor in found.items() if not tensor.dtype.is_floating_point]
    groups = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "no floating point": integral}
    problems = "; ".join(f"{len(keys)} {group}: {listed(keys)}" for group, keys in groups.items() if keys)
    if problems:
        subject = "weights" if where is None else f"weights {where}"
        raise UserError(
            f"{subject} do not fit their configuration ({problems}): download them again, or name those of this model"
        )


def _architecture(config_class: type[Config], released: Mapping[str, Any]) -> Config:
    names = {field.name for field in fields(config_class)}
    return config_from_dict(config_class, {key: value for key, value in released.items() if key in names})


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _vae_form(files: WeightFiles, wanted: VaeKind) -> dict[str, Any]:
    kind, form = vae_form(files.specs, files.metadata)
    if kind != wanted:
        titles = {vae_kind: TITLES[name] for name, vae_kind in VAE_KINDS.items()}
        raise UserError(f"they are of {titles[kind]}, not of {titles[wanted]}: name other ones")
    return form


def _segments_as_named(model: nn.Module, files: WeightFiles) -> dict[str, list[Segment]]:
    """The parameters of a model whose names are those of the checkpoint."""
    shapes = _shapes(model.state_dict())
    check_tensors(files.specs, shapes, files.path)
    return {name: [Segment(name)] for name in shapes}


def _empty(on_meta: Model, files: WeightFiles, device: torch.device | str, dtype: torch.dtype | None) -> Model:
    """The model with memory for its weights, for evaluation."""
    stored = {spec.dtype for spec in files.specs.values()}
    dtype = dtype or (stored.pop() if len(stored) == 1 else torch.float32)
    return on_meta.to(dtype).to_empty(device=device).eval().requires_grad_(False)


def _stream(files: WeightFiles, model: Model, segments: Mapping[str, list[Segment]], on_bytes: OnBytes) -> Model:
    parameters = model.state_dict(keep_vars=True)
    load_segments(files, [Target(parameters[name], rows) for name, rows in segments.items()], on_bytes=on_bytes)
    return model


@contextmanager
def naming(files: WeightFiles) -> Iterator[None]:
    """Let what cannot be told of the tensors be told of their file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"weights {files.path}: {error}") from error
