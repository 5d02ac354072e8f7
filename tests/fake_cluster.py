"""Clusters of several nodes on one machine: `fake_cluster`, which an autoscaler grows and shrinks, and `many_nodes`.

Both are real Rays of real raylets; only the machines under them are one. The driver of a test has to be a process of
its own (the test process may be in the shared local Ray): `Cluster.call` runs a function of a test module there.

    with fake_cluster({"gpu": FakeType({"CPU": 1, "l4": 1}, {"tier": "dear"}, most=3)}, idle_s=3) as cluster:
        seen = cluster.call("test_mine:scenario", 3)  # `scenario` may call ray.init(): RAY_ADDRESS is set
        cluster.wait_for_nodes(1)  # the head alone: idle nodes were taken away

    with many_nodes() as cluster:
        node = cluster.add_node({"CPU": 2, "l4": 1}, {"tier": "dear"})
        cluster.kill_node(node)  # SIGKILL to all of it: a machine that is gone

Nothing here runs `ray stop`, which would end every Ray of the machine: what was started is ended by its pids. Ray's own
`ray.cluster_utils.AutoscalingCluster` does run it, and needs a file that the wheel lacks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from processes import BIN, ROOT, clean_environment, free_ports, short_temp_dir, wait_for_port
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.exceptions import RaySystemError

_HEAD = "ray.head.default"  # the name that Ray's fake provider gives it
_STORE_BYTES = 100 * 2**20
_CALL = """
import importlib, json, sys
module, function = sys.argv[1].split(":")
result = getattr(importlib.import_module(module), function)(*json.loads(sys.argv[2]))
print("result:" + json.dumps(result))
"""


@dataclass(frozen=True)
class FakeType:
    """A kind of node that the autoscaler may launch: its resources and labels, and how many there are at most."""

    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1})
    labels: dict[str, str] = field(default_factory=dict)
    least: int = 0
    most: int = 1


@dataclass
class Cluster:
    """A running cluster: where it answers, and the environment of its drivers (RAY_ADDRESS in it)."""

    temp_dir: Path
    address: str
    environment: dict[str, str]
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def call(self, function: str, *args: Any, timeout_s: float = 100) -> Any:
        """Run `module:function` of tests/ in a driver of its own; arguments and result are JSON.

        Fails with the driver's output where it fails or takes longer.
        """
        command = [sys.executable, "-c", _CALL, function, json.dumps(args)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(
                f"{function} took longer than {timeout_s} s:\n{error.stdout}\n{error.stderr}"
            ) from None
        lines = [line for line in done.stdout.splitlines() if line.startswith("result:")]
        assert done.returncode == 0 and lines, f"{function} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return json.loads(lines[-1].removeprefix("result:"))

    def list_nodes(self) -> list[dict[str, Any]]:
        """Ray's records of the nodes that are alive."""
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        state = GlobalState()
        options = GcsClientOptions.create(self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        deadline = time.monotonic() + 60
        while True:
            state._initialize_global_state(options)
            try:
                return [node for node in state.node_table() if node["Alive"]]
            except RaySystemError:  # a machine with much else to do answers late
                if time.monotonic() > deadline:
                    raise
            finally:
                state.disconnect()

    def wait_for_nodes(self, count: int, timeout_s: float = 100) -> None:
        """Wait until so many nodes, the head among them, are alive."""
        deadline = time.monotonic() + timeout_s
        while (there := len(self.list_nodes())) != count:
            assert time.monotonic() < deadline, f"{there} nodes after {timeout_s} s, expected {count}"
            time.sleep(0.2)

    def add_node(
        self, resources: Mapping[str, float], labels: Mapping[str, str] | None = None, timeout_s: float = 100
    ) -> int:
        """Start a node, wait until it has joined, and give its number."""
        command = [str(BIN / "ray"), "start", "--block", f"--address={self.address}", "--node-ip-address=127.0.0.1"]
        before = {node["NodeID"] for node in self.list_nodes()}  # one that was killed may be among them for a while
        self.nodes.append(_start(command + _node_options(resources, labels or {}), self))
        deadline = time.monotonic() + timeout_s
        while {node["NodeID"] for node in self.list_nodes()} <= before:
            assert time.monotonic() < deadline, f"no node joined in {timeout_s} s"
            time.sleep(0.2)
        return len(self.nodes) - 1

    def kill_node(self, number: int) -> None:
        """End a node at once, as a machine that loses its power: raylet and workers get SIGKILL."""
        _kill_family(self.nodes[number])


@contextmanager
def many_nodes(cpus: float = 1, resources: Mapping[str, float] | None = None) -> Iterator[Cluster]:
    """A head alone (of these resources beside its CPUs), to which `add_node` adds others; no autoscaler."""
    with short_temp_dir() as temp_dir:
        port = free_ports(1)[0]
        # A node that is gone is missed after 2 s, not after 15.
        environment = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
        with _running(temp_dir, port, _node_options({"CPU": cpus, **(resources or {})}, {}), environment) as cluster:
            yield cluster


@contextmanager
def fake_cluster(
    types: Mapping[str, FakeType], idle_s: float = 6, head_cpus: float = 1, most: int = 8, version: int = 1
) -> Iterator[Cluster]:
    """A head of `head_cpus`, and an autoscaler that launches nodes of `types` and takes idle ones away after `idle_s`.

    Args:
        most: nodes beside the head, of all types together.
        version: of Ray's autoscaler: 1 is that of `ray up`, 2 that of KubeRay, which also minds labels.
    """
    with short_temp_dir() as temp_dir:
        port = free_ports(1)[0]
        place = temp_dir / "cluster.json"
        config = _make_config(types, idle_s, head_cpus, most, f"127.0.0.1:{port}")
        place.write_text(json.dumps(config))
        options = [*_node_options({"CPU": head_cpus}, {}), f"--autoscaling-config={place}"]
        environment = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        if version == 2:  # it has to recognise the head, which it did not launch
            names = ("RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_CLOUD_INSTANCE_ID")
            environment |= {"RAY_enable_autoscaler_v2": "1", "RAY_NODE_TYPE_NAME": _HEAD}
            environment |= dict.fromkeys(names, FAKE_HEAD_NODE_ID)
        with _running(temp_dir, port, options, environment) as cluster:
            yield cluster


def _make_config(
    types: Mapping[str, FakeType], idle_s: float, head_cpus: float, most: int, address: str
) -> dict[str, Any]:
    """A cluster file for Ray's fake provider; without any one of the provider's keys it does not work."""
    provider = {
        # By its own name it would want a file that the wheel lacks (autoscaler 2).
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,  # else one node a launch
        "disable_node_updaters": True,  # else it wants an ssh_user
        "disable_launch_config_check": True,
        "use_node_id_as_ip": True,  # else nodes are not recognised, and never taken away
        "gcs_address": address,  # else port 6379
    }
    kinds: dict[str, Any] = {
        name: {
            "resources": {**each.resources, "object_store_memory": _STORE_BYTES},
            "labels": each.labels,
            "node_config": {},
            "min_workers": each.least,
            "max_workers": each.most,
        }
        for name, each in types.items()
    }
    kinds[_HEAD] = {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    starts = ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude")
    return {
        "cluster_name": "fake",
        "max_workers": most,
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 100.0,
        "provider": provider,
        "available_node_types": kinds,
        "head_node_type": _HEAD,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "rsync_filter": [],
        "file_mounts_sync_continuously": False,
        **{key: [] for key in (*lists, *starts)},
    }


def _node_options(resources: Mapping[str, float], labels: Mapping[str, str]) -> list[str]:
    custom = {key: value for key, value in resources.items() if key not in ("CPU", "GPU")}
    return [
        f"--num-cpus={resources.get('CPU', 0):g}",
        f"--num-gpus={resources.get('GPU', 0):g}",
        f"--resources={json.dumps(custom)}",
        f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}",
        f"--object-store-memory={_STORE_BYTES}",
    ]


@contextmanager
def _running(temp_dir: Path, port: int, options: list[str], extra: dict[str, str]) -> Iterator[Cluster]:
    """A head and what joins it, ended by their pids."""
    address = f"127.0.0.1:{port}"
    environment = {**clean_environment(temp_dir), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", **extra}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    cluster = Cluster(temp_dir, address, environment)
    names = (
        "ray-client-server-port",
        "metrics-export-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
    )
    ports = [f"--{name}={free}" for name, free in zip(names, free_ports(4), strict=True)]
    command = [str(BIN / "ray"), "start", "--head", "--block", "--include-dashboard=false", f"--temp-dir={temp_dir}"]
    head = _start([*command, "--node-ip-address=127.0.0.1", f"--port={port}", *ports, *options], cluster)
    try:
        wait_for_port(port, head, temp_dir / "ray.log")
        environment["RAY_ADDRESS"] = address  # from here on: a head must not see it
        cluster.wait_for_nodes(1)
        yield cluster
    finally:
        for process in (*cluster.nodes, head):
            _kill_family(process)


def _start(command: list[str], cluster: Cluster) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in cluster.environment.items() if key != "RAY_ADDRESS"}
    with (cluster.temp_dir / "ray.log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _kill_family(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children by pid, and wait for it."""
    if process.poll() is None:
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait(20)
