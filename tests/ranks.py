"""Process groups for tests: worlds of gloo ranks, each rank a process of this machine, kept over the whole session.

    def test_sum(ranks):
        assert ranks(3).run("kernels/test_example.py:sum_of_ranks", 1.0) == [6.0, 6.0, 6.0]

`run` calls the function (of a file of tests/) on every rank with the same arguments, and gives the results by rank;
both are pickled. The default group is ready, `torch.distributed.get_rank()` says which rank it is. What a rank raises
fails the test with its traceback. A rank that dies, or a call that takes longer than its limit, fails it with the last
lines that the rank printed. After any of these the world is ended, and the next test gets a new one.

    results = ranks.disposable(3).run("kernels/test_example.py:one_dies")    # DIED where a rank died

is a world of its own for one call, in which ranks may die, best within groups that they make with a timeout of
seconds, for that of the world is also the time to start in; with backend="nccl" each has a GPU.

How: run as a script, this file is a server that imports once what ranks need and forks them on request. So a rank
costs milliseconds, and no thread exists yet when it is forked. Ranks meet over a file and never over a fixed port, so
that many sessions run side by side. Each leaves by os._exit: threads of gloo may abort a process that exits normally.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
GROUP_TIMEOUT_S = 30.0
CALL_LIMIT_S = 120.0
START_LIMIT_S = 60.0
GRACE_S = 3.0  # for the other ranks, once one has failed: their own words, if they have any


class Died:
    """The result of a rank that died."""

    def __repr__(self) -> str:
        return "DIED"


DIED = Died()


class RankError(AssertionError):
    """A rank raised, died or did not answer in time."""


# The test's side.


class Ranks:
    """The worlds of one session; see the module."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}
        self._folder: tempfile.TemporaryDirectory | None = None
        self._control: Connection | None = None  # to the server
        self._count = 0

    def __call__(self, size: int) -> World:
        """The world of `size` ranks that the session keeps."""
        world = self._worlds.get(size)
        if world is None or world.ended:
            world = self._worlds[size] = self._start(size, GROUP_TIMEOUT_S, "gloo", disposable=False)
        return world

    def disposable(self, size: int, timeout_s: float = GROUP_TIMEOUT_S, backend: str = "gloo") -> World:
        """A new world for one call, in which ranks may die; timeout_s is that of its group. With nccl, a GPU a rank."""
        return self._start(size, timeout_s, backend, disposable=True)

    def close(self) -> None:
        for world in self._worlds.values():
            world.end()
        if self._control is not None:
            self._control.close()  # the server leaves at its end of file
            self._server.wait(10)
        if self._folder is not None:
            self._listener.close()
            self._folder.cleanup()

    def _start(self, size: int, timeout_s: float, backend: str, *, disposable: bool) -> World:
        if self._control is None:
            self._control = self._serve()
        assert self._folder is not None
        folder = Path(self._folder.name) / f"world-{self._count}"
        self._count += 1
        folder.mkdir()
        _send(self._control, (size, timeout_s, backend, str(folder)))
        members = {}
        for _ in range(size):
            connection = self._accept()
            rank, pid = _receive(connection)
            members[rank] = (connection, pid)
        world = World([members[rank] for rank in range(size)], folder, disposable=disposable)
        world.await_group()
        return world

    def _serve(self) -> Connection:
        """Start the server."""
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        address = str(Path(self._folder.name) / "socket")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen()
        self._listener.settimeout(START_LIMIT_S)
        # A session of its own: an interrupt from the keyboard is for the tests, and ends the server through them.
        self._server = subprocess.Popen([sys.executable, "-P", __file__, address], start_new_session=True)
        return self._accept()

    def _accept(self) -> Connection:
        try:
            return Connection(self._listener.accept()[0].detach())
        except TimeoutError as error:
            raise RankError(f"no rank started within {START_LIMIT_S:.0f} s; what stopped it was printed") from error


class World:
    """Ranks that wait for calls."""

    def __init__(self, members: list[tuple[Connection, int]], folder: Path, *, disposable: bool) -> None:
        self.size = len(members)
        self.ended = False
        self._members, self._folder, self._disposable = members, folder, disposable
        self._connections = [connection for connection, _ in members]

    def await_group(self) -> None:
        """Return once every rank has the group: one that died earlier would take those with it that still connect."""
        for rank, connection in enumerate(self._connections):
            try:
                _receive(connection)
            except (EOFError, OSError) as error:
                self.end(kill=True)
                message = f"rank {rank} of {self.size} found no group; it last printed:\n{self._printed(rank)}"
                raise RankError(message) from error

    def run(self, target: str, *args: Any, limit_s: float = CALL_LIMIT_S) -> list[Any]:
        """The results of `file.py:function` (below tests/) by rank. RankError when a rank fails."""
        if self.ended:
            raise ValueError("this world has ended; ask for another")
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        for rank, connection in enumerate(self._connections):
            try:
                _send(connection, (target, args))
            except OSError:
                failures[rank] = f"died after the call before this one; it last printed:\n{self._printed(rank)}"
        deadline = time.monotonic() + (GRACE_S if failures else limit_s)
        while waiting := {self._connections[r]: r for r in range(self.size) if r not in results and r not in failures}:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in waiting.values():
                    reason = f"no answer within {limit_s:.0f} s" if not failures else "no answer after another failed"
                    failures[rank] = f"{reason}; it last printed:\n{self._printed(rank)}"
                break
            for connection in ready:
                rank = waiting[connection]
                try:
                    succeeded, value = _receive(connection)
                except (EOFError, OSError):
                    if self._disposable:
                        results[rank] = DIED
                        continue
                    succeeded, value = False, f"died; it last printed:\n{self._printed(rank)}"
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures or self._disposable:
            self.end(kill=True)
        if failures:
            parts = [f"rank {rank} of {self.size}: {failures[rank]}" for rank in sorted(failures)]
            raise RankError(f"{target}\n" + "\n".join(parts))
        return [results[rank] for rank in range(self.size)]

    def end(self, *, kill: bool = False) -> None:
        """Let every rank leave; `kill`: without asking."""
        if self.ended:
            return
        self.ended = True
        alive = dict(self._members)
        if kill:
            for pid in alive.values():
                _kill(pid)
        else:
            for connection in alive:
                try:
                    _send(connection, None)
                except OSError:
                    continue  # it has died already
        deadline = time.monotonic() + 5
        while alive and (ready := wait(list(alive), timeout=max(0.0, deadline - time.monotonic()))):
            for connection in ready:  # the end of its file: it left
                del alive[connection]
        for pid in alive.values():
            _kill(pid)
        for connection in self._connections:
            connection.close()

    def _printed(self, rank: int) -> str:
        return "\n".join((self._folder / f"rank-{rank}.log").read_text(errors="replace").splitlines()[-20:])


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _send(connection: Connection, value: Any) -> None:
    # By plain pickle: torch teaches multiprocessing's own to send handles of shared memory.
    connection.send_bytes(pickle.dumps(value))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


# The server and its ranks.


def _serve(address: str) -> None:
    control = Client(address, family="AF_UNIX")
    import hypothesis  # noqa: F401  (imported once for all ranks)
    import pytest  # noqa: F401
    import torch._dynamo  # (what the first call of a custom op would import, in seconds on every rank)
    import torch.distributed  # noqa: F401

    import opensora_fast.kernels.context_parallel  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a rank ended
    while True:
        try:
            size, timeout_s, backend, folder = _receive(control)
        except (EOFError, OSError):
            os._exit(0)
        for rank in range(size):
            if os.fork() == 0:
                control.close()
                try:
                    _live(address, rank, size, timeout_s, backend, Path(folder))
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)


def _live(address: str, rank: int, size: int, timeout_s: float, backend: str, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    log = os.open(folder / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection = Client(address, family="AF_UNIX")
    _send(connection, (rank, os.getpid()))
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=timeout_s)
    store = dist.FileStore(str(folder / "store"), size)
    store.set_timeout(timedelta(seconds=GROUP_TIMEOUT_S))
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    _send(connection, "ready")
    modules: dict[str, Any] = {}
    while True:
        try:
            request = _receive(connection)
        except EOFError:  # the session is gone
            os._exit(0)
        if request is None:
            dist.destroy_process_group()
            os._exit(0)
        target, args = request
        try:
            answer = pickle.dumps((True, _function(target, modules)(*args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)


def _function(target: str, modules: dict[str, Any]) -> Any:
    file, _, name = target.partition(":")
    if file not in modules:
        spec = importlib.util.spec_from_file_location(
            "ranks_" + file.removesuffix(".py").replace("/", "_"), TESTS / file
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickles of the module look it up
        spec.loader.exec_module(module)
        modules[file] = module
    return getattr(modules[file], name)


if __name__ == "__main__":
    _serve(sys.argv[1])
