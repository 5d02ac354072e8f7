"""What actors ask of the nodes of a cluster, and whether the nodes can ever give it: arithmetic, without Ray.

Whatever is refused here can never be had: both bounds (how often a part fits, how much there is of each resource) are
upper ones. What passes may still have to wait, or fail to fit for reasons that only packing all parts would show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Amounts = Mapping[str, float]
_TOLERANCE = 1e-9
_HIDDEN = ("object_store_memory", "node:")


@dataclass(frozen=True)
class Bundle:
    """What one actor asks of one node: amounts by resource (CPU, GPU, custom ones), and labels that the node needs.

    A label's value is one of Ray's selectors: `gpu`, `!gpu`, `in(a, b)` or `!in(a, b)`.
    """

    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        labels = [f"{key}={value}" for key, value in sorted(self.labels.items())]
        return format_amounts(self.resources) + (f" on a node with {', '.join(labels)}" if labels else "")


@dataclass(frozen=True)
class Node:
    """A node of the cluster, or a kind of node that an autoscaler may launch.

    `count` is the most that there can be; `name` is that of the kind, empty for a node that runs and is no such kind.
    """

    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    name: str = ""
    count: int = 1

    def holds(self, bundle: Bundle) -> int:
        """How many actors with this bundle fit on the empty node."""
        if not matches(bundle.labels, self.labels):
            return 0
        asked = {key: value for key, value in bundle.resources.items() if value > 0}
        shares = (self.resources.get(key, 0.0) / value for key, value in asked.items())
        most = min(shares, default=math.inf)
        return 10**9 if math.isinf(most) else int(most + _TOLERANCE)


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


def format_amounts(amounts: Amounts, asked: Amounts | None = None) -> str:
    """`CPU 4, GPU 1, l4 2, memory 8 GiB`: what a person asks for, zeros left out.

    Args:
        asked: given where `amounts` is what there is: memory, which every node has, is told where it is asked for.
    """
    texts = []
    for key, value in sorted(amounts.items()):
        if not value or key.startswith(_HIDDEN) or (key == "memory" and asked is not None and key not in asked):
            continue
        texts.append(f"{key} {value / 2**30:.3g} GiB" if key == "memory" else f"{key} {value:g}")
    return ", ".join(texts) or "nothing"
