"""What a job says to the person who runs it: on a terminal as it is, in a log one line an event with its time.

Everything goes to stderr; stdout is kept for results. Warnings and log records of the job's own process take the same
way, so that `ray job logs` shows one kind of line.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings

from tqdm import tqdm

_shown_warnings: set[str] = set()


def say(text: str) -> None:
    """A line for the person at the terminal or the reader of the log."""
    # Above any bar, and whole: stages that run side by side speak at once.
    tqdm.write(text if has_terminal() else stamp(text), file=sys.stderr)
    sys.stderr.flush()


def stamp(text: str) -> str:
    """The text behind the time, as it stands in a log."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.strip()}"


def has_terminal() -> bool:
    """True where a bar can be drawn; a pseudo-terminal without a width (in a container) shows lines instead."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def take_over_warnings() -> None:
    """Let warnings (each text once) and log records of level WARNING and above be said like everything else."""
    _shown_warnings.clear()
    warnings.showwarning = _show_warning
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(_Speaker(logging.WARNING))


class _Speaker(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(f"{record.levelname.lower()}: {record.getMessage()}")
        except Exception:  # a log record never ends the work that it tells of
            self.handleError(record)


def _show_warning(message: Warning | str, category: type[Warning], *_rest: object, **_more: object) -> None:
    shown = issubclass(category, UserWarning) and not issubclass(category, ImportWarning)
    if shown and str(message) not in _shown_warnings:
        _shown_warnings.add(str(message))
        say(f"warning: {message}")
