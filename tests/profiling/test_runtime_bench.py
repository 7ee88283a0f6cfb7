"""The runtime's benchmarks at a size of seconds: rows are rows, pages show them, bad options are one line."""

from pathlib import Path

import pytest

from opensora_fast import cli
from opensora_fast.profiling import ledger, loader_bench, runtime_report
from opensora_fast.profiling.timing import Timing


def test_checkpoints_are_saved_loaded_and_compared(tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    words = ["--dir", str(tmp_path / "disk"), "--gib", "0.02", "--rounds", "2", "--out", str(rows), "--html", str(page)]
    assert cli.main(["bench", "checkpoint", *words]) == 0
    made = ledger.read([rows])
    timed = {(row["case"], row["provider"]) for row in made if row["status"] == "timed"}
    assert {(case, "ours") for case in ("trainer blocked", "save", "written behind it", "load")} <= timed
    assert {("save", "torch.save"), ("load", "torch.load"), ("load", "torch.distributed.checkpoint")} <= timed
    assert len(runtime_report.claims_of(made)) >= 6
    assert "cold load against torch.load" in page.read_text()
    assert not list((tmp_path / "disk").iterdir())


def test_batches_are_compared_and_the_memory_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_bench, "BUCKETS", {"256px": {5: (1.0, 2)}})
    monkeypatch.setattr(loader_bench, "BATCHES", 2)
    monkeypatch.setattr(loader_bench, "SAMPLE_EVERY", 2)
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    words = ["--workers", "1", "--rounds", "2", "--batches", "20", "--step_seconds", "0.05"]
    assert cli.main(["bench", "loader", *words, "--out", str(rows), "--html", str(page)]) == 0
    ours, plain = ledger.read([rows])
    assert (ours["provider"], plain["provider"]) == ("ours", "plain DataLoader, float32 workers")
    assert len(ours["memory_mib"]) == 10
    assert "<svg" in page.read_text()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["bench", "checkpoint", "--gib", "0"], "--gib 0"),
        (["bench", "checkpoint", "--gib", "1e9"], "GiB are needed"),
        (["bench", "loader", "--workers", "0"], "--workers 0"),
    ],
)
def test_bad_options_are_one_line(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


def test_a_missed_aim_is_told_as_one() -> None:
    claim = runtime_report.Claim(name="rate", value=0.5, aim=0.85, at_most=False, unit="x")
    assert not claim.met
    assert str(claim) == "rate: 0.5 x (aim: at least 0.85 x)"


def test_the_table_compares_with_ours_of_the_same_case() -> None:
    machine = runtime_report.Machine(cpu="a CPU", gpu=None, torch="2", commit=None)
    slow, fast = (Timing(p20=s, p50=s, p80=s, rounds=2) for s in (3.0, 1.5))
    rows = [
        runtime_report.row(machine, "cpu", "checkpoint", "save", "ours", fast, 3_000_000_000),
        runtime_report.row(machine, "cpu", "checkpoint", "save", "torch.save", slow, 3_000_000_000),
    ]
    assert [line[-1] for line in runtime_report.table(rows)] == ["1.00", "2.00"]
    assert [line[4] for line in runtime_report.table(rows)] == ["2", "1"]
