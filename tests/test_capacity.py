"""What can never fit fails at once with asked and available; what may is waited for."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from actors import capacity
from actors.autoscaler import find_growth
from actors.capacity import check_resources, wait_for_resources
from actors.placement import bundle_options
from actors.resources import Bundle
from actors.waiting import wait_for
from roro_ray.config import RayConfig
from roro_ray.errors import ResourceError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


class Holder:
    """Holds what it asked for."""

    def here(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


@pytest.fixture
def holder() -> Iterator[Any]:
    """An actor with nearly all CPUs of the local cluster."""
    handle = ray.remote(Holder).options(**bundle_options(Bundle({"CPU": 3.5}))).remote()
    wait_for(handle.here.remote(), "start", 20)
    yield handle
    ray.kill(handle)


@pytest.mark.parametrize(
    ("bundles", "told"),
    [
        ([Bundle({"CPU": 64.0})], r"its parts asks for CPU 64, more than any node has.*cluster has CPU 4"),
        (
            [Bundle({"CPU": 0.5})] * 20,
            r"it asks for 20 parts of CPU 0\.5 each, and at most 8 of them fit; the cluster has CPU 4",
        ),
        ([Bundle({"CPU": 0.5, "GPU": 1.0})], r"asks for CPU 0\.5, GPU 1, more than any node has"),
    ],
)
def test_what_can_never_fit_fails_at_once(bundles: list[Bundle], told: str) -> None:
    started = time.monotonic()
    with pytest.raises(ResourceError, match=told):
        wait_for_resources(bundles, "the test", RayConfig(timeout_s=30.0))
    assert time.monotonic() - started < 20.0, "it did not wait"
    assert check_resources(bundles, "the test", RayConfig(autoscaler=True))  # a cluster that can grow may yet have it


def test_what_fits_later_is_waited_for(holder: Any) -> None:
    with pytest.raises(ResourceError, match=r"waited 0\.3 s for CPU 2; free are CPU 0\.5 of CPU 4"):
        wait_for_resources([Bundle({"CPU": 1.0})] * 2, "the test", RayConfig(timeout_s=0.3))
    ray.kill(holder)
    wait_for_resources([Bundle({"CPU": 1.0})] * 2, "the test", RayConfig(timeout_s=20.0))


def test_where_nodes_may_come_it_waits_and_tells_what_for(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "_TELL_S", 0.3)
    late = r"waited 1 s for CPU 64; free are CPU [\d.]+ of CPU 4, being launched: nothing"
    with pytest.raises(ResourceError, match=late):
        wait_for_resources([Bundle({"CPU": 64.0})], "the test", RayConfig(autoscaler=True, grow_timeout_s=1.0))
    lines = [record.message for record in caplog.records if record.name == "actors.capacity"]
    # How much is free changes for a while after other tests: Ray's nodes tell of it in reports.
    assert re.fullmatch(r"the test waits for 1 x \(CPU 64\); free: CPU [\d.]+; being launched: nothing", lines[0])
    still = r"the test still waits after \d+ s; free: CPU [\d.]+; being launched: nothing"
    assert re.fullmatch(still, lines[1])
    from ray.util.placement_group import placement_group_table

    groups = [group for group in placement_group_table().values() if group["bundles"] == {0: {"CPU": 64.0}}]
    assert [group["state"] for group in groups] == ["REMOVED"], "nothing is left that an autoscaler would act on"


def test_a_local_cluster_is_not_taken_for_an_autoscaled_one() -> None:
    assert find_growth(expected=False) is None
