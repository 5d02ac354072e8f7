"""Run independent stages side by side, so that a stage that waits leaves its core to another."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Sequence

from jobs._stopping import Stopped

_UNWIND_S = 5.0  # what stages get to give back what they hold


def run_together(*stages: Callable[[], object]) -> None:
    """Run the stages in threads until all are over; the first failure is raised, and the others are stopped before.

    A stage that is stopped unwinds as the main thread does after Ctrl-C. One that does not within some seconds is left
    behind: its thread is a daemon, so the job ends without it.
    """
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(stage: Callable[[], object]) -> None:
        try:
            stage()
        except BaseException as error:  # the thread's border: raised again below
            outcomes.put(error)
        else:
            outcomes.put(None)

    threads = [
        threading.Thread(target=run, args=(stage,), name=f"stage-{number}", daemon=True)
        for number, stage in enumerate(stages)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in stages:
            error = outcomes.get()
            if error is not None:
                raise error
    except BaseException:
        _stop(threads)
        raise


def _stop(threads: Sequence[threading.Thread]) -> None:
    """Raise `Stopped` in threads, and wait for them: once Ray is shut down, whoever asks it ends the whole process."""
    for thread in threads:
        if thread.ident is not None and thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Stopped))
    deadline = time.monotonic() + _UNWIND_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
