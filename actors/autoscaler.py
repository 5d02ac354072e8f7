"""Which nodes an autoscaler may still launch, so that what no node will ever hold is refused instead of waited for.

Ray tells its drivers what runs and what is being started, not what could be: its autoscaler reads that from the cluster
file. So a task on the head reads the file that the autoscaler's process was started with. On KubeRay that process runs
in a container of its own and cannot be seen; there, nothing that may come is known, and nothing is refused.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from actors.resources import Node
from actors.waiting import wait_for
from roro_ray.errors import RoroError

logger = logging.getLogger(__name__)

_READ_S = 30.0
_MAX_WORKERS = 2  # Ray's own default
_HEAD = {"node:__internal_head__": 0.001}


@dataclass(frozen=True)
class Growth:
    """What an autoscaler may make of the cluster.

    Args:
        kinds: the nodes that it may launch; None where its configuration cannot be read.
        most: nodes of all kinds together.
        kind_of: the kind of each node that runs, by the node's id and by its address.
        starting: nodes that are being launched, by kind.
        sees_labels: whether it acts on labels that are asked for; that of `ray up` does not.
    """

    kinds: tuple[Node, ...] | None
    most: int
    kind_of: Mapping[str, str]
    starting: Mapping[str, int]
    sees_labels: bool = True

    def describe(self) -> str:
        """What is being started."""
        started = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.starting.items()))
        return f"being launched: {started or 'nothing'}"


@dataclass(frozen=True)
class _Status:
    """What the autoscaler has published: as in `Growth`, and whether it has said anything yet."""

    kind_of: Mapping[str, str] = field(default_factory=dict)
    starting: Mapping[str, int] = field(default_factory=dict)
    published: bool = False
    sees_labels: bool = True


def find_growth(expected: bool) -> Growth | None:
    """The autoscaler of the cluster that this process has joined, or None where there is none.

    Args:
        expected: the user says that the cluster grows (`ray.autoscaler`).
    """
    status = _read_status()
    configured = any(not kind.startswith("node_") for kind in {*status.kind_of.values(), *status.starting})
    if status.published and not configured and not expected:
        return None  # Ray mirrors a cluster without an autoscaler: its kinds are made up from node ids
    found = _ask_head()
    if found is None and not configured and not expected:
        return None
    kinds, most = (None, 0) if found is None else parse_kinds(found)
    return Growth(kinds, most, status.kind_of, status.starting, status.sees_labels)


def parse_kinds(config: Mapping[str, Any]) -> tuple[tuple[Node, ...] | None, int]:
    """The kinds of nodes of a cluster file and the most nodes in all; None where one does not say what it has."""
    most = int(config.get("max_workers", _MAX_WORKERS))
    kinds = []
    for name, kind in (config.get("available_node_types") or {}).items():
        resources = kind.get("resources") or {}
        count = min(int(kind.get("max_workers", most if name != config.get("head_node_type") else 0)), most)
        if count > 0 and not resources:
            return None, most
        # A file need not tell the memory, which every node has.
        amounts = {"memory": math.inf, **{key: float(value) for key, value in resources.items()}}
        kinds.append(Node(amounts, {key: str(value) for key, value in (kind.get("labels") or {}).items()}, name, count))
    return tuple(kinds), most


def _ask_head() -> Mapping[str, Any] | None:
    task = ray.remote(read_autoscaler_config).options(num_cpus=0, resources=_HEAD, max_retries=1)
    try:
        found: Mapping[str, Any] | None = wait_for(task.remote(), "the autoscaler's configuration", _READ_S)
    except (RoroError, RayError) as error:
        logger.warning("what the autoscaler may launch is not known: %s", error)
        return None
    return found


def read_autoscaler_config() -> dict[str, Any] | None:
    """Run on the head: what the file of the autoscaler says of its nodes, or None where there is no such file."""
    import psutil  # Ray brings its own along
    import yaml

    node: Any = ray._private.worker.global_worker.node
    logs = f"--logs-dir={node.get_logs_dir_path()}"
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if logs in command and any(part.endswith("monitor.py") for part in command):
            places = [part.partition("=")[2] for part in command if part.startswith("--autoscaling-config=")]
            if places:
                config = yaml.safe_load(Path(places[0]).expanduser().read_text())
                return {
                    key: config.get(key)
                    for key in ("max_workers", "head_node_type", "available_node_types")
                    if key in config
                }
    return None


def _read_status() -> _Status:
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

    if not _internal_kv_initialized():
        return _Status(published=True)
    try:
        if is_autoscaler_v2(fetch_from_server=True):
            return _read_status_v2()
        raw = _internal_kv_get("__autoscaling_status")
        report = json.loads(raw).get("autoscaler_report") or {} if raw else {}
    except (RayError, RuntimeError, ValueError) as error:
        logger.debug("no autoscaler status: %r", error)
        return _Status()
    starting = Counter(report.get("pending_launches") or {})
    starting.update(kind for _, kind, _ in report.get("pending_nodes") or [])
    return _Status(report.get("node_type_mapping") or {}, starting, bool(report), sees_labels=False)


def _read_status_v2() -> _Status:
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    alive = (*status.active_nodes, *status.idle_nodes)
    kind_of = {node.node_id: node.ray_node_type_name for node in alive if node.node_id is not None}
    starting = Counter(node.ray_node_type_name for node in status.pending_nodes)
    for launch in status.pending_launches:
        starting[launch.ray_node_type_name] += launch.count
    return _Status(kind_of, starting, bool(kind_of))
