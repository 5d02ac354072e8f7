"""What a token and a problem cost by each model of a pool: parameters, FLOPs, memory and money side by side."""

from __future__ import annotations

from collections.abc import Sequence

from roro_ray.config import Config, ModelConfig
from roro_ray.engines.shapes import Shape
from roro_ray.estimate.describe import pool_shape, show_count
from roro_ray.estimate.work import Work, episode_load

_HEADER = (
    *("model", "parameters", "active", "FLOP/token", "KV KiB/token", "context"),
    *("USD/M in", "cached", "out", "USD/PFLOP out"),
)
_UNKNOWN = "-"


def make_cost_table(config: Config) -> str:
    """A row a model, then what one problem costs: by each model alone, and routed at `estimate.large_share`."""
    rows = [_model_row(model) for model in config.pool.models]
    last = len(config.pool.models) - 1
    whole = _cost(config, f"fixed:{last}")
    problems = [("problem by", "FLOP", "of the dearest", "USD", "of the dearest")]
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
            "what it did not write; an API bills the prefix of every step again, at the cached price. The router's own",
            "reading is left out.",
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


def _cost(config: Config, strategy: str) -> tuple[float | None, float]:
    """FLOPs (None where a model is unknown) and dollars of one episode."""
    flops: float | None = 0.0
    usd = 0.0
    load = episode_load(config, strategy)
    for model in config.pool.models:
        work, shape = load.get(model.name, Work()), pool_shape(model)
        if work != Work():
            flops = _add(flops, work, shape)
            again = max(work.sent - work.read, 0.0)
            usd += (work.read * model.price_in + again * model.price_cached + work.written * model.price_out) / 1e6
    return flops, usd


def _add(flops: float | None, work: Work, shape: Shape | None) -> float | None:
    return None if flops is None or shape is None else flops + shape.flops_per_token * (work.read + work.written)


def _problem_row(
    name: str, cost: tuple[float | None, float], whole: tuple[float | None, float]
) -> tuple[str, str, str, str, str]:
    flops, usd = cost
    part = f"{flops / whole[0]:.2f}" if flops is not None and whole[0] else _UNKNOWN
    paid = f"{usd / whole[1]:.2f}" if usd and whole[1] else _UNKNOWN
    return name, show_count(flops) if flops is not None else _UNKNOWN, part, f"{usd:.5f}" if usd else _UNKNOWN, paid


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.strip().ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]
