"""What the README tells people to type works, and the names that it shows exist."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from opensora_fast.config import MMDIT_PRESETS
from opensora_fast.profiling import context_timeline, ledger, runtime_report, sample_bench
from opensora_fast.profiling.block import SHAPES, table
from opensora_fast.profiling.sample_cases import SampleCase

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_first_steps_run_as_written(tmp_path: Path) -> None:
    [block] = re.findall(r"<!-- run by tests/test_readme.py -->\n```bash\n(.*?)```", README, flags=re.S)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in block.splitlines():
        done = subprocess.run(shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs" / "rabbit.mp4").stat().st_size > 0
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 0


def test_every_name_of_the_python_example_exists() -> None:
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    assert hasattr(import_module(str(node.module)), alias.name), f"{node.module}.{alias.name}"


def test_every_make_target_that_is_named_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    named = {
        name
        for text in (README, (ROOT / "CONTRIBUTING.md").read_text())
        for name in re.findall(r"make ([a-z-]+)", text)
    }
    assert named <= set(targets)


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target


@pytest.mark.parametrize(("dtype", "row"), [("bfloat16", "forward, bfloat16"), ("float32", "the same, float32")])
def test_figures_are_rows_of_the_ledger(dtype: str, row: str) -> None:
    wanted = {
        "case": "space_to_channel_mean_add 1x2x2",
        "mode": "forward",
        "dtype": dtype,
        "layout": "contiguous_format",
    }
    seconds, device = {}, ""
    for path in (ROOT / "profiling" / "results").glob("cpu-*.jsonl"):
        for entry in map(json.loads, path.read_text().splitlines()):
            if all(entry[key] == value for key, value in wanted.items()):
                seconds[entry["provider"]], device = entry["p50"], entry["device"]
    [line] = [line for line in README.splitlines() if line.startswith("|") and row in line]
    figures = re.search(r"([\d.]+) ms: ([\d.]+) x as fast as eager PyTorch, ([\d.]+) x a plain copy", line)
    assert figures is not None
    assert figures[1] == f"{1e3 * seconds['host']:.1f}"
    assert float(figures[2]) == pytest.approx(seconds["eager"] / seconds["host"], abs=0.5)
    assert float(figures[3]) == pytest.approx(seconds["host"] / seconds["copy"], abs=0.05)
    assert device in line


@pytest.mark.parametrize("op", ["checkpoint", "loader"])
def test_the_table_of_the_runtime_is_in_the_ledger(op: str) -> None:
    rows = [row for row in ledger.read(sorted((ROOT / "profiling" / "results").glob("cpu-*.jsonl"))) if row["op"] == op]
    newest = {row["case"]: row for row in rows if row["provider"] == "ours"}
    for claim in runtime_report.claims_of(list(newest.values())):
        assert f"| {' | '.join(claim.row())} |" in README
    for row in newest.values():
        assert row["device"] in README


def test_the_table_of_blocks_is_what_is_counted() -> None:
    (shape, *_) = SHAPES.values()
    for row in table(MMDIT_PRESETS["open-sora-v2"], shape):
        assert f"| {' | '.join(row)} |" in README


def test_the_table_of_sequences_on_several_ranks_is_what_is_modelled() -> None:
    for name, shape in context_timeline.SHAPES.items():
        double = [view for view in context_timeline.views(shape) if view.kind == "double"]
        for scheme in context_timeline.SCHEMES:
            timelines = [view.timelines[scheme] for view in double]
            sums = [
                sum(getattr(of, figure) for of in timelines) * 1e3 for figure in ("total_s", "exposed_s", "hidden_s")
            ]
            row = [name.split(":")[0], scheme, *(f"{ms:.2f} ms" for ms in sums)]
            assert f"| {' | '.join(row)} |" in README


def test_the_table_of_sampling_is_what_is_modelled() -> None:
    for resolution in sample_bench.RESOLUTIONS:
        for gpus in sample_bench.GPUS:
            case = SampleCase(model="open-sora-v2", resolution=resolution, frames=129, steps=50, gpus=gpus)
            [[_, kind, *figures, _]] = sample_bench.table([sample_bench.modelled_result(case)])
            assert kind == "modelled"
            assert f"| {resolution}, {gpus} GPU{'s' * (gpus > 1)} | {' | '.join(figures)} |" in README
