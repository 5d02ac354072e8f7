"""The arithmetic of placement, by hand: what fits which node, what never fits any, and how it is told."""

from __future__ import annotations

import math
from typing import Any

import pytest

from actors.autoscaler import Growth, parse_kinds
from actors.capacity import describe_blindness
from actors.placement import bundle_options, make_scaling, role_bundle, role_options
from actors.resources import Bundle, Fleet, Node, find_impossible, format_amounts, matches, pack
from roro_ray.config import Config


@pytest.mark.parametrize(
    ("selector", "label", "fits"),
    [
        ("gpu", "gpu", True),
        ("gpu", "cpu", False),
        ("gpu", None, False),
        ("!gpu", "cpu", True),
        ("!gpu", "gpu", False),
        ("!gpu", None, True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "b", True),
        ("in(a, b)", "c", False),
        ("in(a, b)", None, False),
        ("!in(a, b)", "c", True),
        ("!in(a, b)", "a", False),
    ],
)
def test_a_selector_reads_a_label_as_ray_does(selector: str, label: str | None, fits: bool) -> None:
    assert matches({"tier": selector}, {} if label is None else {"tier": label}) is fits


@pytest.mark.parametrize(
    ("bundle", "places"),
    [
        (Bundle({"CPU": 0.3}), 13),
        (Bundle({"CPU": 0.1}), 40),  # 4 / 0.1 is a little less than 40 in floating point
        (Bundle({"CPU": 1, "l4": 1}), 2),
        (Bundle({"CPU": 1, "GPU": 0.0}), 4),
        (Bundle({"CPU": 1, "GPU": 1.0}), 0),
        (Bundle({"CPU": 8}), 0),
        (Bundle({"CPU": 1}, {"tier": "dear"}), 4),
        (Bundle({"CPU": 1}, {"tier": "!dear"}), 0),
        (Bundle({"CPU": 1}, {"zone": "a"}), 0),
    ],
)
def test_how_many_fit_on_a_node(bundle: Bundle, places: int) -> None:
    assert Node({"CPU": 4.0, "l4": 2.0}, {"tier": "dear"}).holds(bundle) == places


HEAD = Node({"CPU": 2.0})
CHEAP = Node({"CPU": 4.0}, {"tier": "cheap"}, "cheap", 3)
DEAR = Node({"CPU": 16.0, "h100": 8.0}, {"tier": "dear"}, "dear", 2)
FLEET = Fleet([HEAD], [CHEAP, DEAR], most=4)


@pytest.mark.parametrize(
    ("bundles", "told"),
    [
        ([Bundle({"CPU": 16})] * 2, None),
        ([Bundle({"CPU": 16})] * 3, "it asks for 3 parts of CPU 16 each, and at most 2 of them fit"),
        ([Bundle({"CPU": 4})] * 10, None),  # two dear nodes hold four each, and two cheap ones one each
        ([Bundle({"CPU": 4})] * 11, "it asks for 11 parts of CPU 4 each, and at most 10 of them fit"),
        (
            [Bundle({"CPU": 17})],
            "one of its parts asks for CPU 17, more than any node has: the largest node type, dear, has CPU 16, "
            "h100 8",
        ),
        (
            [Bundle({"CPU": 1, "h100": 9})],
            "one of its parts asks for CPU 1, h100 9, more than any node has: the largest node type, dear, has CPU 16, "
            "h100 8",
        ),
        (
            [Bundle({"CPU": 8}, {"tier": "cheap"})],
            "one of its parts asks for CPU 8 on a node with tier=cheap, more than any node has: the largest node type, "
            "cheap, has CPU 4, tier=cheap",
        ),
        (
            [Bundle({"CPU": 1}, {"zone": "a"})],
            "one of its parts asks for CPU 1 on a node with zone=a, and no node has such labels: the nearest node "
            "type, dear, has CPU 16, h100 8, no label zone",
        ),
        # Each kind of part would fit alone, all of them together do not: 2 x 16 and 2 x 4 and the head's 2.
        (
            [Bundle({"CPU": 8})] * 4 + [Bundle({"CPU": 1})] * 11,
            "it asks for CPU 43 in 15 parts, and there is at most CPU 42",
        ),
        ([], None),
    ],
)
def test_what_an_autoscaler_could_never_make_room_for(bundles: list[Bundle], told: str | None) -> None:
    assert find_impossible(bundles, FLEET) == told


def test_without_an_autoscaler_the_nodes_that_run_decide() -> None:
    assert find_impossible([Bundle({"CPU": 2})], Fleet([HEAD])) is None
    assert "the largest node has CPU 2" in str(find_impossible([Bundle({"CPU": 4})], Fleet([HEAD])))
    assert find_impossible([Bundle({"CPU": 4})], Fleet([])) == "it asks for CPU 4, and there is no node"


def test_a_kind_that_may_not_be_launched_is_no_help() -> None:
    spent = Node(DEAR.resources, DEAR.labels, "dear", 0)
    assert find_impossible([Bundle({"CPU": 8})], Fleet([HEAD], [spent], 4)) is not None
    assert find_impossible([Bundle({"CPU": 8})], Fleet([HEAD], [DEAR], 0)) is not None


def test_packing_puts_the_large_first_and_minds_labels() -> None:
    nodes = [Node({"CPU": 4.0}), Node({"CPU": 3.0}, {"tier": "dear"})]
    small, large = Bundle({"CPU": 1.0}), Bundle({"CPU": 4.0})
    assert pack([small, small, small, large], nodes)
    assert not pack([small, small, small, small, large], nodes)
    assert not pack([Bundle({"CPU": 4.0}, {"tier": "dear"})], nodes)
    assert not pack([Bundle({"CPU": 2.0})] * 3 + [small], [Node({"CPU": 3.5})] * 2), "7 CPUs, and never three pairs"


def test_nothing_packs_where_a_resource_is_used_up() -> None:
    assert not pack([Bundle({"CPU": 1})], [Node({"CPU": 0.0, "memory": 1.0})])


def test_amounts_are_told_as_asked() -> None:
    there = {"CPU": 4.0, "memory": 8 * 2.0**30, "object_store_memory": 1e9, "node:10.0.0.1": 1.0, "GPU": 0.0}
    assert format_amounts(there, {"CPU": 1.0}) == "CPU 4"
    assert format_amounts(there, {"memory": 1.0}) == "CPU 4, memory 8 GiB"
    assert format_amounts({"CPU": 0.0}) == "nothing"
    group = "11ea5135c90ec43133d7b3e6a28101000000"  # as Ray names what a placement group holds
    held = {f"CPU_group_0_{group}": 1.0, f"CPU_group_{group}": 2.0, f"bundle_group_{group}": 1000.0}
    assert format_amounts({"CPU": 2.0, **held}) == "CPU 2"
    assert format_amounts({"memory": math.inf, "CPU": 1.0}) == "CPU 1"


def test_a_cluster_file_tells_what_may_be_launched() -> None:
    kinds, most = parse_kinds(
        {
            "max_workers": 4,
            "head_node_type": "head",
            "available_node_types": {
                "head": {"resources": {"CPU": 2}},
                "cheap": {"resources": {"CPU": 4}, "labels": {"tier": "cheap"}, "max_workers": 9},
                "dear": {"resources": {"CPU": 16, "h100": 8, "memory": 2**30}},
            },
        }
    )
    assert kinds is not None and most == 4
    assert [(kind.name, kind.count) for kind in kinds] == [("head", 0), ("cheap", 4), ("dear", 4)]
    assert kinds[1].labels == {"tier": "cheap"}
    assert kinds[1].holds(Bundle({"memory": 2**40})), "a file that does not tell the memory proves nothing about it"
    assert not kinds[2].holds(Bundle({"memory": 2**40}))


def test_a_cluster_file_that_does_not_tell_resources_proves_nothing() -> None:
    config: dict[str, Any] = {"max_workers": 2, "available_node_types": {"m5": {"node_config": {}}}}
    assert parse_kinds(config) == (None, 2)


def make_config() -> Config:
    config = Config()
    config.pool.models[1].name = "large"
    config.ray.resources = {"engine": {"l4": 1.0}, "large": {"h100": 2.0}, "reward": {"memory": 2e9}}
    config.ray.labels = {"rollout": {"tier": "cheap"}, "engine": {"zone": "a"}}
    return config


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("rollout", Bundle({"CPU": 1}, {"tier": "cheap"})),
        ("learner", Bundle({"CPU": 1})),
        ("engine", Bundle({"CPU": 1, "l4": 1.0}, {"zone": "a"})),
        ("small", Bundle({"CPU": 1, "l4": 1.0}, {"zone": "a"})),
        ("large", Bundle({"CPU": 1, "h100": 2.0}, {"zone": "a"})),  # in place of its role, key by key
        ("reward", Bundle({"CPU": 1, "memory": 2e9})),
    ],
)
def test_a_model_stands_in_place_of_its_role(role: str, expected: Bundle) -> None:
    assert role_bundle(make_config(), role, 1, 0.0) == expected


def test_a_bundle_in_the_forms_that_ray_takes() -> None:
    assert role_options(make_config(), "large", 0.5, 2.0) == {
        "num_cpus": 0.5,
        "num_gpus": 2.0,
        "resources": {"h100": 2.0},
        "label_selector": {"zone": "a"},
    }
    assert bundle_options(Bundle({"CPU": 1, "memory": 2e9}))["memory"] == 2e9
    scaling = make_scaling(Bundle({"CPU": 1, "GPU": 1.0, "l4": 1.0}, {"tier": "dear"}), 3)
    assert scaling.num_workers == 3 and scaling.use_gpu
    assert scaling.resources_per_worker == {"CPU": 1, "GPU": 1.0, "l4": 1.0}
    assert scaling.label_selector == {"tier": "dear"}
    assert not make_scaling(Bundle({"CPU": 1}), 1).use_gpu


def test_who_asks_an_autoscaler_that_sees_no_labels_for_a_label_alone_is_told() -> None:
    labelled, marked = Bundle({"CPU": 1, "GPU": 1}, {"tier": "a"}), Bundle({"CPU": 1, "l4": 1}, {"tier": "a"})
    blind, seeing = Growth(None, 0, {}, {}, sees_labels=False), Growth(None, 0, {}, {})
    assert "does not see labels" in describe_blindness([marked, labelled], blind)
    assert not describe_blindness([marked, Bundle({"CPU": 1})], blind)
    assert not describe_blindness([labelled], seeing) and not describe_blindness([labelled], None)
