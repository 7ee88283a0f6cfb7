"""The demo, rehearsed with a few steps a part: every command runs, stopping and starting again changes nothing."""

import importlib.util
import json
from pathlib import Path

import pytest

from opensora_fast import cli
from opensora_fast.profiling.demo import STAGES, summarise
from opensora_fast.train.metrics import read_metrics

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("skvideo") is None, reason="scikit-video (extra: demo) is not installed"
)


def test_demo_leaves_a_report_a_summary_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--out", str(tmp_path), "--steps", "12"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    for stage in STAGES:
        assert summary[stage].keys() == {"first10", "last50", "heldout_start", "heldout_end"}
    assert summary["psnr_baseline"] > 0
    assert all(Path(sample).stat().st_size > 0 for sample in summary["samples"])
    assert (tmp_path / "report.html").stat().st_size > 0
    printed = capsys.readouterr().out
    for line in ("train demo_ae", "train demo_stage3", "sample --checkpoint", "report.html", "next:"):
        assert line in printed

    rows = {stage: read_metrics(tmp_path / stage) for stage in STAGES}
    assert cli.main(["demo", "--out", str(tmp_path), "--steps", "12"]) == 0
    assert {stage: read_metrics(tmp_path / stage) for stage in STAGES} == rows


def test_summary_takes_the_first_ten_and_the_last_fifty_steps(tmp_path: Path) -> None:
    for name in ("ae", *STAGES):
        (tmp_path / name).mkdir()
        rows = [{"kind": "heldout", "step": 0, "loss": 9.0, "psnr": 10.0, "psnr_baseline": 12.0}]
        rows += [{"kind": "step", "step": step, "loss": float(step)} for step in range(1, 101)]
        rows += [{"kind": "heldout", "step": 100, "loss": 4.0, "psnr": 20.0, "psnr_baseline": 12.0}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = summarise(tmp_path, ["a.mp4"], 1.5)
    assert summary["stage2"] == {"first10": 5.5, "last50": 75.5, "heldout_start": 9.0, "heldout_end": 4.0}
    assert (summary["psnr"], summary["psnr_baseline"], summary["seconds"]) == (20.0, 12.0, 1.5)
