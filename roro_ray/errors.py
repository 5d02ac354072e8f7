"""Errors of the project. A message says what happened, what was got, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RoroError(Exception):
    """Base of every error that this project raises on purpose; each also inherits the standard one."""


class ConfigError(RoroError, ValueError):
    """A configuration key or value is wrong."""


class MissingWeightsError(ConfigError):
    """Weights were never published, or were lost with the process that held them: publish them (again)."""


class CalibrationError(ConfigError):
    """A calibration is damaged, was measured with other models, or has no point that meets a target."""


class DataError(RoroError, ValueError):
    """A file or a record is unreadable, truncated or of another schema."""


class FullDiskError(DataError, OSError):
    """There was no room to write a file; what was there before it still is."""


class RubricError(RoroError, ValueError):
    """A rubric does not parse or names what its query does not contain."""


class CheckpointError(RoroError, ValueError):
    """A checkpoint is incomplete or of another shape than the model that it should fill."""


class EngineError(RoroError, RuntimeError):
    """An engine could not load its model or generate a step."""


class EngineUnavailableError(EngineError):
    """The model's process died, is loading or cannot be reached: another replica or model may still answer."""


class RolloutError(EngineError):
    """More rollouts failed for good than the failure policy bears."""


class ScoreError(RoroError, RuntimeError):
    """More scores of an iteration failed than the settings allow."""


class TrainingError(RoroError, RuntimeError):
    """A training failed more often than it may be restarted, or ended without a result."""


class ResourceError(RoroError, RuntimeError):
    """The cluster can never give the resources asked for."""


class DeadlineError(RoroError, TimeoutError):
    """A remote call did not answer in its time."""


class QueueFullError(RoroError, RuntimeError):
    """A bounded queue refused a request; try again later."""


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """A suggestion such as ` (did you mean 'chain'?)`, or nothing where no name is near."""
    near = difflib.get_close_matches(str(got), list(allowed), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
