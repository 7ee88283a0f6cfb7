"""bench: the rows it writes, the table it prints, and that a wrong op is not timed."""

import dataclasses
import json
from functools import partial

import pytest
import torch

from opensora_fast.errors import UserError
from opensora_fast.kernels import pixel_shuffle
from opensora_fast.profiling import bench
from opensora_fast.profiling.cases import CASES
from opensora_fast.profiling.timing import MIN_ROUNDS, Timing, interleaved


@pytest.fixture
def tiny(monkeypatch):
    """One small case in place of the real ones."""
    shapes = {"main": (1, 8, 2, 4, 4), "x": (1, 4, 2, 8, 8)}
    cost = partial(pixel_shuffle.cost, *shapes.values(), torch.bfloat16)
    case = dataclasses.replace(CASES["pixel_shuffle"][0], shapes=shapes, cost=cost)
    monkeypatch.setattr(bench, "CASES", {"pixel_shuffle": [case]})
    return case


def test_appends_one_row_per_provider_and_mode(tiny, tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    arguments = ["pixel_shuffle", "--device", "cpu", "--seconds", "0", "--out", str(out)]
    assert bench.main(arguments) == 0
    assert bench.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    first, second = rows[:6], rows[6:]
    backend = tiny.backend("cpu")[0]
    expected = [(mode, name) for mode in ("forward", "backward") for name in (backend, "copy", "eager")]
    assert [(row["mode"], row["provider"]) for row in first] == expected
    assert [(row["mode"], row["provider"]) for row in second] == expected
    for row in rows:
        assert row["bytes"] == tiny.cost(row["mode"]).bytes
        assert row["p20"] <= row["p50"] <= row["p80"]
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["p50"])
    assert "op/copy" in capsys.readouterr().out


def test_does_not_time_a_wrong_op(tiny, monkeypatch):
    wrong = dataclasses.replace(tiny, function=lambda main, x: main + 1)
    monkeypatch.setattr(bench, "CASES", {"pixel_shuffle": [wrong]})
    with pytest.raises(UserError, match="differs from its eager form"):
        bench.main(["--device", "cpu"])


@pytest.mark.parametrize(
    ("arguments", "named"), [(["nothing"], "'nothing'"), (["--device", "tpu"], "tpu"), (["--dtype", "int8"], "int8")]
)
def test_names_the_argument_that_means_nothing(arguments, named):
    with pytest.raises(UserError, match=named):
        bench.main(arguments)


def test_every_case_knows_its_cost_and_backend():
    for op, cases in CASES.items():
        for case in cases:
            assert case.op == op
            assert case.cost("forward").bytes > case.cost("backward").bytes > 0
            assert case.backend("cpu")[1]


def test_rounds_are_interleaved():
    calls = []
    functions = {name: partial(calls.append, name) for name in "ab"}
    timings = interleaved(functions, torch.device("cpu"), seconds=0)
    assert calls == ["a", "b"] * (2 + MIN_ROUNDS)
    assert {timing.rounds for timing in timings.values()} == {MIN_ROUNDS}


def test_percentiles():
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Timing(p20=2.0, p50=3.5, p80=5.0, rounds=6)
