"""How a served step is decided: by a router somewhere, at the request's cost weight, and within its limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from roro_ray.routing.observation import Observation
from roro_ray.routing.opinion import charge_opinion, decide_priced, make_reading
from roro_ray.routing.policies import Policy
from roro_ray.types import Decision, Peek
from serve.backend import RouterFacts, Routers


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
            EngineUnavailableError: no router can be reached.
        """
        began = time.perf_counter()
        opinion = await self.routers.judge_reading(self.facts.version, make_reading(observation), self.session)
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
        decision = await self.policy.decide(observation)
        dear = sum(step.model > 0 for step in observation.steps)
        return replace(decision, model=0) if decision.model > 0 and dear >= self.most else decision


def is_capped(decision: Decision) -> bool:
    """Whether a decision by a router went to the cheapest model although another one was likelier."""
    return decision.version >= 0 and decision.model == 0 and max(decision.probabilities) > decision.probabilities[0]
