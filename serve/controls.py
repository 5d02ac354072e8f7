"""From a request's model name and routing controls to the policy that decides, or an error that names the control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from roro_ray.engines.pool import EnginePool
from roro_ray.errors import RoroError, did_you_mean
from roro_ray.evaluation.calibration import check_calibration, find_point
from roro_ray.routing.opinion import TILT_CENTRE
from roro_ray.routing.policies import FixedPolicy, Policy
from serve.backend import RouterFacts, RouterList, Routers
from serve.policies import CappedPolicy, ServedPolicy
from serve.problems import bad_request, model_not_found
from serve.schema import ChatRequest, RoutingRequest

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Route:
    """How one request is routed: `name` answers the client's `model`; `version` is -1 where a single model writes."""

    name: str
    version: int
    cost_weight: float
    facts: RouterFacts | None
    fixed: int | None
    max_large_steps: int | None

    def make_policy(self, routers: Routers, session: str, on_seconds: Callable[[float], None]) -> Policy:
        """The policy of one trajectory."""
        if self.facts is None:
            assert self.fixed is not None
            return FixedPolicy(self.fixed)
        policy: Policy = ServedPolicy(routers, self.facts, session, on_seconds)
        return policy if self.max_large_steps is None else CappedPolicy(policy, self.max_large_steps)


def list_models(routers: RouterList, pool: EnginePool) -> list[str]:
    """Every name that `model` may be, `auto` first."""
    return [AUTO, *(facts.name for facts in routers.routers), *pool.names]


def plan_route(request: ChatRequest, routers: RouterList, pool: EnginePool, default_weight: float) -> Route:
    """Decide how a request is routed.

    Raises:
        ApiError: 404 for an unknown model, 400 for controls that contradict each other or cannot be met.
    """
    names, controls = list_models(routers, pool), request.routing
    if request.model not in names:
        raise model_not_found(request.model, names)
    if controls.force is not None and controls.force not in pool.names:
        hint = did_you_mean(controls.force, pool.names)
        raise bad_request(
            f"routing.force is {controls.force!r}: expected a model of the pool, one of {', '.join(pool.names)}{hint}",
            "routing.force",
        )
    single = controls.force or (request.model if request.model in pool.names else None)
    if single is not None:
        return _plan_single(single, request, pool)
    facts = routers.find(routers.default if request.model == AUTO else int(request.model.rpartition("v")[2]))
    if facts is None:
        raise model_not_found(request.model, names)
    weight = _choose_weight(controls, facts, pool, default_weight)
    return Route(facts.name, facts.version, weight, facts, None, controls.max_large_steps)


def _plan_single(name: str, request: ChatRequest, pool: EnginePool) -> Route:
    controls = request.routing
    if request.model in pool.names and request.model != name:
        raise bad_request(
            f"model {request.model!r} and routing.force {name!r} contradict each other: leave one out", "routing.force"
        )
    for control in ("cost_weight", "target", "max_large_steps"):
        if getattr(controls, control) is not None:
            raise bad_request(
                f"routing.{control} has no effect where the single model {name!r} writes every step: leave it out, or "
                f"ask for model {AUTO!r} without routing.force",
                f"routing.{control}",
            )
    return Route(name, -1, 0.0, None, pool.names.index(name), None)


def _choose_weight(controls: RoutingRequest, facts: RouterFacts, pool: EnginePool, default: float) -> float:
    if controls.cost_weight is not None:
        return controls.cost_weight
    if controls.target is None:
        return default if default >= 0 else TILT_CENTRE
    if facts.calibration is None:
        why = facts.problem or "it has not been calibrated"
        raise bad_request(
            f"routing.target cannot be used with {facts.name}: {why}. `python -m jobs.calibrate` makes "
            "the table that it needs; until then give routing.cost_weight",
            "routing.target",
        )
    try:
        check_calibration(facts.calibration, [model.fingerprint for model in pool.facts], facts.version)
        return find_point(facts.calibration, controls.target).cost_weight
    except RoroError as error:
        raise bad_request(str(error), "routing.target") from error

