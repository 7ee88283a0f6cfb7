"""bench --aot: every kernel that the presets launch compiles for sm_90 within its budget; what is over it is named."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opensora_fast.errors import UserError
from opensora_fast.kernels import launch
from opensora_fast.profiling import aot
from opensora_fast.profiling.case import SIZES
from opensora_fast.profiling.cases import CASES

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(bool(launch.missing("cuda")), reason=launch.missing("cuda"))


def _compiled(*arguments: str) -> subprocess.CompletedProcess:
    """The command in a process that compiles kernels, which one that interprets them cannot."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "opensora_fast.cli", "bench", "--aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@needs_triton
def test_every_kernel_of_the_presets_is_within_its_budget() -> None:
    done = _compiled()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert ", 0 with spills; 0 lines of what is wrong" in done.stdout
    assert done.stdout.count("forward_kernel") >= 8
    for name in ("attention_triton._forward_kernel", "attention_gluon._forward_kernel", "attention_gluon._backward_k"):
        assert name in done.stdout


@needs_triton
def test_every_kernel_of_the_op_files_is_launched_by_a_case() -> None:
    """A kernel that no case launches would never be compiled here."""
    presets = [case for op in CASES for case in CASES[op](SIZES["full"]) if case.preset]
    launched = {name for case in presets for backend in ("triton", "gluon") for name in _names(case, backend)}
    written = {
        f"{path.stem}.{line.split('(')[0].removeprefix('def ')}"
        for path in (ROOT / "kernels").glob("*.py")
        for before, line in zip(path.read_text().splitlines(), path.read_text().splitlines()[1:], strict=False)
        if before in ("@jit", "@gluon_jit") and line.split("(")[0].endswith("_kernel")
    }
    assert written == launched


def _names(case, backend: str) -> set[str]:
    found = aot.launches(case, backend)
    return {f"{of.kernel.fn.__module__.rsplit('.', 1)[-1]}.{of.kernel.fn.__name__}" for of in found}


def test_kernels_are_found_beside_their_op() -> None:
    assert aot.has_kernels("gelu", "triton")
    assert not aot.has_kernels("gelu", "gluon")
    assert aot.has_kernels("attention", "triton"), "in attention_triton.py"
    assert aot.has_kernels("attention", "gluon"), "in attention_gluon.py"


def test_refuses_where_kernels_are_interpreted(monkeypatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        aot.main(["gelu"])


def _launch(**arguments) -> launch.Launch:
    """A launch as it is recorded; parameters in capitals are constants."""

    def _step_kernel(): ...

    _step_kernel.__module__ = "opensora_fast.kernels.adamw"
    params = [SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in arguments]
    kernel = SimpleNamespace(fn=_step_kernel, params=params, do_not_specialize=["free"])
    return launch.Launch(kernel=kernel, grid=(1,), arguments=arguments, num_warps=4, num_stages=3)


def test_a_launch_tells_types_constants_and_what_divides_by_16() -> None:
    x_ptr, y_ptr = torch.empty(32, dtype=torch.bfloat16), torch.empty(32, device="meta")
    of = _launch(x_ptr=x_ptr, y_ptr=y_ptr, none=None, size=48, odd=7, one=1, long=2**31, lr=0.5, yes=True, BLOCK=64)
    kernel = aot.kernel_of(of)
    assert kernel.name == "adamw._step_kernel"
    assert dict(kernel.types) == {
        "x_ptr": "*bf16",
        "y_ptr": "*fp32",
        "none": "constexpr",
        "size": "i32",
        "odd": "i32",
        "one": "constexpr",
        "long": "i64",
        "lr": "fp32",
        "yes": "i1",
        "BLOCK": "constexpr",
    }
    assert kernel.values == {"none": None, "one": 1, "BLOCK": 64}
    assert [kernel.types[index][0] for index in kernel.divisible] == ["x_ptr", "y_ptr", "size", "long"]
    assert kernel.label == "adamw._step_kernel BLOCK=64 *bf16 *fp32 warps=4 stages=3"

    other = aot.kernel_of(dataclasses.replace(of, arguments=of.arguments | {"x_ptr": x_ptr[1:], "size": 47}))
    assert other.label == kernel.label
    assert other.known == kernel.known - 2
    free = aot.kernel_of(_launch(free=1))
    assert (free.types, free.values) == ((("free", "i32"),), {})
    assert not aot.kernel_of(_launch(free=16)).divisible
    with pytest.raises(TypeError, match="size is 'text'"):
        aot.kernel_of(dataclasses.replace(of, arguments=of.arguments | {"size": "text"}))


def test_a_descriptor_is_told_as_the_compiler_reads_it() -> None:
    x = torch.empty(4, 4, device="meta", dtype=torch.bfloat16)
    plain = SimpleNamespace(base=x, block_shape=[2, 4])
    swizzled = SimpleNamespace(base=x, block_shape=[2, 4], layout=[128, 16])
    kernel = aot.kernel_of(_launch(a=swizzled, b=swizzled, c=plain, x_ptr=x))
    with_layout = "tensordesc<bf16[2, 4],[128, 16]>"
    assert dict(kernel.types) == {"a": with_layout, "b": with_layout, "c": "tensordesc<bf16[2, 4]>", "x_ptr": "*bf16"}
    assert kernel.pointers == "tensordesc<bf16[2, 4]>x3 *bf16"


@pytest.fixture
def assembled():
    kernel = aot.Kernel(
        label="gelu._forward_kernel",
        name="gelu._forward_kernel",
        function=None,
        types=(),
        divisible=(),
        values={},
        constants="",
        pointers="",
        num_warps=4,
        num_stages=3,
    )
    return aot.Assembled(
        kernel=kernel,
        ptxas="12.8.93",
        registers=41,
        spilled=0,
        shared=1024,
        loads={16: 4},
        stores={16: 2},
        instructions={},
    )


def test_a_kernel_is_within_the_budget_that_it_set(assembled) -> None:
    budget = aot.budget_of([assembled])
    assert budget == {"registers": 48, "shared": 1024, "load": 16, "store": 16, "wide": 100}
    found = {"gelu._forward_kernel": [assembled]}
    assert aot.failures(found, {"gelu._forward_kernel": budget}) == []
    [line] = aot.failures(found, {})
    assert "--update-budget" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spilled": 8}, "8 bytes spilled"),
        ({"registers": 49}, "49 registers, the budget is 48"),
        ({"shared": 2048}, "2048 shared"),
        ({"shared": 228 << 10}, "sm_90 has"),
        ({"loads": {8: 8}}, "widest load has 8 bytes"),
        ({"stores": {4: 8}}, "widest store has 4 bytes"),
        ({"loads": {16: 3, 2: 8}}, "% of its bytes"),
    ],
)
def test_what_is_over_the_budget_is_named(assembled, change, words) -> None:
    budget = {assembled.kernel.label: aot.budget_of([assembled])}
    worse = dataclasses.replace(assembled, **change)
    told = aot.failures({assembled.kernel.label: [worse]}, budget)
    assert all(line.startswith("gelu._forward_kernel, ptxas 12.8.93: ") for line in told)
    assert any(words in line for line in told), told


@pytest.mark.parametrize(
    ("requests", "instructions", "words"),
    [
        ({"matrix"}, {"HGMMA": 8}, ""),
        ({"matrix"}, {"HGMMA": 8, "HMMA": 4}, "holds 4 HMMA"),
        ({"matrix"}, {}, "without HGMMA"),
        ({"tma"}, {"UTMALDG": 2}, ""),
        ({"tma"}, {"LDGSTS": 2}, "no UTMALDG"),
    ],
    ids=["products", "old-products", "no-products", "tma", "no-tma"],
)
@pytest.mark.parametrize("asked", ["by the source", "when the budget was set"])
def test_what_a_kernel_is_asked_for_is_done_with_instructions_of_hopper(
    assembled, requests, instructions, words, asked
) -> None:
    as_asked = dataclasses.replace(assembled, requests=frozenset(requests))
    budget = aot.budget_of([as_asked])
    assert all(budget[name] is True for name in requests)
    if asked == "by the source":
        budget = {name: value for name, value in budget.items() if name not in requests}
        now = dataclasses.replace(as_asked, instructions=instructions)
    else:
        now = dataclasses.replace(assembled, instructions=instructions)
    told = aot.failures({"kernel": [now]}, {"kernel": budget})
    assert len(told) == bool(words)
    assert not told or words in told[0]


def test_a_wait_that_ptxas_adds_is_within_the_budget_or_wrong(assembled) -> None:
    waits = dataclasses.replace(assembled, serialised=2)
    [line] = aot.failures({"kernel": [waits]}, {"kernel": aot.budget_of([assembled])})
    assert "ptxas waits 2 times where the source does not, the budget is 0" in line
    assert aot.failures({"kernel": [waits]}, {"kernel": aot.budget_of([waits])}) == []


def test_widths_of_accesses() -> None:
    operations = ["LDG.E.128", "LDGSTS.E.BYPASS.LTC128B.128", "LDG.E.U16", "LDG.E", "STG.E.64.CONSTANT", "LDS.128"]
    assert aot._widths(operations, "LDG", "LDGSTS") == {16: 2, 4: 1, 2: 1}
    assert aot._widths(operations, "STG") == {8: 1}
    assert aot.wide_share({16: 1, 4: 4}) == 0.5
    assert aot.wide_share({}) == 1.0
