"""The estimate as lines of a plan: models, GPUs, memory, tokens, FLOPs, hours and dollars, and what was assumed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from roro_ray.config import Config, ModelConfig
from roro_ray.engines.shapes import Shape, read_shape
from roro_ray.estimate.memory import GIB, GPUS_PER_NODE, Role, check_together, plan_roles, stage_gpus
from roro_ray.estimate.speed import measure_speed, stage_dollars, stage_hours
from roro_ray.estimate.work import JUDGE, ROUTER, RUBRICOR, WRITER, Stage, Work, count_steps, plan_stages

_LEARNERS = ("LoRA learner", "router learner")
_UNKNOWN = "no config.json in a directory, in the hub's cache or among the shipped copies"
_FULL, _LORA = 8.0, 6.0  # FLOPs per parameter and token: forward, backward, and the forward pass again


def describe_estimate(config: Config) -> list[str]:
    """Lines for `--dry-run`; none where all models are the embedded world's in memory: their cost nobody asks for."""
    if all(model.path.startswith("world:") and model.engine == "hf" for model in config.pool.models):
        return []
    shapes = _read_shapes(config)
    roles, stages = plan_roles(config), plan_stages(config)
    warnings = [warning for role in roles for warning in role.warnings]
    warnings += check_together(roles, config.ray.gpu_memory_gb * GIB)
    return [
        *_model_lines(config, shapes),
        *_gpu_lines(config, roles),
        *(_memory_line(role, config) for role in roles),
        *_stage_lines(config, shapes, roles, stages),
        *_assumption_lines(config),
        *(f"WARNING      {warning}" for warning in warnings),
    ]


def _read_shapes(config: Config) -> dict[str, Shape | None]:
    """Shapes by the name of the work: pool models by name, then router encoder, Rubricor and Judge."""
    shapes = {model.name: pool_shape(model) for model in config.pool.models}
    if config.router.encoder:
        shapes[ROUTER] = read_shape(config.router.encoder, config.router.encoder_revision)
    adapted = config.reward.backend == "engine"
    for name, path in ((RUBRICOR, config.reward.rubricor), (JUDGE, config.reward.judge)):
        served = replace(config.reward.engine, path=config.lora.base, revision=config.lora.revision)
        shapes[name] = pool_shape(served) if adapted else read_shape(path)
    if adapted and not config.warm.writer:
        shapes[WRITER] = pool_shape(config.warm.engine)
    return shapes


def pool_shape(model: ModelConfig) -> Shape | None:
    """The shape of a model that runs here, or what the settings say of the size of one behind an API."""
    if model.engine != "openai":
        return read_shape(model.path, model.revision)
    parameters = int(float(model.engine_args.get("parameters", 0)))
    active = int(float(model.engine_args.get("active_parameters", 0))) or parameters
    named = model.api_model or model.path
    return Shape(named, "engine_args", parameters, active, 0, 0, 0, 0, 0, 0, 0) if parameters else None


def _model_lines(config: Config, shapes: Mapping[str, Shape | None]) -> list[str]:
    lines: list[str] = []
    for name, shape in shapes.items():
        if shape is None:
            remote = {model.name for model in config.pool.models if model.engine == "openai"}
            remote |= {WRITER} if config.warm.engine.engine == "openai" else set()
            remote |= {RUBRICOR, JUDGE} if config.reward.engine.engine == "openai" else set()
            known = "behind an API" if name in remote else f"unknown ({_UNKNOWN})"
        else:
            active = "" if shape.active == shape.parameters else f" ({shape.active / 1e9:.3g} B active)"
            states = f", {shape.kv_bytes() / 1024:.0f} KiB of keys and values in 16 bits" if shape.kv_width else ""
            known = (
                f"{shape.path}: {show_count(shape.parameters)} parameters{active}; a token "
                f"{show_count(shape.flops_per_token)}FLOP{states} ({shape.source})"
            )
        lines.append(f"{'shapes' if not lines else '':<12} {name}: {known}")
    return lines


def _gpu_lines(config: Config, roles: Sequence[Role]) -> list[str]:
    held = stage_gpus(roles)
    if not held:
        return ["GPUs         none"]
    most = max(held, key=lambda stage: held[stage])
    nodes = math.ceil(held[most] / GPUS_PER_NODE)
    asked = ", ".join(f"{stage} {gpus:g}" for stage, gpus in held.items())
    return [
        f"GPUs         {held[most]:g} at once at most ({most}), {nodes} node(s) of {GPUS_PER_NODE}: {asked}",
        *(
            f"             {role.name}: {role.processes} x {role.gpus:g} in {', '.join(role.stages)}"
            for role in roles
        ),
    ]


def _memory_line(role: Role, config: Config) -> str:
    if role.shape is None:
        return f"memory       {role.name}: unknown, of {role.limit / GIB:.1f} GiB"
    parts = " + ".join(f"{name} {size / GIB:.1f}" for name, size in role.parts.items() if size)
    line = f"memory       {role.name}: {parts} = {role.needed / GIB:.1f} of {role.limit / GIB:.1f} GiB a GPU"
    if role.kv_token:
        episode = config.episode
        longest = config.estimate.prompt_tokens + episode.max_tokens + episode.max_answer_tokens
        together = role.kv_room / role.kv_token / longest
        line += f"; {role.kv_room / GIB:.1f} GiB for keys and values: {together:.1f} sequences of {longest} tokens"
    return line


def _stage_lines(
    config: Config, shapes: Mapping[str, Shape | None], roles: Sequence[Role], stages: Sequence[Stage]
) -> list[str]:
    held = stage_gpus(roles)
    lines, total_gpu_hours, total_usd = [], 0.0, 0.0
    for stage in stages:
        lines.append(f"expected     {stage.name}: {_count_episodes(stage)}{_sum_flops(config, stage, shapes)}")
        lines += [f"{'':<12} {_work_line(config, name, work, shapes.get(name))}" for name, work in stage.work.items()]
        busy = _busy_seconds(config, roles, stage)
        if busy and held.get(stage.name):
            sharing = {role.name for role in roles if role.gpus < 1}
            hours = stage_hours(busy, _LEARNERS, sharing, config.estimate.overhead)
            gpus = math.ceil(held[stage.name])
            total_gpu_hours += hours * gpus
            slowest = max(busy, key=lambda name: busy[name])
            spent = f"{hours:.1f} h on {gpus} GPU(s) = {hours * gpus:.1f} GPU hours"
            lines.append(f"             {spent}; {slowest} sets the pace")
        usd = stage_dollars(stage, config)
        total_usd += usd
        if usd:
            lines.append(f"             {usd:,.2f} USD by the models' prices")
    if total_gpu_hours:
        lines.append(f"expected     {total_gpu_hours:,.0f} GPU hours in all, from the assumptions below")
    if total_usd:
        lines.append(f"expected     {total_usd:,.2f} USD in all")
    return lines


def _count_episodes(stage: Stage) -> str:
    unit = {"learn_reward": "updates", "warm_start": "pairs"}.get(stage.name, "episodes")
    return f"{stage.episodes:,.0f} {unit}"


def _work_line(config: Config, name: str, work: Work, shape: Shape | None) -> str:
    counts = {"read": work.read, "written": work.written, "trained": work.trained}
    parts = [f"{show_count(tokens).strip()} {what}" for what, tokens in counts.items() if tokens]
    flops = "" if shape is None else f" = {show_count(_count_flops(config, name, work, shape))}FLOP"
    return f"{name}: tokens {', '.join(parts)}{flops}"


def _count_flops(config: Config, name: str, work: Work, shape: Shape) -> float:
    trained = _train_factor(config, name) * shape.active * work.trained
    return shape.flops_per_token * (work.read + work.written) + trained


def _train_factor(config: Config, name: str) -> float:
    """FLOPs per parameter and token of training the model of that name."""
    adapter = config.router.encoder_rank > 0 if name == ROUTER else config.reward.backend == "engine"
    return _LORA if adapter else _FULL


def _sum_flops(config: Config, stage: Stage, shapes: Mapping[str, Shape | None]) -> str:
    known = {name: shape for name in stage.work if (shape := shapes.get(name)) is not None}
    total = sum(_count_flops(config, name, stage.work[name], shape) for name, shape in known.items())
    if not total:
        return ""
    missing = "" if len(known) == len(stage.work) else " without the models that are unknown"
    return f", {show_count(total)}FLOP{missing}"


def _busy_seconds(config: Config, roles: Sequence[Role], stage: Stage) -> dict[str, float]:
    """Seconds that each role needs for its part of a stage; roles of unknown shape are left out."""
    together = float(config.ray.workers * config.ray.concurrency)
    context = config.estimate.prompt_tokens + min(config.estimate.tokens, config.episode.max_tokens) / 2
    written = sum(stage.work.get(model.name, Work()).written for model in config.pool.models)
    busy = {}
    for role in roles:
        work = _role_work(role, stage)
        if role.shape is None or stage.name not in role.stages or work == Work():
            continue
        # An episode is with one engine at a time: with each for the share of the tokens that it writes.
        share = work.written / written if written and role.name.startswith("engine ") else 1.0
        factor = _train_factor(config, ROUTER if role.name == "router learner" else JUDGE)
        speed = measure_speed(role, together * share, context, config.estimate, factor)
        busy[role.name] = speed.seconds(work)
    return busy


def _role_work(role: Role, stage: Stage) -> Work:
    """What of a stage's work a role does: engines read and write, learners train."""
    nothing = Work()
    if role.name.startswith("engine "):
        name = role.name.removeprefix("engine ")
        return stage.work.get(name, nothing)
    if role.name == "rollout workers":
        work = stage.work.get(ROUTER, nothing)
        return Work(read=work.read)
    both = stage.work.get(RUBRICOR, nothing) + stage.work.get(JUDGE, nothing)
    if role.name == "reward engine":
        return Work(both.read, both.sent, both.written)
    learned = both if role.name == "LoRA learner" else stage.work.get(ROUTER, nothing)
    return Work(trained=learned.trained)


def _assumption_lines(config: Config) -> list[str]:
    e = config.estimate
    return [
        f"assumed      {e.tokens} tokens a trajectory in {count_steps(config):.0f} steps, {e.prompt_tokens} a prompt, "
        f"{e.answer_tokens} a final answer, {e.rubric_tokens} a rubric; {e.large_share:.0%} dear steps where a policy "
        "decides",
        f"             a GPU of {config.ray.gpu_memory_gb:g} GiB, {e.gpu_tflops:g} TFLOP/s, {e.gpu_bandwidth:g} TB/s; "
        f"reading at {e.read_utilisation:.0%} and training at {e.train_utilisation:.0%} of the first, writing at "
        f"{e.write_utilisation:.0%} of the second; hours x {e.overhead:g}",
        "             read 2N, written 2N, trained 6N (LoRA) or 8N FLOP a token; nothing of this is measured. "
        "estimate.* changes it",
    ]


def show_count(value: float) -> str:
    """A number with its unit of thousands: 14.8 B, 3.2 T, 5.1 P (FLOPs in powers of ten)."""
    for limit, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g} "
