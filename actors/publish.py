"""The board: where the learner publishes weights and tells how it is getting on.

Weights travel as one object-store reference with a version. The learner publishes, and a rollout worker that is
asked to roll out under another version than it holds pulls the reference; one that was restarted holds none and
pulls as well. The board owns the references, so that they outlive a learner that is killed. It also keeps the
learner's messages for the driver, which would otherwise hear nothing until training ends.

It lives on the driver's node, so that no other node takes it along. Should its process die all the same, weights are
missed (MissingWeightsError) by whoever asks for them next, and published again by whoever made them.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.waiting import wait_for
from roro_ray.errors import MissingWeightsError

CHANNEL = "router"
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Weights:
    """Published weights: a serial number that no other publication has, the learner's version, and the reference.

    The reference stands in a tuple so that Ray hands it on instead of fetching it for whoever is called.
    """

    serial: int
    version: int
    refs: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Heard:
    """Messages of a channel since the last time; `start` and `born` are what to ask with the next time."""

    messages: tuple[dict[str, Any], ...] = ()
    start: int = 0
    born: str = ""


class Board:
    """The actor behind `BoardClient`."""

    def __init__(self) -> None:
        # From another number after a restart, so that nobody takes new weights for old ones of the same serial number.
        self._serial = uuid.uuid4().int % 2**62
        self._weights: dict[str, dict[int, Weights]] = {}
        self._messages: dict[str, list[dict[str, Any]]] = {}
        self._born = uuid.uuid4().hex  # another after a restart, when messages are counted anew

    def publish(self, channel: str, version: int, blob: bytes, keep: int) -> Weights:
        self._serial += 1
        held = self._weights.setdefault(channel, {})
        held.pop(version, None)
        held[version] = Weights(self._serial, version, (ray.put(blob),))
        for old in list(held)[:-keep]:  # in order of publication
            del held[old]
        return held[version]

    def look_up(self, channel: str, version: int | None) -> Weights | None:
        held = self._weights.get(channel, {})
        if version is None:
            return next(reversed(held.values()), None)
        if version not in held:
            raise MissingWeightsError(
                f"weights of version {version} are not on the board: channel {channel!r} holds "
                f"{sorted(held) or 'none'}. Publish them first."
            )
        return held[version]

    def tell(self, channel: str, message: dict[str, Any]) -> None:
        self._messages.setdefault(channel, []).append(message)

    def hear(self, channel: str, start: int, born: str) -> Heard:
        first = start if born == self._born else 0
        messages = self._messages.get(channel, [])
        return Heard(tuple(messages[first:]), len(messages), self._born)


@dataclass(frozen=True)
class BoardClient:
    """A picklable handle on the board, for the driver, the learner's ranks and the pool."""

    actor: Any
    timeout_s: float = _TIMEOUT_S

    @classmethod
    def start(cls) -> BoardClient:
        """Start a board on this node; it asks for no CPU."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(Board).options(num_cpus=0, max_restarts=-1, max_task_retries=2, scheduling_strategy=here)
        return cls(actor.remote())

    def publish(self, blob: bytes, version: int, channel: str = CHANNEL, keep: int = 2) -> Weights:
        """Publish weights (serialised) under a version; the last `keep` versions of a channel stay available."""
        ref = self.actor.publish.remote(channel, version, blob, keep)
        weights: Weights = self._wait(ref, f"publishing weights of version {version}")
        return weights

    def look_up(self, version: int | None = None, channel: str = CHANNEL) -> Weights | None:
        """The weights of a version, or the last published (None where nothing is) when no version is named.

        Raises:
            MissingWeightsError: that version is not on the board.
        """
        ref = self.actor.look_up.remote(channel, version)
        weights: Weights | None = self._wait(ref, "looking up the router's weights")
        return weights

    def tell(self, message: dict[str, Any], channel: str) -> None:
        """Leave a message for the driver; does not wait."""
        self.actor.tell.remote(channel, message)

    def hear(self, channel: str, last: Heard | None = None) -> Heard:
        """The messages of a channel since the `last` time; those that a board took with it when it died are lost."""
        last = last or Heard()
        ref = self.actor.hear.remote(channel, last.start, last.born)
        heard: Heard = self._wait(ref, "reading the learner's messages")
        return heard

    def stop(self) -> None:
        """End the board's process."""
        ray.kill(self.actor)

    def _wait(self, ref: Any, what: str) -> Any:
        return wait_for(ref, what, self.timeout_s, self.actor)
