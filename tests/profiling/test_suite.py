"""The GPU suite: a dry run here ends green, and crashes, red tests and lost time are told and survived."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opensora_fast.profiling import commit as commit_module
from opensora_fast.profiling import ledger, suite
from opensora_fast.profiling.cases import CASES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rehearsal(tmp_path: Path) -> suite.Suite:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return suite.Suite(out=tmp_path, device="cpu", deadline=time.monotonic() + 100, environment=environment)


def _python(code: str) -> list[str]:
    return [sys.executable, "-P", "-c", code]


def test_a_short_rehearsal_of_every_part_without_an_install(tmp_path: Path) -> None:
    """As `make gpu-suite` starts it: from the view of the package, with the standard library alone."""
    command = [sys.executable, "-P", "-m", "opensora_fast.profiling.suite", "--out", str(tmp_path / "out")]
    command += ["--device", "cpu", "--ops", "flow_mix", "--commit", "abc123", "--minutes", "2"]
    command += ["--parts", "build,doctor,test,time,yardstick,sanitize,runtime,sample,report"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typecheck")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "log.txt").read_text()
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == set(suite.NAMES)
    told = json.loads((out / "summary.json").read_text())
    assert told["commit"] == "abc123"
    assert told["red"] == []
    parts = {part["part"]: part["status"] for part in told["parts"]}
    for part in ("doctor", "test flow_mix", "time flow_mix", "time sample 64px", "report"):
        assert parts[part] == "ok"
    assert parts["yardstick"] == "skipped"
    rows = ledger.read([out / "rows.jsonl"])
    assert {row["commit"] for row in rows} == {"abc123"}
    assert {"ours", "eager", "copy"} <= {row["provider"] for row in rows}
    assert "nothing is red" in (out / "summary.txt").read_text()
    assert "ops" in json.loads((out / "doctor.json").read_text())


def test_knows_the_ops_that_bench_has_cases_of() -> None:
    assert set(suite.OPS) == set(CASES)
    assert list(suite.RUN) == list(suite.PARTS) == list(suite.LIMITS)


def test_starts_without_torch() -> None:
    code = "import sys, opensora_fast.profiling.suite; sys.exit('torch' in sys.modules)"
    subprocess.run(_python(code), check=True)


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("print('fine')", "ok", "fine"),
        ("print('wrong'); raise SystemExit(3)", "red", "wrong"),
        ("import os; print('begun', flush=True); os.abort()", "red", "died of SIGABRT: begun"),
    ],
)
def test_how_a_part_ends_is_told(rehearsal, code, status, words) -> None:
    result = rehearsal.run("part", _python(code), limit=60)
    assert (result.status, result.words) == (status, words)
    assert code in (rehearsal.out / "log.txt").read_text()


def test_a_part_that_takes_too_long_is_stopped_with_its_children(rehearsal, monkeypatch) -> None:
    monkeypatch.setattr(suite, "LEAST_SECONDS", 1)
    code = "import subprocess; print(subprocess.Popen(['sleep', '100']).pid, flush=True); import time; time.sleep(100)"
    result = rehearsal.run("part", _python(code), limit=2)
    assert result.status == "unfinished"
    assert result.words.startswith("stopped after 2 s: ")
    child = int(result.words.split()[-1])
    for _ in range(100):
        if not _runs(child):
            break
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    """Whether it is there and more than an entry that nobody has collected."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_no_part_starts_when_the_time_is_up(rehearsal) -> None:
    rehearsal.deadline = time.monotonic() + 4
    assert rehearsal.run("part", _python("print()"), limit=60).status == "unfinished"


def test_a_program_that_is_not_there_is_red(rehearsal) -> None:
    assert rehearsal.run("part", ["/nowhere/program"], limit=10).status == "red"


def test_an_op_whose_tests_are_red_is_not_timed(rehearsal) -> None:
    rehearsal.add(suite.Result(part="test flow_mix", status="red", words="1 failed"))
    suite.timing(rehearsal, ["flow_mix"])
    assert [result.status for result in rehearsal.results] == ["red", "skipped"]
    assert rehearsal.red() == ["test flow_mix"]
    rows = ledger.read([rehearsal.rows])
    assert {(row["status"], row["reason"]) for row in rows} == {("red", "1 failed")}
    assert json.loads((rehearsal.out / "summary.json").read_text())["red"] == ["test flow_mix"]


def test_the_tests_of_candidates_are_parts_of_their_own(rehearsal, monkeypatch) -> None:
    monkeypatch.setattr(suite.Suite, "run", lambda self, part, command, **of: suite.Result(part=part, status="ok"))
    rehearsal.device = "cuda"
    suite.test(rehearsal, ["gelu", "attention"])
    parts = [result.part for result in rehearsal.results]
    assert parts[:2] == ["test gelu", "test attention"]
    assert "test attention_triton" in parts


def test_short_videos_come_first_and_long_ones_have_time_of_their_own(rehearsal, monkeypatch) -> None:
    """By the model 768px takes half a minute of steps and as long to decode, and random weights have to be made."""
    started = []

    def run(self, part, command, *, limit):
        started.append((part, limit, " ".join(command)))
        return suite.Result(part=part, status="ok")

    monkeypatch.setattr(suite.Suite, "run", run)
    rehearsal.device = "cuda"
    suite.sampling(rehearsal, [])
    (_, _, _), (short, _, few), (long, limit, one) = started
    assert (short, long) == ("time sample 256px", "time sample 768px")
    assert "--resolutions 256px --timed-steps 2 " in few
    assert "--resolutions 768px --timed-steps 1 " in one
    assert limit == 240


def test_an_unfinished_test_is_red_and_an_unfinished_extra_is_not(rehearsal) -> None:
    rehearsal.add(suite.Result(part="compile", status="unfinished"))
    rehearsal.add(suite.Result(part="sanitize adamw", status="unfinished"))
    assert rehearsal.red() == []
    rehearsal.add(suite.Result(part="test gelu", status="unfinished"))
    assert rehearsal.red() == ["test gelu"]


@pytest.mark.parametrize(("option", "value"), [("--ops", "gelu,nothing"), ("--parts", "nothing")])
def test_names_what_it_does_not_know(tmp_path: Path, option: str, value: str, capsys) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--out", str(tmp_path), option, value])
    assert "'nothing' is not known" in capsys.readouterr().err


def test_commit_is_what_is_said_then_git_then_the_sources(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv(commit_module.VARIABLE, "said")
    assert commit_module.commit() == "said"
    monkeypatch.delenv(commit_module.VARIABLE)
    monkeypatch.setattr(commit_module, "PROJECT", tmp_path)
    assert commit_module.commit() is None
    (tmp_path / "setup.py").write_text("one")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "gelu.py").write_text("one")
    first = commit_module.commit()
    assert first is not None
    assert first.startswith("sources ")
    assert commit_module.commit() == first
    (tmp_path / "kernels" / "gelu.py").write_text("two")
    assert commit_module.commit() != first
