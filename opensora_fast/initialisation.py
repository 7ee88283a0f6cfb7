"""A transformer to train that begins with the weights of another one, and a report of what became of every tensor.

    FLUX.1-dev          the paper's start of stage 1 (section 4.2): one image model, whose layers are the video model's.
                        The condition's input layer is new and zero, so that nothing changes at first; the embedding of
                        the distilled guidance is dropped
    another autoencoder of the same transformer (section 4.3): its latents have other channels, so input and output
                        layers (img_in, cond_in, final_layer.linear) start anew, and the rest is kept
    a run, or Open-Sora's weights: everything fits

New layers are drawn as for training from nothing (`mmdit.initialize_parameter`): img_in by Xavier; cond_in and
final_layer.linear zero. Whatever else differs is an error: a model that lacks half of its weights is none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT, initialize_parameter
from opensora_fast.parameter_source import ParameterSource, assumptions, open_parameters, parameters_of
from opensora_fast.weight_files import WeightFiles

NewLayers = Literal["none", "auto", "always"]
Outcome = Literal["loaded", "converted", "new", "ignored"]

REPORT = "initialisation.json"  # beside a run
INPUT_AND_OUTPUT = ("img_in.", "cond_in.", "final_layer.linear.")  # their shapes depend on the autoencoder
MAY_DIFFER = ("in_channels", "patch_size", "cond_embed", "guidance_embed")  # with new layers allowed


class Origin(NamedTuple):
    """What became of one tensor: a parameter of the model, or one of the source that the model has no place for."""

    outcome: Outcome
    stored: tuple[str, ...]  # the source's tensors
    note: str
    elements: int


@dataclass(frozen=True)
class InitialisationReport:
    """Every parameter of the model and every one of the source, by our name, and what became of it.

    loaded: taken over, under another name at most.  converted: rows stacked, reordered or cut out.  new: drawn anew.
    ignored: the source's, unused.  `dtypes` names the stored and the model's.  `assumed` says what nothing told.
    """

    source: str
    dtypes: str
    origins: dict[str, Origin]
    unused: dict[str, Origin]
    assumed: str = ""

    def names(self, outcome: Outcome) -> list[str]:
        """The parameters with this outcome: of the model, or of the source where they were ignored."""
        return [name for name, origin in self._all() if origin.outcome == outcome]

    def table(self) -> Table:
        """One row for all that had the same done to it; blocks are taken together."""
        table = Table("", "what was done", "tensors", "elements", "parameters", title_justify="left", show_lines=True)
        table.title = escape(f"weights of {self.source}, {self.dtypes}")
        rows: dict[tuple[Outcome, str], list[tuple[str, int]]] = {}
        for name, origin in self._all():
            layer = re.sub(r"_blocks\.\d+\.", "_blocks.*.", name).removesuffix(".weight").removesuffix(".bias")
            rows.setdefault((origin.outcome, origin.note), []).append((layer, origin.elements))
        for (outcome, note), found in rows.items():
            layers = ", ".join(dict.fromkeys(layer for layer, _ in found))
            table.add_row(
                outcome, note or "as stored", str(len(found)), f"{sum(elements for _, elements in found):,}", layers
            )
        return table

    def summary(self) -> str:
        """The numbers of parameters and elements by outcome, on one line."""
        parts = []
        for outcome in ("loaded", "converted", "new", "ignored"):
            elements = [origin.elements for _, origin in self._all() if origin.outcome == outcome]
            parts.append(f"{len(elements)} {outcome} ({sum(elements):,} elements)")
        return f"{self.source}: " + ", ".join(parts)

    def print(self) -> None:
        """The table and the summary, on standard output."""
        Console().print(self.table())
        print(self.summary())
        if self.assumed:
            print(self.assumed)

    def save(self, run: Path) -> None:
        """Write it to RUN/initialisation.json, name by name. Raises UserError with the system's reason."""
        content = {"source": self.source, "dtypes": self.dtypes, "assumed": self.assumed}
        lists = {
            outcome: {name: origin._asdict() for name, origin in self._all() if origin.outcome == outcome}
            for outcome in ("loaded", "converted", "new", "ignored")
        }
        try:
            (run / REPORT).write_text(json.dumps(content | lists, indent=1))
        except OSError as error:
            raise UserError(
                f"{run / REPORT}: not written ({error.strerror}): free space, or name another --out"
            ) from error

    def _all(self) -> Iterator[tuple[str, Origin]]:
        order = ("loaded", "converted", "new", "ignored")
        both = [*self.origins.items(), *self.unused.items()]
        yield from sorted(both, key=lambda item: order.index(item[1].outcome))


def initialise_mmdit(
    model: MMDiT, source: Path | WeightFiles | ParameterSource, *, new_layers: NewLayers = "auto"
) -> InitialisationReport:
    """Give every parameter of `model` a value, those of `source` where they fit; tells what became of each.

    model       its parameters, of any dtype and device, are filled a few rows at a time; they may hold anything before
    source      what `open_parameters` takes: FLUX.1-dev or Open-Sora's weights in a released layout or in diffusers',
                a run (its moving average where kept); or weight files that are open
    new_layers  "none": the source has to be of exactly this architecture.  "auto": layers that it lacks start anew
                (cond_in, guidance_in), and so do input and output layers where it has other channels or patches;
                what the model has no place for is left out.  "always": input and output layers start anew in any case

    New layers are drawn from PyTorch's default CPU generator, whatever the model is on. Raises UserError naming what
    differs, before anything is read; or a tensor of the source that is missing, unexpected or misshapen.
    """
    if isinstance(source, Path):
        return _initialise(model, open_parameters(source), new_layers)
    return _initialise(model, parameters_of(source) if isinstance(source, WeightFiles) else source, new_layers)


def require_fit(source: ParameterSource, config: MMDiTConfig, new_layers: NewLayers) -> None:
    """Raises UserError, as `initialise_mmdit` does, when a model of `config` cannot begin with these weights."""
    _why_new(source, config, new_layers)


def _initialise(model: MMDiT, source: ParameterSource, new_layers: NewLayers) -> InitialisationReport:
    why_new = _why_new(source, model.config, new_layers)
    parameters = dict(model.named_parameters())
    origins: dict[str, Origin] = {}
    for name, parameter in parameters.items():
        if name not in source.specs:
            origins[name] = Origin("new", (), "the weights have no such layer", parameter.numel())
        elif why_new and name.startswith(INPUT_AND_OUTPUT):
            origins[name] = Origin("new", (), why_new, parameter.numel())
        else:
            note = source.change(name)
            outcome: Outcome = "converted" if note else "loaded"
            origins[name] = Origin(outcome, tuple(source.stored(name)), note, parameter.numel())
    source.fill({name: parameters[name].detach() for name, origin in origins.items() if origin.outcome != "new"})
    new = {name: _start_of(name) for name, origin in origins.items() if origin.outcome == "new"}
    for name in new:
        _draw(name, parameters[name])
    for name, start in new.items():
        origins[name] = origins[name]._replace(note=f"{start}: {origins[name].note}")
    unused = {}
    for name, spec in source.specs.items():
        if name not in parameters or name in new:
            note = why_new if name in parameters else "the model has no such layer"
            unused[name] = Origin("ignored", tuple(source.stored(name)), note, math.prod(spec.shape))
    return InitialisationReport(source.title, _dtypes(source, model), origins, unused, assumptions(source))


def _draw(name: str, parameter: Tensor) -> None:
    """On the CPU, whatever the parameter is on: a seed gives the same start everywhere."""
    drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    initialize_parameter(name, drawn)
    parameter.detach().copy_(drawn)


def _why_new(source: ParameterSource, ours: MMDiTConfig, new_layers: NewLayers) -> str:
    """Why input and output layers start anew, nothing where they do not. Raises UserError for what cannot be helped."""
    theirs = source.config
    if not isinstance(theirs, MMDiTConfig):
        raise UserError(f"weights of {source.title} are no transformer's: name those of one")
    values = {field.name: (getattr(theirs, field.name), getattr(ours, field.name)) for field in fields(MMDiTConfig)}
    values["mlp_ratio"] = theirs.mlp_size / theirs.hidden_size, ours.mlp_size / ours.hidden_size
    differing = [name for name, (has, wants) in values.items() if has != wants]
    fatal = [name for name in differing if new_layers == "none" or name not in MAY_DIFFER]
    if fatal:
        what = ", ".join(f"{name} is {values[name][0]} there and {values[name][1]} in the model" for name in fatal)
        remedy = "name other weights"
        if set(fatal) & source.assumed.keys():
            remedy += f" ({assumptions(source)})"
        if set(fatal) <= set(MAY_DIFFER):
            remedy += ", or let the layers that differ start anew (new_layers=auto)"
        raise UserError(f"weights of {source.title} are of another architecture: {what}; {remedy}")
    other = [f"{name}={values[name][0]}" for name in ("in_channels", "patch_size") if name in differing]
    if other:
        return f"the weights are for {', '.join(other)}"
    return "as asked for" if new_layers == "always" else ""


def _start_of(name: str) -> str:
    """How `initialize_parameter` begins an input or output layer."""
    return "zero" if name.endswith("bias") or name.startswith(("cond_in", "final_layer")) else "drawn"


def _dtypes(source: ParameterSource, model: MMDiT) -> str:
    stored, ours = (
        " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
        for dtypes in ({spec.dtype for spec in source.specs.values()}, {p.dtype for p in model.parameters()})
    )
    return stored if stored == ours else f"{stored} to {ours}"
