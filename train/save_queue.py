"""Work that is done one piece after the other, in a thread that lives while there is some.

No thread waits idly: the interpreter, which joins its threads when it leaves, finishes what was begun and leaves.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class SaveQueue:
    """`submit` and `join` are for one thread, and raise what a piece of the work has raised; the next ones are done."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._working = False
        self._raised: BaseException | None = None  # the first

    @property
    def working(self) -> bool:
        return self._working

    def submit(self, work: Callable[[], None]) -> None:
        """Raises RuntimeError when the system gives no thread; the work is then not done."""
        with self._lock:
            if not self._working:
                self.join()
                thread = threading.Thread(target=self._run, name=self._name)
                thread.start()  # it takes the lock first
                self._thread, self._working = thread, True
            self._work.append(work)

    def join(self) -> None:
        """Return when all work is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._working = False
                    return
                work = self._work.popleft()
            try:
                work()
            except BaseException as error:
                self._raised = self._raised or error
            del work
