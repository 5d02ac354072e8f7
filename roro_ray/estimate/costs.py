"""What a token and a problem cost by each model of a pool: parameters, FLOPs, memory and money side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roro_ray.config import Config, ModelConfig
from roro_ray.estimate.describe import pool_shape, show_count
from roro_ray.estimate.memory import plan_roles
from roro_ray.estimate.speed import measure_speed
from roro_ray.estimate.work import Work, episode_load

_HEADER = (
    *("model", "parameters", "active", "FLOP/token", "KV KiB/token", "context"),
    *("USD/M in", "cached", "out", "USD/PFLOP out"),
)
_OF = "of the dearest"
_UNKNOWN = "-"


def make_cost_table(config: Config) -> str:
    """A row a model, then what one problem costs: by each model alone, and routed at `estimate.large_share`."""
    rows = [_model_row(model) for model in config.pool.models]
    last = len(config.pool.models) - 1
    whole = _cost(config, f"fixed:{last}")
    problems: list[tuple[str, ...]] = [("problem by", "FLOP", _OF, "GPU s", _OF, "USD", _OF)]
    for index, model in enumerate(config.pool.models):
        problems.append(_problem_row(f"{model.name} alone", _cost(config, f"fixed:{index}"), whole))
    share = config.estimate.large_share
    problems.append(_problem_row(f"{share:.0%} dear steps", _cost(config, f"random:{share}"), whole))
    lines = [*_align([_HEADER, *rows]), "", *_align(problems), ""]
    e = config.estimate
    return "\n".join(
        [
            *lines,
            f"A problem: {e.tokens} tokens after a prompt of {e.prompt_tokens} (estimate.*). Each model reads once",
            "what it did not write; an API bills the prefix of every step again, at the cached price. Seconds of a GPU",
            "are those of engines that are kept full. The router's own reading is left out.",
        ]
    )


def _model_row(model: ModelConfig) -> tuple[str, ...]:
    shape = pool_shape(model)
    prices = [f"{price:g}" if price else _UNKNOWN for price in (model.price_in, model.price_cached, model.price_out)]
    if shape is None:
        return (model.name, *(_UNKNOWN,) * 5, *prices, _UNKNOWN)
    ratio = f"{model.price_out / 1e6 / shape.flops_per_token * 1e15:.3g}" if model.price_out else _UNKNOWN
    states = f"{shape.kv_bytes() / 1024:.0f}" if shape.kv_width else _UNKNOWN
    context = str(model.max_context or shape.max_context or _UNKNOWN)
    counts = (show_count(shape.parameters), show_count(shape.active), show_count(shape.flops_per_token))
    return (model.name, *counts, states, context, *prices, ratio)


@dataclass(frozen=True, slots=True)
class _Cost:
    """One episode's FLOPs, seconds of a GPU and dollars; None where a model is unknown or has no GPU."""

    flops: float | None = 0.0
    seconds: float | None = 0.0
    usd: float = 0.0


def _cost(config: Config, strategy: str) -> _Cost:
    roles = {role.name.removeprefix("engine "): role for role in plan_roles(config)}
    together = float(config.ray.workers * config.ray.concurrency)
    context = config.estimate.prompt_tokens + config.estimate.tokens / 2
    cost = _Cost()
    load = episode_load(config, strategy)
    for model in config.pool.models:
        work, shape, role = load.get(model.name, Work()), pool_shape(model), roles.get(model.name)
        if work == Work():
            continue
        flops = None if shape is None else shape.flops_per_token * (work.read + work.written)
        seconds = None
        if role is not None and role.shape is not None:
            speed = measure_speed(role, together, context, config.estimate, 0.0)
            seconds = speed.seconds(work) * max(role.gpus, 1.0) * role.processes
        again = max(work.sent - work.read, 0.0)
        usd = (work.read * model.price_in + again * model.price_cached + work.written * model.price_out) / 1e6
        cost = _Cost(_add(cost.flops, flops), _add(cost.seconds, seconds), cost.usd + usd)
    return cost


def _add(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def _problem_row(name: str, cost: _Cost, whole: _Cost) -> tuple[str, ...]:
    return (
        name,
        _UNKNOWN if cost.flops is None else show_count(cost.flops),
        _ratio(cost.flops, whole.flops),
        _UNKNOWN if cost.seconds is None else f"{cost.seconds:.3g}",
        _ratio(cost.seconds, whole.seconds),
        f"{cost.usd:.5f}" if whole.usd else _UNKNOWN,
        _ratio(cost.usd, whole.usd),
    )


def _ratio(value: float | None, whole: float | None) -> str:
    return f"{value / whole:.2f}" if value is not None and whole else _UNKNOWN


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.strip().ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]
