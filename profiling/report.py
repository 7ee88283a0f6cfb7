"""`opensora-fast report DIR`: one self-contained HTML page of the runs, reconstructions and samples in a folder.

DIR/[RUN/]recipe.json, metrics.jsonl                 one section per run, finished or not
DIR/reconstructions/NAME-{original,reconstruction}.mp4
DIR/samples/*.mp4                                    settings as JSON in the file's comment
DIR/summary.json                                     of a demo: its duration and the autoencoder's PSNR
DIR/report.html                                      what is written
"""

from __future__ import annotations

import json
from pathlib import Path

from opensora_fast.arguments import Parser
from opensora_fast.profiling.clips import read_reconstructions, read_samples
from opensora_fast.profiling.machine import this_machine
from opensora_fast.profiling.page import render_page
from opensora_fast.profiling.runs import find_runs


def main(argv: list[str]) -> int:
    """Write the report and print its path. Raises UserError when the folder holds no run or an unreadable clip."""
    parser = Parser(prog="opensora-fast report", description="Write DIR/report.html from the runs in DIR.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a run, or a folder that holds runs")
    print(f"report {write_report(parser.parse_args(argv).folder)}")
    return 0


def write_report(folder: Path) -> Path:
    """Write folder/report.html; returns its path. The same files on the same machine give the same page.

    Raises UserError when neither `folder` nor a direct subfolder is a run, and for a clip that cannot be read.
    """
    summary = folder / "summary.json"
    page = render_page(
        title=folder.resolve().name,
        runs=find_runs(folder),
        summary=json.loads(summary.read_text()) if summary.exists() else {},
        reconstructions=read_reconstructions(folder / "reconstructions"),
        samples=read_samples(folder / "samples"),
        machine=this_machine(),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
