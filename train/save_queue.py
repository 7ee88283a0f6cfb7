"""Work that is done one piece after the other, in a thread that lives while there is some.

No thread waits idly: the interpreter, which joins its threads when it leaves, finishes what was begun and leaves.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class SaveQueue:
    """`submit` and `join` are for one thread. What the work raises is the work's to keep."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._working = False

    @property
    def working(self) -> bool:
        return self._working

    def submit(self, work: Callable[[], None]) -> None:
        with self._lock:
            if not self._working:
                self.join()
                self._thread = threading.Thread(target=self._run, name=self._name)
                self._thread.start()  # it takes the lock first
                self._working = True
            self._work.append(work)

    def join(self) -> None:
        """Return when all work is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._working = False
                    return
                work = self._work.popleft()
            work()
            del work
