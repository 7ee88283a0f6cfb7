"""bench: the rows it writes, the table and the page it makes, what it refuses, and that a wrong op is not timed."""

import dataclasses
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import pytest
import torch

from opensora_fast.errors import UserError
from opensora_fast.kernels import pixel_shuffle
from opensora_fast.profiling import bench, ledger, providers
from opensora_fast.profiling.case import SIZES, Case, Input
from opensora_fast.profiling.cases import CASES
from opensora_fast.profiling.console import plain_table
from opensora_fast.profiling.roofline import picture_lines
from opensora_fast.profiling.svg_chart import line_chart
from opensora_fast.profiling.timing import MIN_ROUNDS, Timing, interleaved

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(monkeypatch) -> Case:
    """One small case in place of the real ones."""
    shapes = {"h": (1, 8, 2, 4, 4), "x": (1, 4, 2, 8, 8)}
    case = dataclasses.replace(
        CASES["pixel_shuffle"](SIZES["tiny"])[0],
        layout="contiguous_format",
        inputs={name: Input(shape=shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        cost=partial(pixel_shuffle.cost, *shapes.values(), torch.bfloat16),
    )
    monkeypatch.setattr(bench, "CASES", {"pixel_shuffle": lambda size: [case]})
    return case


def _run(*arguments: str) -> int:
    return bench.main(["--device", "cpu", "--seconds", "0", *arguments])


def test_appends_one_row_per_provider_and_mode(tiny, tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    for _ in range(2):
        assert _run("pixel_shuffle", "--providers", "ours,eager", "--out", str(out)) == 0
    rows = ledger.read([out])
    assert len(rows) == 12
    expected = [(mode, name) for mode in ("forward", "backward") for name in ("ours", "copy", "eager")]
    for part in (rows[:6], rows[6:]):
        assert [(row["mode"], row["provider"]) for row in part] == expected
    for row in rows:
        assert row["bytes"] == tiny.cost(row["mode"]).bytes
        assert row["p20"] <= row["p50"] <= row["p80"]
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["p50"])
        assert row["share_of_bound"] == pytest.approx(row["bound"] / row["p50"])
        assert {"commit", "torch", "triton", "driver", "size"} <= row.keys()
    printed = capsys.readouterr().out
    assert "% of bound" in printed
    assert "6 rows timed, 0 of ours red" in printed


def test_does_not_time_a_wrong_op(tiny, monkeypatch, tmp_path, capsys):
    wrong = dataclasses.replace(tiny, function=lambda h, x: h + 0 * x.mean())
    monkeypatch.setattr(bench, "CASES", {"pixel_shuffle": lambda size: [wrong]})
    assert _run("--providers", "ours,eager", "--out", str(tmp_path / "rows.jsonl")) == 1
    rows = ledger.read([tmp_path / "rows.jsonl"])
    assert [row["status"] for row in rows if row["provider"] == "ours"] == ["red", "red"]
    assert all("differs from the eager form" in row["reason"] for row in rows if row["status"] == "red")
    assert {row["provider"] for row in rows if row["status"] == "timed"} == {"eager", "copy"}
    assert "red: pixel_unshuffle_mean_add" in capsys.readouterr().out


def test_does_not_time_an_op_with_a_wrong_gradient(tiny):
    def wrong(h, x):
        return tiny.composite(h, x.detach()) + 0 * x.sum()

    judge = bench.Judge(tiny, tiny.make("cpu"))
    assert judge.wrong(tiny.function) == ""
    assert "gradient of x" in judge.wrong(wrong)


def test_a_red_gate_is_a_red_row(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "gate", lambda op, device: f"{op}: 1 failed")
    assert _run("--gate", "--out", str(tmp_path / "rows.jsonl")) == 1
    rows = ledger.read([tmp_path / "rows.jsonl"])
    assert [(row["status"], row["reason"]) for row in rows] == [("red", "pixel_shuffle: 1 failed")] * 2


def test_the_gate_runs_the_tests_of_the_op(monkeypatch, tmp_path):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    monkeypatch.setattr(bench, "PROJECT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (folder / "test_good.py").write_text("def test_it(): pass\n")
    (folder / "test_bad.py").write_text("def test_it(): assert False, 'off by one'\n")
    (folder / "test_elsewhere.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass\n")
    assert bench.gate("good", "cpu") == ""
    assert "off by one" in bench.gate("bad", "cpu")
    assert "no test that runs on cpu" in bench.gate("elsewhere", "cpu")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing"], "'nothing'"),
        (["--device", "tpu"], "tpu"),
        (["--dtype", "int8"], "int8"),
        (["--case", "sideways"], "sideways"),
        (["--providers", "ours,theirs"], "theirs"),
    ],
)
def test_names_the_argument_that_means_nothing(tiny, arguments, named):
    with pytest.raises(UserError, match=named):
        bench.main(arguments)


def test_a_provider_that_is_not_installed_is_told_with_its_reason(tiny, monkeypatch, capsys):
    real = providers.importlib.util.find_spec
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None if "liger" in name else real(name))
    assert _run("--providers", "ours,liger") == 0
    assert "not timed: liger: liger_kernel is not installed: pip install liger-kernel" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of them"):
        _run("--providers", "liger")


def test_a_provider_that_fails_does_not_stop_the_others(tiny, monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("no such kernel\nand much more")

    case = dataclasses.replace(tiny, baselines={"fused": broken})
    monkeypatch.setattr(bench, "CASES", {"pixel_shuffle": lambda size: [case]})
    assert _run("--providers", "fused,ours", "--out", str(tmp_path / "rows.jsonl")) == 0
    rows = ledger.read([tmp_path / "rows.jsonl"])
    failed = [row["reason"] for row in rows if row["status"] == "failed"]
    assert failed == ["RuntimeError: no such kernel"] * 2
    assert sum(row["provider"] == "ours" for row in rows) == 2


def test_a_candidate_runs_forward_and_backward_on_its_backend(tiny, monkeypatch, tmp_path):
    ran = set()

    def watched(h, x):
        out = tiny.function(h=h, x=x)
        ran.add(("forward", tiny.backend("cpu")[0]))
        if out.requires_grad:
            out.register_hook(lambda grad: ran.add(("backward", tiny.backend("cpu")[0])))
        return out

    case = dataclasses.replace(tiny, function=watched, candidates=("triton", "gluon"))
    monkeypatch.setattr(bench, "CASES", {"pixel_shuffle": lambda size: [case]})
    assert _run("--providers", "ours,triton,gluon", "--out", str(tmp_path / "rows.jsonl")) == 0
    rows = ledger.read([tmp_path / "rows.jsonl"])
    chosen = tiny.backend("cpu")[0]
    assert chosen != "triton"
    assert {row["provider"] for row in rows if row["status"] == "timed"} == {"ours", "triton", "copy"}
    (reason,) = {row["reason"] for row in rows if row["provider"] == "gluon" and row["status"] == "failed"}
    assert "pixel_shuffle:gluon does not exist for these tensors" in reason
    assert ran == {(mode, name) for mode in ("forward", "backward") for name in (chosen, "triton")}


def test_the_page_stands_alone_and_escapes(tiny, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    _run("--out", str(out))
    with open(out) as file:
        row = json.loads(file.readline())
    ledger.append(out, [row | {"case": "<script>alert(1)</script>", "bound_by": "product"}])
    assert bench.main(["--report", str(out)]) == 0
    page = (tmp_path / "rows.html").read_text()
    assert f"report {tmp_path / 'rows.html'}" in capsys.readouterr().out
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<svg") == 1
    assert not re.search(r"https?:|url\(|@import|<script|src=", page)


def test_the_roof_lies_above_every_dot(tiny, tmp_path):
    out = tmp_path / "rows.jsonl"
    _run("--out", str(out))
    rows = ledger.read([out])
    product = next(row for row in rows if row["provider"] == "ours")
    share = {"bound_by": "product", "bound": product["p50"] / 2, "flops": 1000 * product["bytes"]}
    rows.append(product | share | {"flops_per_second": 1000 * product["bytes_per_second"]})
    for measured in (rows[:-1], rows):
        roof, *dots = picture_lines(measured)
        assert roof.style == "roof"
        (left, lowest), (ridge, highest), (right, flat) = roof.points
        assert left <= ridge <= right
        assert lowest <= highest == pytest.approx(flat)
        assert {line.name for line in dots} == {"eager PyTorch", "forward", "backward"}
        copy = max(row["bytes_per_second"] for row in measured if row["provider"] == "copy")
        assert lowest == pytest.approx(left * copy)
    svg = ElementTree.fromstring(line_chart(picture_lines(rows), x_label="x", y_label="y", height=300, log_log=True))
    places = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in svg.iter("circle")]
    assert len(places) == 5
    assert all(0 <= x <= 460 and 0 <= y <= 300 for x, y in places)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_every_case_knows_its_shapes_cost_and_backend(op, size):
    cases = CASES[op](SIZES[size])
    for case in cases:
        assert case.op == op
        assert all(case.cost(mode).bytes > 0 < case.cost(mode).flops for mode in case.modes)
        assert case.backend("cpu")[1]
        assert any(case.preset for case in cases)
        assert any(case.timed for case in cases)
    keys = [(case.name, case.dtype, case.layout, str(case.shapes)) for case in cases]
    assert len(set(keys)) == len(keys), "rows of different cases could not be told apart"


@pytest.mark.parametrize("op", CASES)
def test_every_op_agrees_with_its_eager_form(op):
    """One small case of each function, through the whole command but the clock."""
    cases = {case.name.split(" ")[0]: case for case in CASES[op](SIZES["tiny"]) if case.dtype == torch.bfloat16}
    assert cases
    for case in cases.values():
        assert bench.Judge(case, case.make("cpu")).wrong(case.function) == "", case.name


def test_inputs_are_random_and_never_zero():
    for op in CASES:
        case = CASES[op](SIZES["tiny"])[0]
        for name, tensor in case.make("cpu").items():
            assert tensor.shape == case.inputs[name].shape
            if tensor.numel() > 2:
                assert tensor.detach().float().std() > 0, (op, name)
        assert all(torch.equal(a, b) for a, b in zip(case.make("cpu").values(), case.make("cpu").values(), strict=True))


def test_full_shapes_are_those_of_the_released_recipes():
    from opensora_fast.profiling.cases_transformer import sequences

    assert [(of.batch, of.all) for of in sequences(SIZES["full"])] == [(3, 8960), (45, 768), (1, 19136)]


def test_works_without_what_a_bare_gpu_machine_lacks(tmp_path):
    """No rich, no tyro, no PyAV: bench and doctor print plain text and say so."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('rich', 'rich.console', 'rich.table', 'tyro', 'av')));"
        "from opensora_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["bench", "flow_mix", "--device", "cpu", "--size", "tiny", "--seconds", "0", "--dtype", "bfloat16"]
    for arguments in (words, ["doctor"]):
        done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "rich is not installed: plain" in done.stdout


def test_plain_tables_align():
    table = plain_table(["name", "ms"], [["a", "1.25"], ["long", "3"]], title="t", left=("name",))
    assert table.splitlines()[1:] == ["name    ms", "a     1.25", "long     3"]


def test_rounds_are_interleaved():
    calls = []
    functions = {name: partial(calls.append, name) for name in "ab"}
    timings = interleaved(functions, torch.device("cpu"), seconds=0)
    assert calls == ["a", "b"] * (2 + MIN_ROUNDS)
    assert {timing.rounds for timing in timings.values()} == {MIN_ROUNDS}


def test_percentiles():
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Timing(p20=2.0, p50=3.5, p80=5.0, rounds=6)
