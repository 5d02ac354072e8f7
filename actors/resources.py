"""What actors ask of the nodes of a cluster, and whether the nodes can ever give it: arithmetic, without Ray.

Whatever is refused here can never be had: both bounds (how often a part fits, how much there is of each resource) are
upper ones. What passes may still have to wait, or fail to fit for reasons that only packing all parts would show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from roro_ray.placement import Amounts, Bundle, format_amounts

_TOLERANCE = 1e-9
_WITHOUT_END = 1e9


@dataclass(frozen=True)
class Node:
    """A node of the cluster, or a kind of node that an autoscaler may launch.

    `count` is the most that there can be; `name` is that of the kind, empty for a node that runs.
    """

    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    name: str = ""
    count: int = 1

    def holds(self, bundle: Bundle) -> int:
        """How many actors with this bundle fit on the node while it is empty."""
        if not matches(bundle.labels, self.labels):
            return 0
        shares = [self.resources.get(key, 0.0) / value for key, value in bundle.resources.items() if value > 0]
        return int(min([*shares, _WITHOUT_END]) + _TOLERANCE)

    def nearness(self, bundle: Bundle) -> tuple[bool, int, float]:
        """Orders nodes by how nearly they hold a bundle: labels, then kinds of resources, then shares of them."""
        shares = [self.resources.get(key, 0.0) / value for key, value in bundle.resources.items() if value > 0]
        enough = sum(share + _TOLERANCE >= 1 for share in shares)
        return matches(bundle.labels, self.labels), enough, sum(shares)

    def describe(self, bundle: Bundle) -> str:
        """What it has, in the words of what is asked for."""
        labels = [f"{key}={self.labels[key]}" for key in sorted(bundle.labels) if key in self.labels]
        missing = [f"no label {key}" for key in sorted(bundle.labels) if key not in self.labels]
        return ", ".join([format_amounts(self.resources, bundle.resources), *labels, *missing])


@dataclass(frozen=True)
class Fleet:
    """All nodes that a cluster may have at once.

    Args:
        running: the nodes that are there, those of launchable kinds left out.
        kinds: what an autoscaler may launch, those that run included.
        most: nodes of all kinds together.
    """

    running: Sequence[Node]
    kinds: Sequence[Node] = ()
    most: int = 0

    def count_places(self, bundle: Bundle) -> int:
        """An upper bound of how many actors with this bundle fit at once, alone on all nodes."""
        return sum(node.holds(bundle) for node in self.running) + int(
            self._sum_best([(kind.holds(bundle), kind.count) for kind in self.kinds])
        )

    def count_amount(self, resource: str) -> float:
        """An upper bound of how much there can be of a resource."""
        return sum(node.resources.get(resource, 0.0) for node in self.running) + self._sum_best(
            [(kind.resources.get(resource, 0.0), kind.count) for kind in self.kinds]
        )

    def find_nearest(self, bundle: Bundle) -> Node | None:
        """The node or kind of node that comes nearest to holding a bundle."""
        launchable = [kind for kind in self.kinds if kind.count > 0 and self.most > 0]
        return max([*launchable, *self.running], key=lambda node: node.nearness(bundle), default=None)

    def _sum_best(self, values: Sequence[tuple[float, int]]) -> float:
        """The largest sum over `most` nodes, where each value may be taken `count` times."""
        left, total = self.most, 0.0
        for value, count in sorted(values, reverse=True):
            taken = min(count, left)
            total, left = total + value * taken if taken else total, left - taken
        return total


def find_impossible(bundles: Sequence[Bundle], fleet: Fleet) -> str | None:
    """Why these actors can never all run at once on the fleet, or None where nothing shows that they cannot."""
    parts: dict[str, list[Bundle]] = {}
    for bundle in bundles:
        parts.setdefault(str(bundle), []).append(bundle)
    for text, same in parts.items():
        places = fleet.count_places(same[0])
        if places == 0:
            return _describe_misfit(same[0], fleet)
        if places < len(same):
            return f"it asks for {len(same)} parts of {text} each, and at most {places} of them fit"
    asked = add_bundles(bundles)
    there = {key: fleet.count_amount(key) for key in asked}
    if lacks(asked, there):
        return (
            f"it asks for {format_amounts(asked)} in {len(bundles)} parts, and there is at most {format_amounts(there)}"
        )
    return None


def _describe_misfit(bundle: Bundle, fleet: Fleet) -> str:
    nearest = fleet.find_nearest(bundle)
    if nearest is None:
        return f"it asks for {bundle}, and there is no node"
    labelled = matches(bundle.labels, nearest.labels)
    kind, why = ("largest", "more than any node has") if labelled else ("nearest", "and no node has such labels")
    there = f"the {kind} node type, {nearest.name}," if nearest.name else f"the {kind} node"
    return f"one of its parts asks for {bundle}, {why}: {there} has {nearest.describe(bundle)}"


def pack(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> bool:
    """Whether the bundles are seen to fit side by side, the largest put first; False may also mean: not found."""
    free = [(dict(node.resources), node.labels) for node in nodes]
    total = add_amounts([node.resources for node in nodes])

    def size(bundle: Bundle) -> float:
        return max(
            (value / (total.get(key) or value) for key, value in bundle.resources.items() if value > 0), default=0.0
        )

    for bundle in sorted(bundles, key=size, reverse=True):
        place = next(
            (left for left, labels in free if not lacks(bundle.resources, left) and matches(bundle.labels, labels)),
            None,
        )
        if place is None:
            return False
        for key, value in bundle.resources.items():
            place[key] = place.get(key, 0.0) - value
    return True


def matches(selectors: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node's labels are what the selectors ask for; a label that the node lacks is equal to nothing."""
    return all(_selects(selector, labels.get(key)) for key, selector in selectors.items())


def _selects(selector: str, label: str | None) -> bool:
    wanted = selector.removeprefix("!")
    values = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
    found = label is not None and label in [value.strip() for value in values]
    return found != selector.startswith("!")


def add_amounts(amounts: Sequence[Amounts]) -> dict[str, float]:
    """The sum of several amounts."""
    total: dict[str, float] = {}
    for each in amounts:
        for key, value in each.items():
            total[key] = total.get(key, 0.0) + value
    return total


def add_bundles(bundles: Sequence[Bundle]) -> dict[str, float]:
    """What several actors ask for together."""
    return add_amounts([bundle.resources for bundle in bundles])


def lacks(asked: Amounts, there: Amounts) -> bool:
    """Whether something is asked for that is not there, or not in this amount."""
    return any(value > there.get(key, 0.0) + _TOLERANCE for key, value in asked.items())
