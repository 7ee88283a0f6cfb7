"""Runs a Gluon kernel's own source on CPU tensors, with stand-ins for what Hopper does asynchronously.

Gluon has no interpreter. Here the Python function of a kernel runs as it is written, once for each program of the grid,
its globals (`gl`, `tma`, `mbarrier`, `warpgroup_mma`, ...) replaced by this file's. Tensors are torch tensors and
layouts mean nothing. What is emulated is what such a kernel gets wrong, each at the worst moment that the hardware
allows:

* Partitions of `warp_specialize` are threads of which one runs at a time. At every operation on a barrier and every
  asynchronous one the turn goes to the first that can go on, in an order that is drawn anew from time to time, by the
  seed: some fall far behind. Where none can go on, `Deadlock` tells what each waits for.
* An mbarrier counts arrivals and bytes, and its waiters see the parity of its phase alone, as in PTX.
* A TMA load poisons its destination with NaN when it is issued and delivers later: by chance, or when nothing else can
  run. A TMA store or sum reads shared memory when it is waited for.
* A product reads its operands in shared memory when it is waited for, one after the other as they were issued: a buffer
  that is given back too early shows as NaN or as another tile's numbers.
* What a partition writes into shared memory reads as NaN until its next `fence_async_shared`.

A partition must not end with a product, a store or unfenced writes open, a program not with a copy in flight, and an
access to global memory must be in bounds.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import math
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Deadlock(AssertionError):
    """No partition can go on and no copy is in flight."""


class EmulationError(AssertionError):
    """Something that the hardware does not define."""


class _Abandoned(BaseException):
    """Ends a partition of a program that has failed."""


class Barrier:
    """An mbarrier, or an array of them."""

    def __init__(self, name: str, shape: Sequence[int]) -> None:
        self.name = name
        self.cells = [Barrier(f"{name}[{index}]", shape[1:]) for index in range(shape[0])] if len(shape) > 1 else []
        self.count = self.arrived = self.missing_bytes = self.phase = 0

    def index(self, index: int) -> Barrier:
        return self.cells[int(index)]

    def change(self, arrivals: int, missing_bytes: int) -> None:
        """Count; when all arrivals and bytes are there, the phase ends and the next one begins."""
        if not self.count:
            raise EmulationError(f"{self.name} is used before mbarrier.init")
        self.arrived += arrivals
        self.missing_bytes += missing_bytes
        if self.arrived > self.count:
            raise EmulationError(f"{self.name} gets {self.arrived} arrivals in a phase of {self.count}")
        if self.arrived == self.count and not self.missing_bytes:
            self.arrived, self.phase = 0, self.phase + 1

    def completed(self, parity: int) -> bool:
        """Whether the latest phase with this parity is over. Before the first phase the odd one counts as over."""
        return self.phase & 1 != parity

    def __str__(self) -> str:
        return (
            f"{self.name} (phase {self.phase}: {self.arrived} of {self.count} arrivals, {self.missing_bytes} bytes due)"
        )


class Shared:
    """A view of shared memory. Its bytes begin as NaN."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.shape, self.dtype = list(data.shape), data.dtype

    def index(self, index: int) -> Shared:
        return Shared(self.data[int(index)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
        assert dtype == self.dtype, "bytes are not read as another type here"
        return Shared(self.data.view(*shape))

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert (value.shape, value.dtype) == (self.data.shape, self.dtype), (value.shape, self.shape)
        self.data.fill_(math.nan)
        _machine().current.unfenced.append((self.data, value))


class Descriptor:
    """A TensorDescriptor: tiles of a strided tensor, zeros read and nothing written outside of it."""

    def __init__(self, of: Any) -> None:
        self.data = torch.as_strided(of.base, tuple(of.shape), tuple(of.strides), of.base.storage_offset())
        self.dtype, self.layout = of.base.dtype, of.layout
        block = list(of.block_shape)
        self.block_type = SimpleNamespace(shape=block, nbytes=math.prod(block) * of.base.element_size())

    def _inside(self, coord: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(where in the tensor, where in the tile): the part of a tile that exists."""
        ends = zip(map(int, coord), self.block_type.shape, self.data.shape, strict=True)
        counts = [(first, max(0, min(block, size - first))) for first, block, size in ends]
        return tuple(slice(first, first + count) for first, count in counts), tuple(slice(count) for _, count in counts)

    def read(self, coord: Sequence[int]) -> Tensor:
        tile = torch.zeros(self.block_type.shape, dtype=self.dtype)
        where, within = self._inside(coord)
        tile[within] = self.data[where]
        return tile

    def write(self, coord: Sequence[int], tile: Tensor, *, add: bool) -> None:
        where, within = self._inside(coord)
        self.data[where] = self.data[where] + tile[within] if add else tile[within]


class Pointer:
    """Elements of a contiguous tensor."""

    def __init__(self, data: Tensor, offset: Tensor | int = 0) -> None:
        self.data, self.offset = data, offset
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offset: Tensor | int) -> Pointer:
        return Pointer(self.data, self.offset + offset)

    def store(self, value: Tensor, mask: Tensor | None = None) -> None:
        assert value.dtype == self.data.dtype
        mask = torch.ones_like(value, dtype=torch.bool) if mask is None else mask.broadcast_to(value.shape)
        offsets = self.offset.broadcast_to(value.shape)[mask]
        if offsets.numel() and not 0 <= offsets.min() <= offsets.max() < self.data.numel():
            raise EmulationError("a store outside of its tensor")
        self.data.view(-1)[offsets] = value[mask]


class Product:
    """A warpgroup_mma on its way; it is computed when it is waited for."""

    def __init__(self, a: Tensor | Shared, b: Shared, acc: Tensor | Product, use_acc: bool) -> None:
        self.operands, self.acc, self.use_acc = (a, b), acc, use_acc
        self.value: Tensor | None = None

    def complete(self) -> None:
        a, b = (x.data if isinstance(x, Shared) else x for x in self.operands)
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        acc = _value(self.acc)
        product = a.float() @ b.float()
        assert product.shape == acc.shape, (product.shape, acc.shape)
        self.value = acc + product if self.use_acc else product


def _value(x: Tensor | Product) -> Tensor:
    if isinstance(x, Product):
        if x.value is None:
            raise EmulationError("a product's registers are read before warpgroup_mma_wait has waited for it")
        return x.value
    return x


class Partition:
    """A thread, and what it has open."""

    def __init__(self, function: Callable, arguments: Sequence) -> None:
        self.name = f"{function.__name__}{arguments[0] if isinstance(arguments[0], int) else ''}"
        self.function, self.arguments = function, arguments
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.error: BaseException | None = None
        self.ended = False
        self.products: deque[Product] = deque()
        self.stores: deque[Callable[[], None]] = deque()
        self.unfenced: list[tuple[Tensor, Tensor]] = []

    def check_ended(self) -> None:
        for what in ("products", "stores", "unfenced"):
            if getattr(self, what):
                raise EmulationError(f"{self.name} ends with {len(getattr(self, what))} {what} open")


class Machine:
    """One program of the grid: its partitions, its copies in flight, and who runs next."""

    def __init__(self, program: Sequence[int], seed: int) -> None:
        self.program = program
        self.random = random.Random(seed)
        self.early = self.random.choice((0.0, 0.2, 0.9))  # how often a copy is delivered though others could run
        self.restless = self.random.choice((0.03, 0.2, 1.0))  # how often it is drawn anew who goes before whom
        self.current = Partition(_nothing, ("kernel",))
        self.back = threading.Semaphore(0)
        self.copies: list[Callable[[], None]] = []
        self.failed = False

    def run(self, partitions: Sequence[Partition]) -> None:
        """All partitions to their end; raises what went wrong in one of them or between them."""
        outer = self.current
        threads = [threading.Thread(target=self._body, args=(of,)) for of in partitions]
        for thread in threads:
            thread.start()
        try:
            self._take_turns(partitions)
        finally:
            self.failed = True
            for of in partitions:
                of.turn.release()
            for thread in threads:
                thread.join()
            self.current = outer

    def _take_turns(self, partitions: Sequence[Partition]) -> None:
        order = self.random.sample(partitions, len(partitions))
        while alive := [of for of in order if not of.ended]:
            if self.random.random() < self.restless:
                self.random.shuffle(order)
            ready = [of for of in alive if of.ready()]
            if self.copies and (not ready or self.random.random() < self.early):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            if not ready:
                raise Deadlock("; ".join(f"{of.name} waits for {of.waits_for}" for of in alive))
            self.current = ready[0]
            self.current.turn.release()
            self.back.acquire()
            if self.current.error is not None:
                raise self.current.error
        if self.copies:
            raise EmulationError(f"{len(self.copies)} copies are in flight at the end")

    def _body(self, of: Partition) -> None:
        of.turn.acquire()
        if self.failed:
            return
        _running.machine = self
        try:
            of.function(*of.arguments)
            of.check_ended()
        except _Abandoned:
            return
        except BaseException as error:  # raised again where the turns are given
            of.error = error
        of.ended = True
        self.back.release()

    def pause(self, ready: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Where another partition may run; goes on once `ready`."""
        of = self.current
        if of.function is _nothing:  # outside of warp_specialize there is nobody else
            return
        of.ready, of.waits_for = ready, waits_for
        self.back.release()
        of.turn.acquire()
        if self.failed:
            raise _Abandoned


def _nothing() -> None: ...


_running = threading.local()


def _machine() -> Machine:
    return _running.machine


# Stand-ins, under the names that kernels use.


class _Layouts:
    """Any layout: it is made of anything and means nothing."""

    def __getattr__(self, name: str) -> _Layouts:
        return self

    def __call__(self, *args: object, **kwargs: object) -> _Layouts:
        return self


LAYOUT = _Layouts()


class _BarrierLayout: ...


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared | Barrier:
    if isinstance(layout, _BarrierLayout):
        caller = sys._getframe(2)  # named as the variable of the line that calls the allocating function
        line = linecache.getline(caller.f_code.co_filename, caller.f_lineno)
        return Barrier(line.split("=")[0].strip(), shape)
    return Shared(torch.full(tuple(shape), math.nan, dtype=dtype))


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = count


def _expect(barrier: Barrier, bytes: int, pred: bool = True) -> None:
    if pred:
        barrier.change(1, bytes)
        _machine().pause()


def _arrive(barrier: Barrier, *, count: int = 1, pred: bool = True) -> None:
    if pred:
        barrier.change(count, 0)
        _machine().pause()


def _wait(barrier: Barrier, phase: int, pred: bool = True) -> None:
    if pred:
        _machine().pause(lambda: barrier.completed(int(phase)), f"parity {int(phase)} of {barrier}")


def _load(descriptor: Descriptor, coord: Sequence[int], barrier: Barrier, result: Shared) -> None:
    assert result.shape == descriptor.block_type.shape, (result.shape, descriptor.block_type.shape)
    coord = [int(first) for first in coord]
    result.data.fill_(math.nan)

    def deliver() -> None:
        result.data.copy_(descriptor.read(coord))
        barrier.change(0, -descriptor.block_type.nbytes)

    _machine().copies.append(deliver)
    _machine().pause()


def _store(descriptor: Descriptor, coord: Sequence[int], src: Shared, *, add: bool = False) -> None:
    assert src.shape == descriptor.block_type.shape, (src.shape, descriptor.block_type.shape)
    coord = [int(first) for first in coord]
    _machine().current.stores.append(lambda: descriptor.write(coord, src.data, add=add))
    _machine().pause()


def _add(descriptor: Descriptor, coord: Sequence[int], src: Shared) -> None:
    _store(descriptor, coord, src, add=True)


def _store_wait(pendings: int) -> None:
    _machine().pause()
    stores = _machine().current.stores
    while len(stores) > pendings:
        stores.popleft()()


def _fence(cluster: bool = False) -> None:
    unfenced = _machine().current.unfenced
    for data, value in unfenced:
        data.copy_(value)
    unfenced.clear()


def _mma(
    a: Tensor | Shared, b: Shared, acc: Tensor | Product, *, use_acc: bool = True, is_async: bool = False
) -> Product | Tensor:
    product = Product(a, b, acc, use_acc)
    _machine().current.products.append(product)
    _machine().pause()
    return product if is_async else _mma_wait(0, deps=[product])


def _mma_wait(num_outstanding: int = 0, deps: Sequence[Tensor | Product] = ()) -> Any:
    _machine().pause()
    products = _machine().current.products
    while len(products) > num_outstanding:
        products.popleft().complete()
    values = tuple(map(_value, deps))
    return values[0] if len(values) == 1 else values


def _warp_specialize(
    functions_and_args: Sequence[tuple], worker_num_warps: Sequence[int], worker_num_regs: Sequence[int]
) -> None:
    assert len(worker_num_warps) == len(worker_num_regs) == len(functions_and_args) - 1
    _machine().run([Partition(function, arguments) for function, arguments in functions_and_args])


GL = SimpleNamespace(
    **{name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int32", "int64", "exp2", "log2")},
    allocate_shared_memory=_allocate,
    arange=lambda start, end, layout: torch.arange(start, end),
    cdiv=lambda x, y: -(-x // y),
    constexpr=None,
    convert_layout=lambda x, layout: x,
    max=lambda x, axis: x.amax(axis),
    maximum=torch.maximum,
    program_id=lambda axis: torch.tensor(_machine().program[axis]),
    static_range=range,
    store=lambda pointer, value, mask=None: pointer.store(value, mask),
    sum=lambda x, axis: x.sum(axis),
    warp_specialize=_warp_specialize,
    where=torch.where,
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    **dict.fromkeys(("DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout"), LAYOUT),
)
GLOBALS = {
    "gl": GL,
    "mbarrier": SimpleNamespace(arrive=_arrive, expect=_expect, init=_init, wait=_wait, MBarrierLayout=_BarrierLayout),
    "tma": SimpleNamespace(
        async_copy_global_to_shared=_load, async_copy_shared_to_global=_store, store_wait=_store_wait
    ),
    "fence_async_shared": _fence,
    "warpgroup_mma": _mma,
    "warpgroup_mma_wait": _mma_wait,
    "_async_add_shared_to_global": _add,
}


Edits = Mapping[str, tuple[str, str]]  # function -> (text of its source, what to run in its place)


def emulated(kernel: Any, edits: Edits) -> Callable:
    """The kernel's function, and those that it calls, over this file's globals."""
    functions: dict[str, Any] = {**kernel.fn.__globals__, **GLOBALS}
    for name, value in kernel.fn.__globals__.items():
        if name not in GLOBALS and hasattr(value, "fn"):
            code = _edited(value.fn, *edits[name]) if name in edits else value.fn.__code__
            functions[name] = types.FunctionType(code, functions, name, value.fn.__defaults__)
    return functions[kernel.fn.__name__]


def _edited(function: Callable, old: str, new: str) -> types.CodeType:
    source = inspect.getsource(function)
    assert old in source, f"{function.__name__} has no {old!r}"
    source = source[source.index("def ") :].replace(old, new)
    constants = compile(source, f"{function.__name__}, edited", "exec").co_consts
    return next(code for code in constants if getattr(code, "co_name", "") == function.__name__)


def launch(kernel: Any, grid: Sequence[int], *, seed: int = 0, edits: Edits | None = None, **arguments: Any) -> None:
    """As `opensora_fast.kernels.launch.launch`, on CPU tensors; `seed` chooses who runs when."""
    function = emulated(kernel, edits or {})
    given = {name: _stand_in(value) for name, value in arguments.items()}
    for number, program in enumerate(itertools.product(*map(range, grid))):
        _running.machine = Machine(program, seed + 7919 * number)
        function(**given)
        _machine().current.check_ended()


def _stand_in(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value)
    return Descriptor(value) if hasattr(value, "block_shape") else value
