"""Hours and dollars of a stage, from tokens, shapes and the stated speed of a GPU.

    read    2 N tokens / (GPUs x peak FLOP/s x utilisation), N the active parameters
    write   tokens / b passes of max(bytes moved / bandwidth, 2 N b / FLOP/s), where a pass of b sequences moves the
            weights once and every sequence's keys and values, and b is what the memory left for them holds, at most the
            episodes under way
    train   2 (forward) + 4 (backward) + 2 (computed again under checkpointing) = up to 8 N a token; with LoRA no
            gradient of the base's weights is needed, which takes 2 of them off

Roles work at the same time, and the slowest sets the pace; those that share one GPU have it in turn, so their times add
up. A learner that must not lag waits for them and they for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from roro_ray.config import Config, EstimateConfig
from roro_ray.engines.shapes import Shape
from roro_ray.estimate.memory import Role
from roro_ray.estimate.work import JUDGE, RUBRICOR, WRITER, Stage, Work


@dataclass(frozen=True, slots=True)
class Speed:
    """What one role does in a second: tokens read, written and trained, and the sequences that it writes at once."""

    reads: float
    writes: float
    trains: float
    together: float

    def seconds(self, work: Work) -> float:
        """Time for some work, without the overhead."""
        parts = ((work.read, self.reads), (work.written, self.writes), (work.trained, self.trains))
        return sum(tokens / rate for tokens, rate in parts if tokens)


def measure_speed(role: Role, episodes: float, context: float, assumed: EstimateConfig, train_factor: float) -> Speed:
    """The speed of a role whose shape is known.

    Args:
        episodes: under way at once; the engine writes for at most so many.
        context: tokens that a sequence holds on average.
        train_factor: FLOPs per parameter and token of training; 0 for what is not trained.
    """
    assert role.shape is not None, "the speed of an unknown model cannot be worked out"
    shape, gpus = role.shape, max(role.gpus, 1.0) * role.processes
    peak = gpus * assumed.gpu_tflops * 1e12
    moved = gpus * assumed.gpu_bandwidth * 1e12 * assumed.write_utilisation
    room = role.kv_room / role.kv_token / max(context, 1.0) if role.kv_token else episodes
    together = max(1.0, min(episodes, room))
    flops = shape.flops_per_token
    weights = _weights_moved(shape, role.dtype, together)
    one_pass = max(
        (weights + together * context * role.kv_token) / moved, flops * together / (peak * assumed.read_utilisation)
    )
    return Speed(
        reads=peak * assumed.read_utilisation / flops,
        writes=together / one_pass,
        trains=peak * assumed.train_utilisation / (train_factor * shape.active) if train_factor else 0.0,
        together=together,
    )


def _weights_moved(shape: Shape, dtype: str, together: float) -> float:
    """Bytes of weights that a pass of so many sequences touches: of a mixture of experts, more with more sequences."""
    return shape.weight_bytes(dtype) * min(1.0, shape.active * together / shape.parameters)


def stage_hours(
    busy: Mapping[str, float], learners: Collection[str], sharing: Collection[str], overhead: float
) -> float:
    """Wall-clock hours of a stage.

    Args:
        busy: seconds that each role needs for its part, with its GPUs to itself.
        learners: those of the roles that train; they come after the others.
        sharing: those that share one GPU.
    """
    generate = {name: seconds for name, seconds in busy.items() if name not in learners}
    shared = sum(seconds for name, seconds in generate.items() if name in sharing)
    alone = [seconds for name, seconds in generate.items() if name not in sharing]
    learn = max((seconds for name, seconds in busy.items() if name in learners), default=0.0)
    return (max([shared, *alone]) + learn) * overhead / 3600


def stage_dollars(stage: Stage, config: Config) -> float:
    """The price of all tokens: read, sent again and written."""
    total = 0.0
    engines = [(model.name, model) for model in config.pool.models]
    engines += [(WRITER, config.warm.engine), (RUBRICOR, config.reward.engine), (JUDGE, config.reward.engine)]
    for name, model in engines:
        work = stage.work.get(name, Work())
        again = max(work.sent - work.read, 0.0)
        total += work.read * model.price_in + again * model.price_cached + work.written * model.price_out
    return total / 1e6
