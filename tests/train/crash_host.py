"""Processes that tests may kill: forked from one that has imported everything, so that each costs milliseconds.

    host = CrashHost()
    status = host.run("saved_states.py:save_steps", {"run": "..."}, kill_after=0.01)    # -9 where SIGKILL ended it
    host.close()

The function is called with the arguments, in a process of its own, and everything that it printed is lost with it: what
has to outlive a kill it writes to a file with os.write, which the page cache keeps. kill_after: seconds from its start
to a SIGKILL, None for none. A function that raises ends with status 1 and its traceback on standard error.

How: run as a script, this file is the server. It runs no thread of its own, so that it can fork at any time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent


def load(name: str) -> ModuleType:
    """The file `name` of this folder as a module; always the same one."""
    stem = Path(name).stem
    if stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(stem, FOLDER / name)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[stem] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[stem])
        except BaseException:
            del sys.modules[stem]
            raise
    return sys.modules[stem]


class CrashHost:
    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt from the keyboard is for the tests
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, target: str, arguments: dict, *, kill_after: float | None = None) -> int:
        """The exit status: 0, 1 where it raised, or minus the signal's number."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([target, arguments, kill_after]) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, f"the crash host ended with status {self._server.wait()}"
        return int(answer)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()  # the server leaves at its end of file
        self._server.wait()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the functions print goes to standard error
    for line in sys.stdin:
        target, arguments, kill_after = json.loads(line)
        file, name = target.split(":")
        try:
            function = getattr(load(file), name)  # imported before the fork
        except Exception:
            traceback.print_exc()
            print(1, file=answers, flush=True)
            continue
        child = os.fork()
        if child == 0:
            status = 1
            try:
                function(**arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        if kill_after is not None:
            time.sleep(kill_after)  # a moment that nothing in the child marks is what is tested: no synchronisation
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
