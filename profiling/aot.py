"""`opensora-fast bench --aot`: every Triton and Gluon kernel of the presets, compiled for sm_90 without a driver.

What is launched is learnt by running each case of the benchmark, forward and backward, on meta tensors, and again with
Gluon where its op has Gluon kernels; each distinct kernel (types of its pointers and descriptors, constants, warps,
stages) is then compiled once, for the sizes and strides that Triton knows the least about: with the fewest multiples of
16 among those that the presets give. Its PTX is assembled by Triton's own ptxas and by the newest one found: registers
and spills are both's, how wide global memory is accessed and the instructions that say how a kernel works are read in
the machine code of Triton's own.

`aot_budget.json` holds what each kernel may take. A spill, more registers or shared memory than there, or a narrower
access than there, fails and names the kernel. So does a kernel whose source multiplies matrices, or did when its budget
was set, and whose machine code does it by HMMA instead of Hopper's HGMMA; one for which ptxas waits for products where
the source does not, more often than the budget says; and one that asks for TMA and holds no UTMALDG.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_fast.errors import UserError
from opensora_fast.kernels import backend, launch
from opensora_fast.kernels.launch import Launch
from opensora_fast.profiling.case import SIZES, Case
from opensora_fast.profiling.cases import CASES
from opensora_fast.profiling.console import print_table

BUDGET = Path(__file__).parent / "aot_budget.json"
ARCHITECTURE, GPU_NAME = 90, "sm_90a"
MAX_SHARED = 227 << 10  # bytes that a block of sm_90 can have
REGISTER_STEP = 8  # registers are given to a thread in such steps, so a budget is a multiple of it
WIDEST = 16  # bytes that one thread can load or store at once

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}
# Of these the table tells how many a kernel has: matrix products, special functions, copies and sums of tiles by TMA,
# other bulk and asynchronous copies, barriers in shared memory, exchange between threads, atomics.
INSTRUCTIONS = (
    *("HGMMA", "HMMA", "MUFU", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED", "LDGSTS"),
    *("SYNCS", "SHFL", "WARPSYNC", "BAR", "ATOM", "RED"),
)
DECORATORS = {"triton": "\n@jit\n", "gluon": "\n@gluon_jit\n"}  # backend -> how its kernels are marked

# What a source asks for -> how it reads in Triton's intermediate code, before the compiler has chosen instructions.
REQUESTS = {
    "matrix": ("tt.dot ", "ttng.warp_group_dot "),
    "tma": ("tt.descriptor_load ", "ttng.async_tma_copy_global_to_local "),
}


# What is launched.


class _Bodies(TorchDispatchMode):
    """Runs the bodies of our ops on meta tensors, where PyTorch would only ask for shapes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        body = OPDEFS.get(function.name()) if function.namespace == "opensora_fast" else None
        if body is None:
            return function(*args, **kwargs or {})
        with self:
            return body._init_fn(*args, **kwargs or {})


def launches(case: Case, name: str = "triton") -> list[Launch]:
    """The launches of one case with its op on backend `name`, all other ops on Triton; forward and backward.

    None where the op has no such kernels.
    """
    inputs = case.make("meta")
    with launch.recorded() as recorded:
        names = {op: "triton" for op in CASES if has_kernels(op, "triton")}
        if has_kernels(case.op, name):
            names[case.op] = name
        with backend.forced(names), _Bodies():
            out = case.function(**inputs)
            leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
            outputs = [out] if isinstance(out, Tensor) else [tensor for tensor in out if tensor.requires_grad]
            if leaves and outputs:
                gradients = [torch.empty_like(tensor) for tensor in outputs]
                torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    return recorded


def has_kernels(op: str, name: str) -> bool:
    """Whether an op file, or its companion named after the backend, has kernels for that backend."""
    files = (Path(backend.__file__).with_name(f"{stem}.py") for stem in (op, f"{op}_{name}"))
    return any(DECORATORS[name] in file.read_text() for file in files if file.exists())


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One thing to compile. `types` are by parameter; a divisible argument is a multiple of 16."""

    label: str  # what tells it from every other one, whatever its sizes and strides
    name: str  # op.function
    function: Any
    types: tuple[tuple[str, str], ...]
    divisible: tuple[int, ...]
    values: Mapping[str, Any]  # of the parameters whose type is "constexpr"
    constants: str
    pointers: str
    num_warps: int
    num_stages: int

    @property
    def known(self) -> int:
        """How many arguments are known to be multiples of 16, or to be 1."""
        return len(self.divisible) + len(self.values)


def kernel_of(of: Launch) -> Kernel:
    """What Triton would compile for a launch: its arguments' types, what divides by 16, and the constants."""
    types, divisible, values = [], [], {}
    name = f"{of.kernel.fn.__module__.rsplit('.', 1)[-1]}.{of.kernel.fn.__name__}"
    for index, parameter in enumerate(of.kernel.params):
        value = of.arguments[parameter.name]
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and _specialised(of, parameter))
        ):
            kind = "constexpr"
            values[parameter.name] = value
        elif isinstance(value, Tensor):
            kind = f"*{TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(index)
        elif hasattr(value, "block_shape"):
            kind = _descriptor_type(value)
        elif isinstance(value, bool):
            kind = "i1"
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and _specialised(of, parameter):
                divisible.append(index)
        elif isinstance(value, float):
            kind = "fp32"
        else:
            raise TypeError(f"{name}: {parameter.name} is {value!r}, which no kernel can take")
        types.append((parameter.name, kind))
    written = [parameter.name for parameter in of.kernel.params if parameter.is_constexpr]
    constants = " ".join(f"{parameter}={values[parameter]}" for parameter in written)
    runs = _runs(re.sub(r"\],.*", "]>", kind) for _, kind in types)
    pointers = " ".join(f"{kind}x{count}" if count > 1 else kind for kind, count in runs)
    return Kernel(
        label=f"{name} {constants} {pointers} warps={of.num_warps} stages={of.num_stages}",
        name=name,
        function=of.kernel,
        types=tuple(types),
        divisible=tuple(divisible),
        values=values,
        constants=constants,
        pointers=pointers,
        num_warps=of.num_warps,
        num_stages=of.num_stages,
    )


def _specialised(of: Launch, parameter: Any) -> bool:
    """Whether Triton compiles anew for an integer that is 1 or a multiple of 16."""
    return parameter.name not in of.kernel.do_not_specialize


def _descriptor_type(of: Any) -> str:
    """A tensor descriptor as Triton's compiler reads it; Gluon's descriptors also have a layout in shared memory."""
    layout = f",{of.layout!r}" if hasattr(of, "layout") else ""
    return f"tensordesc<{TYPES[of.base.dtype]}{list(of.block_shape)}{layout}>"


def _runs(kinds: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Types of pointers and descriptors in their order, each with how often it comes in a row."""
    last, count = None, 0
    for kind in (kind for kind in kinds if kind.startswith(("*", "tensordesc"))):
        if kind != last and last is not None:
            yield last, count
            count = 0
        last, count = kind, count + 1
    if last is not None:
        yield last, count


def kernels(ops: Sequence[str]) -> list[Kernel]:
    """Every distinct kernel that the ops' cases launch at the presets' sizes."""
    found: dict[str, Kernel] = {}
    for op in ops:
        presets = [case for case in CASES[op](SIZES["full"]) if case.preset]
        for name in DECORATORS:
            for case in presets if has_kernels(op, name) else ():
                for kernel in map(kernel_of, launches(case, name)):
                    if kernel.label not in found or kernel.known < found[kernel.label].known:
                        found[kernel.label] = kernel
    return list(found.values())


# Compiling and reading.


class CompileError(Exception):
    """A kernel that one of the two compilers refuses."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel by Triton, before ptxas."""

    ptx: str
    shared: int
    requests: frozenset[str]  # of REQUESTS


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A kernel by one ptxas. Widths are bytes that a thread accesses at once; shares are of all bytes so accessed."""

    kernel: Kernel
    ptxas: str
    registers: int
    spilled: int  # bytes of stack, spill stores and spill loads
    shared: int
    requests: frozenset[str] = frozenset()
    serialised: int = 0  # places where ptxas waits for a product that the source leaves running
    loads: Mapping[int, int] | None = None  # width -> instructions; None where the machine code was not read
    stores: Mapping[int, int] | None = None
    instructions: Mapping[str, int] | None = None


def find_ptxas() -> dict[str, Path]:
    """Version -> program: Triton's own first, then the newest other one if it is another version."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    places = [shutil.which("ptxas"), *sorted(str(path) for path in Path("/usr/local").glob("cuda*/bin/ptxas"))]
    found = {version: path for path in [own, *map(Path, filter(None, places))] if (version := _version(path))}
    if not found:
        raise UserError("--aot needs a ptxas: Triton's wheel has one, and so has the CUDA toolkit")
    first = next(iter(found))
    newest = max(found, key=lambda version: tuple(map(int, version.split("."))))
    return {version: found[version] for version in dict.fromkeys((first, newest))}


def _version(program: Path) -> str:
    if not program.exists():
        return ""
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", told)
    return found.group(1) if found else ""


def compile_kernel(kernel: Kernel) -> Compiled:
    """By Triton for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    source = (GluonASTSource if kernel.function.is_gluon() else ASTSource)(
        fn=kernel.function,
        signature=dict(kernel.types),
        constexprs={(_position(kernel, name),): value for name, value in kernel.values.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in kernel.divisible},
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)
    except Exception as error:  # whatever a pass of the compiler raises
        last = str(error).strip().splitlines()[-1:]
        raise CompileError(f"does not compile: {type(error).__name__}: {''.join(last)[:300]}") from error
    asked = compiled.asm["ttgir" if kernel.function.is_gluon() else "ttir"]
    return Compiled(
        ptx=compiled.asm["ptx"],
        shared=compiled.metadata.shared,
        requests=frozenset(name for name, words in REQUESTS.items() if any(word in asked for word in words)),
    )


def _position(kernel: Kernel, name: str) -> int:
    return [parameter for parameter, _ in kernel.types].index(name)


def assemble(
    kernel: Kernel, compiled: Compiled, version: str, ptxas: Path, folder: Path, *, disassembled: bool
) -> Assembled:
    """Run one ptxas over the PTX, read its report and, if `disassembled`, its machine code."""
    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(compiled.ptx)
    command = [str(ptxas), "-v", f"--gpu-name={GPU_NAME}", str(source), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"ptxas {version} refuses it: {done.stderr.strip()[:300]}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    if registers is None or spilled is None:
        raise CompileError(f"ptxas {version} reports no registers: {done.stderr.strip()[:300]}")
    return Assembled(
        kernel=kernel,
        ptxas=version,
        registers=int(registers.group(1)),
        spilled=sum(map(int, spilled.groups())),
        shared=compiled.shared,
        requests=compiled.requests,
        serialised=len(re.findall(r"wgmma\S* instructions are serialized|warpgroup\.wait is injected", done.stderr)),
        **(_machine_code(binary) if disassembled else {}),
    )


def _machine_code(binary: Path) -> dict[str, Any]:
    import triton

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    code = subprocess.run([disassembler, binary], capture_output=True, text=True, check=True).stdout
    operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, flags=re.M)
    heads = Counter(operation.split(".")[0] for operation in operations)
    counts = {name: sum(count for head, count in heads.items() if head.startswith(name)) for name in INSTRUCTIONS}
    return {
        "loads": _widths(operations, "LDG", "LDGSTS"),  # into registers, and into shared memory
        "stores": _widths(operations, "STG"),
        "instructions": {name: count for name, count in counts.items() if count},
    }


def _widths(operations: Iterable[str], *names: str) -> dict[int, int]:
    """Bytes -> instructions, widest first."""
    bits = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    counts: Counter[int] = Counter()
    for operation in operations:
        head, *rest = operation.split(".")
        if head in names:
            counts[next((bits[part] for part in rest if part in bits), 4)] += 1
    return dict(sorted(counts.items(), reverse=True))


def wide_share(widths: Mapping[int, int]) -> float:
    """Part of the bytes that is accessed `WIDEST` at a time."""
    total = sum(width * count for width, count in widths.items())
    return widths.get(WIDEST, 0) * WIDEST / total if total else 1.0


@contextmanager
def _own_cache() -> Iterator[Path]:
    """A folder, and Triton's cache in it: what is compiled is compiled here and now."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="opensora-fast-aot-") as folder:
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
        try:
            yield Path(folder)
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def tables(ops: Sequence[str]) -> tuple[dict[str, list[Assembled]], list[str]]:
    """Label of every kernel of the ops -> what each ptxas makes of it, and a line per kernel that does not compile.

    UserError where kernels cannot be compiled here.
    """
    if launch.INTERPRETED:
        raise UserError("--aot compiles kernels, and with TRITON_INTERPRET=1 they are interpreted: unset it")
    if reason := launch.missing("cuda"):
        raise UserError(f"--aot needs Triton: {reason}")
    programs = find_ptxas()
    found, refused = {}, []
    with _own_cache() as folder:
        for kernel in kernels(ops):
            try:
                compiled = compile_kernel(kernel)
                found[kernel.label] = [
                    assemble(kernel, compiled, version, program, folder, disassembled=number == 0)
                    for number, (version, program) in enumerate(programs.items())
                ]
            except CompileError as error:
                refused.append(f"{kernel.label}: {error}")
    return found, refused


# The budget.


def read_budget(path: Path = BUDGET) -> dict[str, dict[str, Any]]:
    """Label -> what the kernel may take."""
    return json.loads(path.read_text())["kernels"] if path.exists() else {}


def write_budget(budget: Mapping[str, Mapping[str, Any]], programs: Iterable[str], path: Path = BUDGET) -> None:
    """One line a kernel, so that a change of one is a change of one line."""
    import triton

    lines = ",\n".join(f"{json.dumps(label)}: {json.dumps(of)}" for label, of in sorted(budget.items()))
    made = json.dumps({"triton": triton.__version__, "ptxas": list(programs), "target": GPU_NAME})
    path.write_text(f'{{"set_with": {made},\n"kernels": {{\n{lines}\n}}}}\n')


def budget_of(results: Sequence[Assembled]) -> dict[str, Any]:
    """What a kernel may take from now on: what it takes by the worst ptxas, registers rounded up to their step."""
    most = max(of.registers for of in results)
    budget = {"registers": -(-most // REGISTER_STEP) * REGISTER_STEP, "shared": max(of.shared for of in results)}
    for of in results:
        if of.loads is not None and of.stores is not None:
            budget |= {"load": max(of.loads, default=0), "store": max(of.stores, default=0), "wide": _wide(of)}
    if serialised := max(of.serialised for of in results):
        budget["serialised"] = serialised
    return budget | {name: True for name in sorted(results[0].requests)}


def failures(found: Mapping[str, Sequence[Assembled]], budget: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for everything in which a kernel is over its budget, and one for each that has none."""
    told = []
    for label, results in found.items():
        allowed = budget.get(label)
        if allowed is None:
            told.append(f"{label}: no budget; `opensora-fast bench --aot --update-budget` gives it one")
        for of in results:
            told += [f"{label}, ptxas {of.ptxas}: {words}" for words in _over(of, allowed or {})]
    return told


def _over(of: Assembled, allowed: Mapping[str, Any]) -> Iterator[str]:
    if of.spilled:
        yield f"{of.spilled} bytes spilled"
    if of.shared > MAX_SHARED:
        yield f"{of.shared} bytes of shared memory, sm_{ARCHITECTURE} has {MAX_SHARED}"
    for name in ("registers", "shared"):
        if name in allowed and getattr(of, name) > allowed[name]:
            yield f"{getattr(of, name)} {name}, the budget is {allowed[name]}"
    if of.serialised > allowed.get("serialised", 0):
        known = allowed.get("serialised", 0)
        yield f"ptxas waits {of.serialised} times where the source does not, the budget is {known}"
    if of.instructions is not None:
        yield from _missed({name for name in REQUESTS if name in of.requests or name in allowed}, of.instructions)
    if of.loads is None or of.stores is None or not allowed:
        return
    for name, widths in (("load", of.loads), ("store", of.stores)):
        if max(widths, default=0) < allowed[name]:
            yield f"its widest {name} has {max(widths, default=0)} bytes, the budget is {allowed[name]}"
    if _wide(of) < allowed["wide"]:
        yield f"{_wide(of)} % of its bytes move {WIDEST} at a time, the budget is {allowed['wide']} %"


def _missed(requests: Collection[str], instructions: Mapping[str, int]) -> Iterator[str]:
    """What a kernel is asked to do with instructions of Hopper, and does without them."""
    if "matrix" in requests and not instructions.get("HGMMA"):
        yield "multiplies matrices without HGMMA"
    if "matrix" in requests and instructions.get("HMMA"):
        yield f"holds {instructions['HMMA']} HMMA, where HGMMA multiplies matrices"
    if "tma" in requests and not instructions.get("UTMALDG"):
        yield "is to load tiles by TMA, and holds no UTMALDG"


def _wide(of: Assembled) -> int:
    """Percent of the bytes that its instructions move `WIDEST` at a time, of loads or of stores: the smaller."""
    return min(int(100 * wide_share(widths)) for widths in (of.loads or {}, of.stores or {}))


def main(ops: Sequence[str], *, update_budget: bool = False) -> int:
    """Print the table of the ops' kernels and check it; returns the exit code, 1 when a kernel is over its budget."""
    found, refused = tables(ops)
    _print(found)
    budget = read_budget()
    complete = set(ops) == set(CASES)
    if update_budget:
        kept = {} if complete else budget  # what is not launched any more is dropped by an update of all ops
        budget = kept | {label: budget_of(results) for label, results in found.items()}
        write_budget(budget, dict.fromkeys(of.ptxas for results in found.values() for of in results))
        print(f"wrote {BUDGET}: {len(found)} of {len(budget)} kernels are new or measured anew")
    wrong = refused + failures(found, budget)
    if complete and not refused:
        wrong += [f"{label}: has a budget and is not launched any more" for label in budget if label not in found]
    for line in wrong:
        print(f"wrong: {line}")
    spills = sum(any(of.spilled for of in results) for results in found.values())
    print(f"{len(found)} kernels, {spills} with spills; {len(wrong)} lines of what is wrong")
    return int(bool(wrong))


def _print(found: Mapping[str, Sequence[Assembled]]) -> None:
    headings = ["kernel", "constants", "pointers", "warps", "ptxas", "registers", "spills", "shared"]
    headings += ["loads", "stores", "instructions"]
    rows = []
    for results in found.values():
        for number, of in enumerate(results):
            kernel, counts = of.kernel, of.instructions or {}
            what = [kernel.name, kernel.constants, kernel.pointers, str(kernel.num_warps)]
            rows.append(
                [
                    *(what if number == 0 else [""] * len(what)),
                    *(of.ptxas, str(of.registers), str(of.spilled), str(of.shared)),
                    *(_width_words(of.loads), _width_words(of.stores)),
                    " ".join(f"{name} {count}" for name, count in counts.items()),
                ]
            )
    print_table(
        headings,
        rows,
        title=f"Triton and Gluon kernels for sm_{ARCHITECTURE}",
        caption="spills and shared memory in bytes; loads and stores of global memory: instructions x bytes per thread",
        left=("kernel", "constants", "pointers", "instructions"),
        width=240,
    )


def _width_words(widths: Mapping[int, int] | None) -> str:
    if widths is None:
        return ""
    return " ".join(f"{count}x{width}" for width, count in widths.items()) or "-"
