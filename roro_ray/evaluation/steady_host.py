"""A host whose failed rollouts and searches are tried again, and which refuses to go on where too many are lost.

An accuracy over the queries that happened to work would flatter whoever fails on the hard ones. So what fails is tried
again; above `faults.max_failed_share` of a wave the evaluation ends with an error; and what is lost below that is NaN
in the scores, counted there, in the summary and in the metrics, and missing from every paired difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from roro_ray.cluster_config import FaultsConfig
from roro_ray.evaluation.methods import Host, Outcome
from roro_ray.evaluation.oracle import OracleResult
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.routing.failures import SteadyRun, Tally, make_policy, try_again
from roro_ray.types import Query


class SteadyHost:
    """A `Host` round another one; `tally` counts its rollouts, `searches` the oracle's."""

    def __init__(self, host: Host, config: FaultsConfig) -> None:
        self._host = host
        self._policy = make_policy(config, grouped=False)
        self._run = SteadyRun(host.run, self._policy, "evaluate")
        self.searches = Tally()

    @property
    def tally(self) -> Tally:
        """Of all rollouts so far."""
        return self._run.tally

    def run(self, specs: Sequence[EpisodeSpec]) -> list[Outcome]:
        """Roll out episodes; results in the order of the specs.

        Raises:
            RolloutError: more failed for good than the settings bear.
        """
        return self._run(specs)

    def use_router(self, directory: Path) -> None:
        """Load a saved router."""
        self._host.use_router(directory)

    def find_oracle(self, queries: Sequence[Query]) -> list[OracleResult]:
        """The oracle's searches, those that failed again.

        Raises:
            RolloutError: as for rollouts.
        """
        own = Tally()
        results = try_again(queries, self._host.find_oracle, lambda r: r.error is not None, self._policy, own)
        self.searches.add(own)
        lost = [EpisodeFailure(result.query_id, result.error) for result in results if result.error is not None]
        self._policy.check(lost, len(results), "evaluate, the oracle's search")
        return results
