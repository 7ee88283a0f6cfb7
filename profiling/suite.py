"""`make gpu-suite OUT=DIR [COMMIT=...]`: everything that a bare GPU machine can tell in eight minutes, in one command.

Needs this checkout, a Python with torch and pytest, and nothing else: no network, no git, no `make setup`. Every part
is a process of its own with its own time limit and leaves its rows and its output when it ends; a crash of one does not
stop the next. In this order, the most valuable first:

    build      pip install -e . with the Python that runs this, where it is not installed yet
    doctor     versions, GPU, backends
    test OP    the op's tests on the GPU, all ops at a time
    time OP    bench, which checks every result once more; red rows for an op with a test that failed
    yardstick  copy and launch ceilings by CuPy, and native ops on CuPy's arrays
    sanitize   compute-sanitizer over the tests of the CUDA kernels
    runtime    the runtime's tests on the GPU; saving and loading a state that lives there
    sample     tests of streamed weights on the GPU; seconds of a video by phase
    compile    the rows of torch.compile
    report     the table and the picture

OUT holds rows.jsonl, runtime.jsonl, sample.jsonl, summary.json, summary.txt, doctor.json, report.html and log.txt. The
exit code is 1 when anything was red. `--device cpu` is the dry run: the same parts on the CPU, with tiny shapes and few
tests.

Standard library only, so that this process survives whatever is wrong with torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from opensora_fast.profiling.commit import PROJECT, VARIABLE, commit

# Every op that bench has cases of, by how much of a step depends on it.
OPS = (
    "gated_residual",
    "modulated_norm",
    "qk_norm_rope",
    "attention",
    "gelu",
    "gated_linear",
    "adamw",
    "rms_norm_act",
    "pixel_shuffle",
    "flow_mix",
    "lse_merge",
)
PROVIDERS = "ours,eager,liger,quack,cudnn,fused,flash,triton,gluon"  # torch.compile is slow to start, and comes last
CUDA_OPS = ("pixel_shuffle", "adamw")  # with a CUDA kernel of ours, which compute-sanitizer watches
RUNTIME_TESTS = (
    "tests/opensora_fast/test_host_memory.py",
    "tests/train/test_staging.py",
    "tests/train/test_checkpoint.py",
    "tests/opensora_fast/test_checkpoint_reader.py",
)
SAMPLE_TESTS = (
    "tests/opensora_fast/test_streamed_loading.py",
    "tests/opensora_fast/test_block_streaming.py",
    "tests/opensora_fast/test_memory_plan.py",
    "tests/opensora_fast/test_hunyuan_vae.py",
)
# Resolution -> timed steps of each kind and seconds, of a process each: at 768px a pass takes 7 s by the model.
SAMPLES = {"256px": (2, 120), "768px": (1, 240)}
PARTS = ("build", "doctor", "test", "time", "yardstick", "sanitize", "runtime", "sample", "compile", "report")
# Seconds a process.
LIMITS = {
    "build": 200,
    "doctor": 60,
    "test": 150,
    "time": 75,
    "yardstick": 40,
    "sanitize": 60,
    "runtime": 90,
    "sample": 120,
    "compile": 200,
    "report": 40,
}
LEAST_SECONDS = 5  # nothing is started for less
VIEW = PROJECT / ".typecheck"  # the package as an import root, where nothing is installed
NAMES = (
    "rows.jsonl",
    "runtime.jsonl",
    "sample.jsonl",
    "summary.json",
    "summary.txt",
    "doctor.json",
    "report.html",
    "log.txt",
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a part ended. Status: ok, red (wrong or crashed), unfinished (its time was up), skipped (for a reason)."""

    part: str
    status: str
    seconds: float = 0.0
    words: str = ""


@dataclass(kw_only=True)
class Suite:
    """Where things go, how long there is, and what has happened so far."""

    out: Path
    device: str
    deadline: float  # of time.monotonic()
    environment: dict[str, str]
    results: list[Result] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    @property
    def rows(self) -> Path:
        return self.out / "rows.jsonl"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, part: str, command: Sequence[str], *, limit: float, output: Path | None = None) -> Result:
        """Run one process and keep its output, in the log and, where it ends well, in `output`; never raises."""
        limit = min(limit, self.left())
        if limit < LEAST_SECONDS:
            return Result(part=part, status="unfinished", words="there was no time left")
        begin = time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as captured:
            code = self._wait(command, limit, captured)
            captured.seek(0)
            text = captured.read()
        seconds = round(time.monotonic() - begin, 1)
        with open(self.out / "log.txt", "a") as log:
            log.write(f"\n===== {part}: exit code {code}, {seconds} s: {' '.join(command)}\n{text}")
        if code == 0 and output is not None:
            output.write_text(text)
            return Result(part=part, status="ok", seconds=seconds, words=f"in {output.name}")
        last = ([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1][:160]
        if code is None:
            return Result(part=part, status="unfinished", seconds=seconds, words=f"stopped after {limit:.0f} s: {last}")
        if code < 0:
            last = f"died of {signal.Signals(-code).name}: {last}"
        return Result(part=part, status="red" if code else "ok", seconds=seconds, words=last)

    def _wait(self, command: Sequence[str], limit: float, captured) -> int | None:
        """Exit code, None when the time was up; a process that cannot start has 127."""
        try:
            process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=captured,
                stderr=subprocess.STDOUT,
                process_group=0,  # to be stopped with its children, and to end with this session
            )
        except OSError as error:
            captured.write(str(error))
            return 127
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def add(self, result: Result) -> Result:
        """Take note of a result and write the summary anew, so that it is there whatever happens next."""
        self.results.append(result)
        print(line_of(result), flush=True)
        self.summarise()
        return result

    def summarise(self) -> None:
        told = {
            "commit": self.environment.get(VARIABLE),
            "device": self.device,
            "red": self.red(),
            "parts": [asdict(result) for result in self.results],
        }
        written = self.out / "summary.json.part"
        written.write_text(json.dumps(told, indent=2) + "\n")
        written.replace(self.out / "summary.json")
        lines = [f"commit {told['commit']}, device {self.device}", *map(line_of, self.results)]
        lines.append(f"red: {', '.join(self.red())}" if self.red() else "nothing is red")
        (self.out / "summary.txt").write_text("\n".join(lines) + "\n")

    def red(self) -> list[str]:
        """Parts that were wrong, and tests or timings that did not come to an end."""
        vital = ("test ", "time ")
        return [
            result.part
            for result in self.results
            if result.status == "red" or (result.status == "unfinished" and result.part.startswith(vital))
        ]


def line_of(result: Result) -> str:
    return f"{result.status:10} {result.seconds:6.1f} s  {result.part:22} {result.words}".rstrip()


# The parts. Each is given the suite and the ops, and adds its results.


def python(*words: str) -> list[str]:
    return [sys.executable, "-P", *words]


def bench(suite: Suite, *words: str) -> list[str]:
    shapes = ["--size", "tiny", "--seconds", "0"] if suite.dry else ["--seconds", "0.1"]
    command = python("-m", "opensora_fast.profiling.bench", "--device", suite.device, "--no-gate")
    return [*command, "--out", str(suite.rows), *shapes, *words]


def build(suite: Suite, ops: Sequence[str]) -> None:
    """Install the checkout, natively built, and from then on import that instead of the view."""
    installed = {name: value for name, value in suite.environment.items() if name != "PYTHONPATH"}
    if paths := [path for path in _paths(suite.environment) if Path(path).resolve() != VIEW]:
        installed["PYTHONPATH"] = os.pathsep.join(paths)
    if not _imports(installed):
        command = python("-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", ".")
        suite.add(suite.run("build", command, limit=LIMITS["build"]))
    else:
        suite.add(Result(part="build", status="skipped", words="this checkout is installed already"))
    if _imports(installed):
        suite.environment = installed
    else:
        suite.environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(VIEW), *_paths(suite.environment)]))


def _paths(environment: dict[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def _imports(environment: dict[str, str]) -> bool:
    """Whether the native module of this checkout can be imported."""
    code = (
        "import pathlib, opensora_fast, opensora_fast._C;"
        f"assert pathlib.Path(opensora_fast.__file__).resolve().parents[1] == pathlib.Path({str(PROJECT)!r})"
    )
    try:
        done = subprocess.run(
            python("-c", code), env=environment, cwd=tempfile.gettempdir(), capture_output=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def doctor(suite: Suite, ops: Sequence[str]) -> None:
    command = python("-m", "opensora_fast.cli", "doctor", "--json")
    suite.add(suite.run("doctor", command, limit=LIMITS["doctor"], output=suite.out / "doctor.json"))


def test(suite: Suite, ops: Sequence[str]) -> None:
    """The tests that need the device; on a CPU the few that are quick, as this is then a rehearsal.

    Those of an op's candidates (`test_attention_triton.py`) are parts of their own: one that is red does not keep the
    others from being timed, and bench holds its results against the eager form.
    """
    wanted = ["-m", "not gpu", "-k", "choose or cost or envelope"] if suite.dry else ["-m", "gpu"]

    def run(name: str) -> Result:
        tests = f"tests/kernels/test_{name}.py"
        if not (PROJECT / tests).exists():
            return Result(part=f"test {name}", status="red", words=f"{tests} is not there")
        command = python("-m", "pytest", "-q", "--maxfail", "5", "-p", "no:cacheprovider", *wanted, tests)
        return suite.run(f"test {name}", command, limit=LIMITS["test"])

    folder = PROJECT / "tests" / "kernels"
    companions = [path.stem.removeprefix("test_") for op in ops for path in sorted(folder.glob(f"test_{op}_*.py"))]
    names = list(ops) if suite.dry else [*ops, *companions]
    with ThreadPoolExecutor(2 if suite.dry else len(OPS)) as pool:
        for result in pool.map(run, names):
            suite.add(result)


def timing(suite: Suite, ops: Sequence[str]) -> None:
    """One op after the other; in a rehearsal two at a time and bfloat16 alone, since its times mean nothing.

    Tests that did not end are no reason not to time: bench holds every result and gradient against the eager form.
    """

    def run(op: str) -> Result:
        red = [result for result in suite.results if result.part == f"test {op}" and result.status == "red"]
        words = [op, *(["--dtype", "bfloat16"] if suite.dry else ["--providers", PROVIDERS])]
        words += ["--red", red[0].words or "its tests are red"] if red else []
        result = suite.run(f"time {op}", bench(suite, *words), limit=LIMITS["time"])
        return replace(result, status="skipped", words="its tests are red") if red else result

    with ThreadPoolExecutor(2 if suite.dry else 1) as pool:
        for result in pool.map(run, ops):
            suite.add(result)


def yardstick(suite: Suite, ops: Sequence[str]) -> None:
    """CuPy's ceilings, and native ops on its arrays."""
    if not suite.dry:
        tests = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/profiling/test_yardstick.py")
        suite.add(suite.run("test yardstick", tests, limit=LIMITS["yardstick"]))
    result = suite.run("yardstick", bench(suite, "--yardstick"), limit=LIMITS["yardstick"])
    unavailable = result.status == "red" and result.words.startswith("error: ")
    suite.add(replace(result, status="skipped") if unavailable else result)


def sanitize(suite: Suite, ops: Sequence[str]) -> None:
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    program = shutil.which("compute-sanitizer", path=places)
    for op in (op for op in CUDA_OPS if op in ops):
        part = f"sanitize {op}"
        if suite.dry or program is None:
            reason = "there is no GPU to watch" if suite.dry else "compute-sanitizer is not here"
            suite.add(Result(part=part, status="skipped", words=reason))
            continue
        tests = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "gpu", f"tests/kernels/test_{op}.py")
        watched = [
            program,
            "--tool",
            "memcheck",
            "--error-exitcode",
            "9",
            *tests,
            "-k",
            "cuda and not triton and not compile",
        ]
        suite.add(suite.run(part, watched, limit=LIMITS["sanitize"]))


def runtime(suite: Suite, ops: Sequence[str]) -> None:
    """Pinned memory, staging and reading; then what a save costs the trainer, beside the bus."""
    if not suite.dry:
        tests = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *RUNTIME_TESTS)
        suite.add(suite.run("test runtime", tests, limit=LIMITS["runtime"]))
    size = ["--gib", "0.02", "--rounds", "2"] if suite.dry else ["--gib", "8", "--rounds", "3"]
    command = python("-m", "opensora_fast.cli", "bench", "checkpoint", "--device", suite.device, *size)
    command += ["--dir", str(suite.out), "--out", str(suite.out / "runtime.jsonl")]
    suite.add(suite.run("time checkpoint", command, limit=LIMITS["runtime"]))


def sampling(suite: Suite, ops: Sequence[str]) -> None:
    """Weights that are streamed, then a video's phases, the short video first; a step or two of each kind are timed."""
    if not suite.dry:
        tests = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *SAMPLE_TESTS)
        suite.add(suite.run("test sample", tests, limit=LIMITS["sample"]))
    tiny = ["--model", "tiny", "--frames", "1", "--steps", "2"] if suite.dry else []
    for resolution, (steps, limit) in ({"64px": (2, 60)} if suite.dry else SAMPLES).items():
        command = python("-m", "opensora_fast.cli", "bench", "sample", "--device", suite.device, *tiny, "--gpus", "1")
        command += ["--resolutions", resolution, "--timed-steps", str(steps), "--out", str(suite.out / "sample.jsonl")]
        suite.add(suite.run(f"time sample {resolution}", command, limit=limit))


def compiled(suite: Suite, ops: Sequence[str]) -> None:
    """torch.compile is slow to start: it comes last and is cut short where time is up; the rows so far are kept."""
    green = [op for op in ops if f"time {op}" not in suite.red()]
    words = ["--providers", "ours,compile"]
    words += ["flow_mix", "--case", "velocity_loss 256px clips", "--dtype", "bfloat16"] if suite.dry else green
    suite.add(suite.run("compile", bench(suite, *words), limit=LIMITS["compile"]))


def report(suite: Suite, ops: Sequence[str]) -> None:
    if not suite.rows.exists():
        suite.add(Result(part="report", status="skipped", words="there are no rows"))
        return
    words = ["--report", str(suite.rows), "--html", str(suite.out / "report.html")]
    command = python("-m", "opensora_fast.profiling.bench", *words)
    suite.deadline = max(suite.deadline, time.monotonic() + LIMITS["report"])  # a few seconds, and what all was for
    suite.add(suite.run("report", command, limit=LIMITS["report"]))


RUN: dict[str, Callable[[Suite, Sequence[str]], None]] = {
    "build": build,
    "doctor": doctor,
    "test": test,
    "time": timing,
    "yardstick": yardstick,
    "sanitize": sanitize,
    "runtime": runtime,
    "sample": sampling,
    "compile": compiled,
    "report": report,
}


# The command.


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def _chosen(text: str | None, known: Sequence[str], option: str, parser: argparse.ArgumentParser) -> list[str]:
    names = list(known) if text is None else text.split(",")
    for name in names:
        if name not in known:
            parser.error(f"{option} {name!r} is not known: choose from {', '.join(known)}")
    return names


def main(argv: Iterable[str] | None = None) -> int:
    """Run the parts; returns 1 when anything was red."""
    parser = argparse.ArgumentParser(prog="make gpu-suite", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, logs and summary")
    parser.add_argument("--commit", help="what the rows name; git's or a hash of the sources by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default %(default)s)")
    parser.add_argument("--ops", help="only these, with commas between them")
    parser.add_argument("--parts", help=f"only these of {','.join(PARTS)}")
    options = parser.parse_args(None if argv is None else list(argv))
    ops = _chosen(options.ops, OPS, "--ops", parser)
    parts = _chosen(options.parts, PARTS, "--parts", parser)

    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (out / name).unlink(missing_ok=True)
    known = options.commit or commit()
    device = options.device or ("cuda" if _has_gpu() else "cpu")
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **({VARIABLE: known} if known else {})}
    if device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    suite = Suite(
        out=out,
        device=device,
        deadline=time.monotonic() + 60 * options.minutes,
        environment=environment,
    )
    print(f"gpu-suite: commit {known}, device {suite.device}, results in {out}", flush=True)
    for part in PARTS:
        if part in parts:
            RUN[part](suite, ops)
    print(f"red: {', '.join(suite.red())}" if suite.red() else "nothing is red")
    return int(bool(suite.red()))


if __name__ == "__main__":
    raise SystemExit(main())
