"""What the server counts: one table of instruments, recorded by Ray for Prometheus or kept in memory.

Everything goes through the few typed methods of `Metrics`, so that a label can only take values from a short list: what
a client makes up (a model's name, a path) is counted as `other`, and no client can fill the metrics store. Ray's
exporter adds `ray_` before a name and `_total` after a counter's, and reports a histogram's sum from the middles of its
buckets: take quantiles, not averages.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from roro_ray.types import Step
from serve.facts import RequestFacts

Kind = Literal["counter", "gauge", "histogram"]
Labels = dict[str, str]

_MS = (1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 1.2e5)
_FINE_MS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1e3)
OTHER = "other"
ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/models",
    "/v1/models/{id}",
    "/v1/routing/explain",
    "/v1/routing/info",
    "/healthz",
    "/openapi.json",
    "/",
)
_ERRORS_KEPT = 64  # distinct error codes; ours are fewer, and a code that is built from input must not leak in


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric: its kind, name (units in it), help text, labels, and a histogram's upper bounds."""

    kind: Kind
    name: str
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


_TABLE = (
    Instrument("counter", "roro_requests", "Requests over, by HTTP status.", ("endpoint", "model", "code")),
    Instrument("counter", "roro_errors", "Requests that failed, by the error's code.", ("endpoint", "error")),
    Instrument("counter", "roro_degraded_requests", "Requests with a model or the router replaced.", ("model",)),
    Instrument("histogram", "roro_request_duration_ms", "From arrival to the last byte.", ("endpoint", "stream"), _MS),
    Instrument("histogram", "roro_time_to_first_token_ms", "From arrival to the first text.", ("model", "stream"), _MS),
    Instrument("histogram", "roro_queue_wait_ms", "Wait for admission.", (), _MS),
    Instrument("counter", "roro_flops_large_only", "FLOPs that the large model alone would have taken.", ("model",)),
    Instrument("counter", "roro_flops_saved", "FLOPs saved against the large model alone.", ("model",)),
    Instrument("counter", "roro_flops_overspent", "FLOPs spent beyond the large model alone.", ("model",)),
    Instrument("counter", "roro_steps", "Steps by the model that wrote them.", ("model",)),
    Instrument("counter", "roro_degraded_steps", "Steps by another model than wanted, which was gone.", ("model",)),
    Instrument("counter", "roro_tokens_in", "Tokens prefilled for steps, by their writer (drafts too).", ("model",)),
    Instrument("counter", "roro_tokens_out", "Tokens decoded for steps, by their writer (drafts too).", ("model",)),
    Instrument("counter", "roro_flops", "FLOPs of steps, by their writer (drafts and router too).", ("model",)),
    Instrument("histogram", "roro_step_duration_ms", "Decision and writing of a step.", ("model",), _MS),
    Instrument("histogram", "roro_router_decision_ms", "From asking the router to its decision.", (), _FINE_MS),
    Instrument("counter", "roro_retries", "Steps asked again of another replica.", ("model",)),
    Instrument("gauge", "roro_queue_depth", "Requests waiting for admission."),
    Instrument("gauge", "roro_in_flight_requests", "Requests being answered."),
    Instrument("gauge", "roro_router_version", "Version of the newest router loaded."),
    Instrument("counter", "roro_router_swaps", "Times that a newer router took over."),
    Instrument("counter", "roro_trajectories_recorded", "Served trajectories written to disk."),
    Instrument("counter", "roro_trajectories_dropped", "Served trajectories not recorded, by reason.", ("reason",)),
)
INSTRUMENTS = {instrument.name: instrument for instrument in _TABLE}


class Metrics:
    """What the server tells; subclasses say where it goes (`_record`). Safe from every thread.

    Args:
        models: names of the pool's models, the only ones that become labels beside `auto`, `router` and `other`.
    """

    def __init__(self, models: Sequence[str] = ()) -> None:
        self._models = frozenset(models)
        self._errors: set[str] = set()
        self._version: int | None = None

    def observe_request(self, facts: RequestFacts) -> None:
        """A request is over."""
        endpoint = facts.endpoint if facts.endpoint in ENDPOINTS else OTHER
        model = self._asked(facts.model)
        stream = "true" if facts.stream else "false"
        self._count("roro_requests", 1, {"endpoint": endpoint, "model": model, "code": _code(facts.status)})
        self._record("roro_request_duration_ms", facts.duration_ms, {"endpoint": endpoint, "stream": stream})
        if facts.error is not None or facts.status >= 400:
            error = self._error(facts.error or f"http_{_code(facts.status)}")
            self._count("roro_errors", 1, {"endpoint": endpoint, "error": error})
        if facts.degraded:
            self._count("roro_degraded_requests", 1, {"model": model})
        if facts.ttft_ms is not None:
            self._record("roro_time_to_first_token_ms", facts.ttft_ms, {"model": model, "stream": stream})
        if facts.flops_saved is not None and facts.flops_large_only is not None:
            self._count("roro_flops_large_only", facts.flops_large_only, {"model": model})
            self._count("roro_flops_saved", facts.flops_saved, {"model": model})
            self._count("roro_flops_overspent", -facts.flops_saved, {"model": model})

    def observe_step(self, model: str, step: Step, milliseconds: float) -> None:
        """`model` wrote a step; `milliseconds` from the end of the step before to the end of this one."""
        labels = {"model": self._own(model)}
        self._count("roro_steps", 1, labels)
        self._count("roro_degraded_steps", int(step.degraded), labels)
        self._count("roro_tokens_in", step.usage.tokens_in, labels)
        self._count("roro_tokens_out", step.usage.tokens_out, labels)
        self._count("roro_flops", step.usage.flops, labels)
        self._record("roro_step_duration_ms", milliseconds, labels)

    def observe_decision(self, milliseconds: float) -> None:
        """The router decided, `milliseconds` after it was asked."""
        self._record("roro_router_decision_ms", milliseconds, {})

    def observe_queue_wait(self, milliseconds: float) -> None:
        """A request was admitted after waiting."""
        self._record("roro_queue_wait_ms", milliseconds, {})

    def observe_load(self, queued: int, in_flight: int) -> None:
        """How many requests wait for admission and how many are being answered, now."""
        self._record("roro_queue_depth", queued, {})
        self._record("roro_in_flight_requests", in_flight, {})

    def observe_retry(self, model: str) -> None:
        """A step is asked again of another replica of `model`."""
        self._count("roro_retries", 1, {"model": self._own(model)})

    def observe_router(self, version: int) -> None:
        """The newest router is of this version now; another one than before counts as a swap."""
        if self._version not in (None, version):
            self._count("roro_router_swaps", 1, {})
        self._version = version
        self._record("roro_router_version", version, {})

    def observe_recorded(self, count: int) -> None:
        """Trajectories were written to disk."""
        self._count("roro_trajectories_recorded", count, {})

    def observe_dropped(self, count: int, reason: str) -> None:
        """Trajectories were not recorded; `reason` is one of `recording.DROP_REASONS`."""
        self._count("roro_trajectories_dropped", count, {"reason": reason})

    def _count(self, name: str, amount: float, labels: Labels) -> None:
        if amount > 0:  # Ray refuses to add nothing, and a counter cannot fall
            self._record(name, amount, labels)

    def _record(self, name: str, value: float, labels: Labels) -> None:
        """Add to a counter, set a gauge, or put into a histogram."""
        raise NotImplementedError

    def _own(self, model: str) -> str:
        return model if model in self._models else OTHER

    def _asked(self, model: str) -> str:
        if model in self._models or model == "auto":
            return model
        return "router" if re.fullmatch(r"router-v\d{1,9}", model) else OTHER

    def _error(self, code: str) -> str:
        if code not in self._errors:
            if len(self._errors) >= _ERRORS_KEPT or not re.fullmatch(r"[a-z][a-z0-9_]{0,47}", code):
                return OTHER
            self._errors.add(code)
        return code


def _code(status: int) -> str:
    return str(status) if 100 <= status <= 599 else OTHER


class NoMetrics(Metrics):
    """Counts nothing."""

    def _record(self, name: str, value: float, labels: Labels) -> None:
        pass


class MemoryMetrics(Metrics):
    """Keeps everything in this process: for tests, and for a server without Ray."""

    def __init__(self, models: Sequence[str] = ()) -> None:
        super().__init__(models)
        self._lock = threading.Lock()
        self._values: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)

    def _record(self, name: str, value: float, labels: Labels) -> None:
        instrument = INSTRUMENTS[name]
        assert set(labels) == set(instrument.labels), f"{name} got labels {sorted(labels)}"
        key = tuple(sorted(labels.items()))
        with self._lock:
            if instrument.kind == "gauge":
                self._values[name, key] = value
            elif instrument.kind == "counter":
                self._values[name, key] += value
            else:
                place = bisect_left(instrument.bounds, value)
                bound = f"{instrument.bounds[place]:g}" if place < len(instrument.bounds) else "+Inf"
                self._values[f"{name}_bucket", tuple(sorted((*key, ("le", bound))))] += 1
                self._values[f"{name}_sum", key] += value
                self._values[f"{name}_count", key] += 1

    def snapshot(self) -> dict[str, float]:
        """Every value by `name{label="value",...}`; a histogram gives `_sum`, `_count` and `_bucket` (each alone)."""
        with self._lock:
            values = dict(self._values)
        return {f"{name}{_format(labels)}": value for (name, labels), value in sorted(values.items())}

    def total(self, name: str, **labels: str) -> float:
        """Sum of a metric (or of a histogram's `_sum` or `_count`) over all labels but those given."""
        wanted = set(labels.items())
        with self._lock:
            return sum(v for (each, key), v in self._values.items() if each == name and wanted <= set(key))


def _format(labels: tuple[tuple[str, str], ...]) -> str:
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels) + "}" if labels else ""


class RayMetrics(Metrics):
    """Records into Ray, whose agent on each node exports for Prometheus.

    Make it inside a replica, after Ray was started: Serve then adds the labels deployment, replica and application.
    A recorded value costs about 4 microseconds.
    """

    def __init__(self, models: Sequence[str] = ()) -> None:
        super().__init__(models)
        from ray.serve import metrics

        self._instruments: dict[str, Any] = {}
        for each in _TABLE:
            labels: Any = each.labels  # Serve's hint says one label; any number of them is taken
            if each.kind == "counter":
                self._instruments[each.name] = metrics.Counter(each.name, each.help, labels)
            elif each.kind == "gauge":
                self._instruments[each.name] = metrics.Gauge(each.name, each.help, labels)
            else:
                self._instruments[each.name] = metrics.Histogram(each.name, each.help, list(each.bounds), labels)

    def _record(self, name: str, value: float, labels: Labels) -> None:
        instrument, kind = self._instruments[name], INSTRUMENTS[name].kind
        if kind == "counter":
            instrument.inc(value, labels)
        elif kind == "gauge":
            instrument.set(value, labels)
        else:
            instrument.observe(value, labels)
