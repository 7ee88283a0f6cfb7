"""The ledger: what is appended can be read, what is no row is named, and the committed results are rows."""

import json
from pathlib import Path

import pytest

from opensora_fast.errors import UserError
from opensora_fast.profiling import bench_report, ledger

RESULTS = Path(__file__).parents[2] / "profiling" / "results"


def row(**of) -> dict:
    """A timed row of ours, with `of` in place of what it says."""
    base = {"schema": 2, "op": "gelu", "case": "gelu_tanh", "provider": "ours", "backend": "triton", "mode": "forward"}
    base |= {"shapes": {"x": [2, 8]}, "dtype": "bfloat16", "device": "GPU (H200)", "time": "2026-11-21T00:00:00+00:00"}
    base |= {"status": "timed", "p20": 1e-3, "p50": 2e-3, "p80": 3e-3, "rounds": 5, "unit": "s", "flops": 400}
    base |= {"bytes": 8_000_000_000, "bytes_per_second": 4e12, "flops_per_second": 2e5, "bound": 1.5e-3}
    return base | {"bound_by": "copy", "share_of_bound": 0.75, "layout": "contiguous_format"} | of


def test_rows_that_were_appended_are_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    ledger.append(path, [row()])
    ledger.append(path, [row(provider="eager"), row(status="red", reason="a test failed")])
    assert [of["provider"] for of in ledger.read([path])] == ["ours", "eager", "ours"]


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    ledger.append(path, [row()])
    with open(path, "a") as file:
        file.write('{"op": "gel')
    assert len(ledger.read([path])) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"op": None}, "op"),
        ({"p50": None}, "p50"),
        ({"p20": 1.0}, "ascend"),
        ({"p50": float("nan")}, "positive"),
        ({"mode": "sideways"}, "sideways"),
        ({"status": "fine"}, "fine"),
        ({"status": "red"}, "reason"),
    ],
)
def test_what_is_no_row_is_named(tmp_path: Path, change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ledger.append(tmp_path / "rows.jsonl", [row(**change)])
    assert not (tmp_path / "rows.jsonl").exists()
    (tmp_path / "rows.jsonl").write_text(json.dumps(row(**change)) + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:1 .*{named}"):
        ledger.read([tmp_path / "rows.jsonl"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        ledger.read([tmp_path / "gone.jsonl"])


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_the_committed_results_are_rows(path: Path) -> None:
    rows = ledger.read([path])
    assert rows
    groups = bench_report.grouped(rows)
    assert all("ours" in of for of in groups.values())


def test_the_table_compares_rows_of_one_call_alone() -> None:
    other = row(case="another", provider="eager", p20=8e-3, p50=8e-3, p80=8e-3)
    rows = [row(), row(provider="eager", p20=5e-3, p50=5e-3, p80=5e-3), row(provider="copy"), other]
    headings, lines = bench_report.table(rows)
    assert headings[-1] == "x eager"
    assert [line[5:] for line in lines] == [["2", "4 TB/s", "75", "2.50"], ["-", "-", "-", "8 ms"]]


def test_the_newest_row_counts_and_a_red_one_has_no_figures() -> None:
    _, [line] = bench_report.table([row(), row(status="red", reason="a test failed", p50=None), row(provider="eager")])
    assert line[5:] == ["red", "-", "-", "2 ms"]
