"""Run independent stages side by side, so that a stage that waits leaves its core to another."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


def run_together(*stages: Callable[[], object]) -> None:
    """Run the stages in threads until all are over; the first failure is raised at once.

    The threads are daemons: after a failure, or Ctrl-C, the job ends without waiting for the others.
    """
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(stage: Callable[[], object]) -> None:
        try:
            stage()
        except BaseException as error:  # the thread's border: raised again below
            outcomes.put(error)
        else:
            outcomes.put(None)

    for number, stage in enumerate(stages):
        threading.Thread(target=run, args=(stage,), name=f"stage-{number}", daemon=True).start()
    for _ in stages:
        error = outcomes.get()
        if error is not None:
            raise error
