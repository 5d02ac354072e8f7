"""Processes that check mathematical answers, and the clock that they work under.

Each process is led by one thread, which sends it one answer at a time and waits for the grade. Where the grade does not
come in time, or the process dies, the process is killed and another is started for the next answer: a hostile
expression costs its own grade and nobody else's. The clock starts when a process takes the answer, not while it queues.
Started by `python -m`, so a process imports neither the caller's main module nor anything of torch or Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from roro_ray.errors import DataError

READY = b"ready"
_ROOT = str(Path(__file__).resolve().parents[2])
_START_S = 120.0
# sympy's caches grow with what they have seen; a fresh process has its whole memory again.
_MOST_TASKS = 5000


@dataclass(frozen=True, slots=True)
class Task:
    """One answer to check: the boxes of the text if it has any, its end, what is expected, and the tolerance."""

    boxes: tuple[str, ...]
    text: str
    gold: str
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Grade:
    """Whether the answer is right, and what was read as it.

    `correct` is None where it could not be checked: `error` says why, and `failure` is `timeout`, `crash`, or `gold`
    (the gold answer cannot be read).
    """

    correct: bool | None
    answer: str | None = None
    error: str | None = None
    failure: str | None = None


class GraderPool:
    """A fixed number of grader processes, started when first needed.

    Args:
        processes: how many answers are checked at once.
        timeout_s: of one check.
        memory_mb: address space of each process, in MiB.
    """

    def __init__(self, processes: int, timeout_s: float, memory_mb: int = 1024) -> None:
        self._limits = (timeout_s, memory_mb)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="grader")
        self._own = threading.local()
        self._lock = threading.Lock()
        self._graders: set[_Grader] = set()
        self._closed = False

    def submit(self, task: Task) -> Future[Grade]:
        """Have an answer checked; the future gives its grade, and fails only where no process can be started."""
        return self._threads.submit(self._check, task)

    @property
    def pids(self) -> list[int]:
        """The processes alive."""
        with self._lock:
            return [grader.process.pid for grader in self._graders if grader.process.poll() is None]

    def close(self) -> None:
        """End the processes at once; what waits is cancelled, what is being checked comes back as a crash."""
        with self._lock:
            self._closed = True
            graders = list(self._graders)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for grader in graders:
            grader.kill()
        self._threads.shutdown(wait=True)

    def _check(self, task: Task) -> Grade:
        grader: _Grader | None = getattr(self._own, "grader", None)
        if grader is None or grader.done >= _MOST_TASKS or grader.process.poll() is not None:
            if grader is not None:
                self._remove(grader)
            grader = self._own.grader = self._start()
            if grader is None:
                return Grade(None, error="the graders were closed", failure="crash")
        grade = grader.check(task)
        if grade.failure in ("timeout", "crash"):
            self._remove(grader)
            self._own.grader = None
        return grade

    def _start(self) -> _Grader | None:
        grader = _Grader(*self._limits)
        with self._lock:
            self._graders.add(grader)
            closed = self._closed
        if closed:
            self._remove(grader)
            return None
        return grader

    def _remove(self, grader: _Grader) -> None:
        grader.kill()
        with self._lock:
            self._graders.discard(grader)


class _Grader:
    """One process and the connection to it.

    Raises:
        DataError: the process does not start.
    """

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        self.done = 0
        self._timeout_s = timeout_s
        ours, theirs = Pipe()
        self._connection: Connection[Any, Any] = ours
        fd = theirs.fileno()
        path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
        numbers = (fd, os.getpid(), timeout_s, memory_mb)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "roro_ray.data.math_grader", *map(str, numbers)],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
        theirs.close()
        if self._receive(_START_S) != READY:
            code = self.process.poll()
            self.kill()
            raise DataError(
                f"a process that checks mathematical answers did not start (exit status {code}); its error stands "
                'above. Try `python -c "import math_verify"`, and pip install math-verify[antlr4_13_2] if that fails.'
            )

    def check(self, task: Task) -> Grade:
        """The grade of one answer, or why there is none; after a failure the process must go."""
        self.done += 1
        try:
            self._connection.send_bytes(json.dumps(asdict(task)).encode())
            if not self._connection.poll(self._timeout_s):
                return Grade(None, error=f"not checked within {self._timeout_s:g} s", failure="timeout")
            fields = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            return Grade(None, error="the process that checked it died", failure="crash")
        return Grade(**fields)

    def kill(self) -> None:
        """End the process and wait for it, so that it leaves no zombie."""
        self.process.kill()
        self.process.wait()
        self._connection.close()

    def _receive(self, timeout_s: float) -> bytes | None:
        try:
            return self._connection.recv_bytes() if self._connection.poll(timeout_s) else None
        except (EOFError, OSError):
            return None
