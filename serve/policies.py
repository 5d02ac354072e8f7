"""How a served step is decided: by a router somewhere, at the request's cost weight, and within its limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from roro_ray.errors import EngineUnavailableError
from roro_ray.routing.observation import Observation
from roro_ray.routing.opinion import charge_opinion, decide_priced, make_reading
from roro_ray.routing.policies import Policy
from roro_ray.types import Decision, Peek, Step
from serve.backend import RouterFacts, Routers, UnknownRouterError


@dataclass(frozen=True)
class ServedPolicy:
    """Asks one version of the router and decides at the observation's cost weight.

    `session` keeps the calls of one trajectory together; `on_seconds` is told how long each decision took.
    """

    routers: Routers
    facts: RouterFacts
    session: str
    on_seconds: Callable[[float], None] = lambda seconds: None

    @property
    def peek(self) -> Peek:
        """What the router was made to look at."""
        return self.facts.peek

    @property
    def version(self) -> int:
        """The version asked."""
        return self.facts.version

    async def decide(self, observation: Observation) -> Decision:
        """Choose a model.

        Raises:
            EngineUnavailableError: no router can be reached, or the version was let go since the answer began.
        """
        began = time.perf_counter()
        try:
            opinion = await self.routers.judge_reading(self.facts.version, make_reading(observation), self.session)
        except UnknownRouterError as error:
            raise EngineUnavailableError(f"{self.facts.name} is no longer loaded: ask another version") from error
        self.on_seconds(time.perf_counter() - began)
        charge_opinion(observation, opinion)
        return decide_priced(opinion, observation.cost_weight)


@dataclass(frozen=True)
class CappedPolicy:
    """Lets a policy choose a dearer model at most `most` times; from then on the cheapest writes.

    The decision keeps the probabilities, so that a client sees where the cap, not the router, decided.
    """

    policy: Policy
    most: int

    @property
    def peek(self) -> Peek:
        """As the policy."""
        return self.policy.peek

    @property
    def version(self) -> int:
        """As the policy."""
        return self.policy.version

    async def decide(self, observation: Observation) -> Decision:
        """The policy's choice, or the cheapest model."""
        return cap_decision(await self.policy.decide(observation), observation.steps, self.most)


def cap_decision(decision: Decision, steps: Sequence[Step], most: int | None) -> Decision:
    """The decision after these steps, of which at most `most` (None: any number) may be by a dearer model."""
    if most is None or decision.model == 0 or sum(step.model > 0 for step in steps) < most:
        return decision
    return replace(decision, model=0)


def is_capped(decision: Decision) -> bool:
    """Whether a decision by a router went to the cheapest model although another one was likelier."""
    return decision.version >= 0 and decision.model == 0 and max(decision.probabilities) > decision.probabilities[0]
