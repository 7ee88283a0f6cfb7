"""`opensora-fast checkpoint inspect|verify|export DIR`: what a checkpoint holds, whether it is whole, and its weights
for others.

DIR is a run of `opensora-fast train`, or one step-N of it. `export` also takes weights from elsewhere, in the released
layout or in diffusers', and so turns one into the other. Nothing here needs a GPU or writes to DIR.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from opensora_fast.arguments import Parser
from opensora_fast.checkpoint_export import RELEASED_LAYOUT, check_out, plan_export
from opensora_fast.checkpoint_folder import step_folders, step_of
from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.errors import UserError
from opensora_fast.manifest import FORMAT, MANIFEST, DamagedError, Manifest, ManifestError, read_manifest
from opensora_fast.parameter_source import assumptions, open_parameters
from opensora_fast.weight_files import BIASES_FILE, listed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_GIB = 5.0
LAYOUTS = {"released": "the released layout", "diffusers": "diffusers' layout"}


def main(argv: list[str]) -> int:
    """Returns 0; `verify` returns 2 when a published checkpoint does not verify. Raises UserError for bad input."""
    options = _parser().parse_args(argv)
    commands = {"inspect": _inspect, "verify": _verify, "export": _export}
    return commands[options.command](options)


def _parser() -> Parser:
    parser = Parser(prog="opensora-fast checkpoint", description="Look at, check and export checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    folder = Parser(add_help=False)
    folder.add_argument("folder", type=Path, metavar="DIR", help="a run of `opensora-fast train`, or one step-N of it")

    inspect = commands.add_parser("inspect", parents=[folder], help="contents: steps, groups of tensors, sizes, recipe")
    inspect.add_argument("--tensors", action="store_true", help="also list every tensor")

    commands.add_parser("verify", parents=[folder], help="check every byte against its checksum; 0 all well, 2 not")

    export = commands.add_parser("export", help="write the weights as safetensors")
    export.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run, one step-N of it, or weights in either layout: a file, a folder of shards, diffusers' folder; "
        "or a text encoder's folder or FLUX's autoencoder, which are written as they are. What no tensor says can be "
        'said in NAME.json beside NAME.safetensors: {"use_liger_rope": true}',
    )
    export.add_argument(
        "--out", required=True, type=Path, help="a file NAME.safetensors, or a folder for shards and their index"
    )
    export.add_argument(
        "--weights", choices=("ema", "model"), help="of a run: moving average or last weights; default: ema where kept"
    )
    export.add_argument(
        "--to",
        choices=tuple(LAYOUTS),
        default="released",
        help="names and order of the tensors (default: released)",
    )
    export.add_argument(
        "--fused_qkv", choices=("true", "false"), help="released layout: q, k, v as one tensor (default: false)"
    )
    export.add_argument(
        "--use_liger_rope",
        choices=("true", "false"),
        help="released layout: heads rotate half-split pairs, or interleaved ones as FLUX (default: true)",
    )
    export.add_argument("--dtype", choices=tuple(DTYPES), help="default: as stored")
    export.add_argument("--shard_gib", type=float, help=f"largest file of a folder (default: {SHARD_GIB:g})")
    return parser


def _inspect(options: argparse.Namespace) -> int:
    folders = _checkpoints(options.folder)
    if folders != [options.folder]:
        table = Table("checkpoint", "step", "files", "size", title=escape(str(options.folder)), title_justify="left")
        for folder in folders:
            try:
                manifest = read_manifest(folder)
                table.add_row(folder.name, str(manifest.step), str(len(manifest.files)), _size(_bytes(manifest)))
            except DamagedError as error:
                table.add_row(folder.name, "damaged: " + escape(error.problem.removeprefix(f"{folder}/")))
            except ManifestError as error:
                table.add_row(folder.name, escape(str(error).removeprefix(f"{folder}/")))
        Console().print(table)
        _print_notes(options.folder, folders)
    _print_contents(folders[-1], read_manifest(folders[-1]), list_tensors=options.tensors)
    return 0


def _print_contents(folder: Path, manifest: Manifest, *, list_tensors: bool) -> None:
    groups: dict[str, list[str]] = {}
    for name in manifest.tensors:
        groups.setdefault(name.partition(".")[0], []).append(name)
    print(f"{folder}: step {manifest.step}, recipe {manifest.recipe.get('name')}, format {FORMAT}")
    print(f"world: {_facts(manifest.world)}; versions: {_facts(manifest.versions)}")
    table = Table("group", "tensors", "elements", "dtypes", "size")
    for group, names in groups.items():
        records = [manifest.tensors[name] for name in names]
        elements = sum(record.bytes // record.dtype.itemsize for record in records)
        dtypes = sorted({str(record.dtype).removeprefix("torch.") for record in records})
        size = _size(sum(record.bytes for record in records))
        table.add_row(group, str(len(names)), f"{elements:,}", ", ".join(dtypes), size)
    Console().print(table)
    if list_tensors:
        for name, record in manifest.tensors.items():
            print(f"{name}  {str(record.dtype).removeprefix('torch.')}  {list(record.shape)}  {_size(record.bytes)}")


def _verify(options: argparse.Namespace) -> int:
    folders = _checkpoints(options.folder)
    healthy = True
    for folder in folders:
        problems, summary = _problems(folder)
        if problems and not folder.exists():
            print(f"{folder}: pruned by its run meanwhile")
            continue
        healthy = healthy and not problems
        print("\n".join(problems) or f"{folder}: {summary}, every checksum matches")
    if folders != [options.folder]:
        _print_notes(options.folder, folders)
    return 0 if healthy else 2


def _problems(folder: Path) -> tuple[list[str], str]:
    """What is wrong with a checkpoint, a line each; and its size, in words."""
    try:
        reader = CheckpointReader(folder)
    except DamagedError as error:
        return [error.problem], ""
    except ManifestError as error:
        return [str(error)], ""
    files = reader.manifest.files
    sizes = {file.name: file.bytes for file in files}
    with _progress(folder.name, sum(sizes.values())) as advance:
        finished = 0  # bytes of the file before

        def on_file(name: str) -> None:
            nonlocal finished
            advance(finished)
            finished = sizes[name]

        problems = reader.verify(on_file)
    return problems, f"{len(files)} files, {_size(sum(sizes.values()))}"


def _export(options: argparse.Namespace) -> int:
    check_out(options.out, options.to)
    one_file = options.out.suffix == ".safetensors"
    if options.shard_gib is not None and (one_file or not 0 < options.shard_gib < 2**20):
        remedy = "name a folder" if one_file else "use a number above 0"
        raise UserError(f"--shard_gib {options.shard_gib:g} with --out {options.out}: {remedy}")
    form = {name: getattr(options, name) for name in RELEASED_LAYOUT if getattr(options, name) is not None}
    source = open_parameters(options.source, options.weights)
    export = plan_export(
        source,
        layout=options.to,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        **{name: value == "true" for name, value in form.items()},
    )
    for name in form.keys() - (export.translation.config or {}).keys():
        raise UserError(f"--{name}: {LAYOUTS[export.layout]} of {options.source} knows no such choice; leave it out")
    with _progress(options.out.name, export.bytes) as advance:
        shard_gib = options.shard_gib or SHARD_GIB
        export.write(options.out, shard_bytes=int(shard_gib * 2**30), on_bytes=advance)
    what = f"{len(export.specs)} tensors, {_size(export.bytes)}, {source.title}"
    config = export.translation.class_config
    class_name = f" ({config['_class_name']})" if config else ""
    print(f"{options.out}: {what} in {LAYOUTS[options.to]}{class_name}")
    if assumed := assumptions(source):
        print(assumed)
    if source.promoted and options.dtype is None:
        print(f"of tensors of several dtypes, and now all of the widest: {listed(source.promoted)}")
    if config and config.get("in_channels") != config.get("out_channels"):
        own = config["out_channels"]
        print(
            f"diffusers has no cond_in: x_embedder takes {own} channels of a token, then the "
            f"{config['in_channels'] - own} of its condition, and its bias is the sum of both ({BIASES_FILE} has them)"
        )
    return 0


def _checkpoints(path: Path) -> list[Path]:
    """The published checkpoints that `path` stands for, oldest first. Raises UserError when there is none."""
    if not path.is_dir():
        raise UserError(f"checkpoint {path}: no such folder; name a run or one of its step-N folders")
    if step_of(path) is not None or (path / MANIFEST).is_file():
        return [path]
    folders = step_folders(path)
    if not folders:
        _print_notes(path, [])
        raise UserError(f"checkpoint {path}: holds no finished checkpoint; train it further, or name another folder")
    return folders


def _print_notes(run: Path, folders: list[Path]) -> None:
    """What is worth knowing of a run beside its published checkpoints; nothing of it is an error."""
    for path in sorted(run.glob("step-*.tmp-*")):
        print(f"{path}: unfinished, never read; the run's next save removes it")
    for path in sorted(run.glob("step-*.damaged-*")):
        print(f"{path}: set aside as damaged, never read")
    if not folders:
        return
    try:
        latest = repr((run / "LATEST").read_text(errors="replace").strip()[:80])
    except OSError as error:
        latest = f"nothing ({error.strerror})"
    if latest != repr(folders[-1].name):
        print(f"{run}/LATEST: names {latest}, and the newest checkpoint is {folders[-1].name}")


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on the terminal's error output, where there is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda count: progress.advance(bar, count)


def _bytes(manifest: Manifest) -> int:
    return sum(file.bytes for file in manifest.files)


def _size(count: int) -> str:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.2f} {unit}"
    return f"{count} bytes"


def _facts(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
