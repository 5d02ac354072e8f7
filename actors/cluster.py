"""Start, join and stop a Ray cluster, with the settings that were seen to work.

On a laptop a stage starts its own cluster and stops it again; under `ray job submit` (or
with RAY_ADDRESS set) it joins the one that runs. Whoever starts a cluster stops it: a joined one is only left.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from roro_ray.config import RayConfig
from roro_ray.errors import ConfigError

logger = logging.getLogger(__name__)

# One thread per process: with two, OpenMP's busy waiting makes processes that share cores 10 to 100 times slower.
# Train's controller polls every 2 s by default, and `ray.train.report` waits for it. Its workers would change into a
# directory of their own, where a relative lora.base or router.encoder is not found.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Logical CPUs of a cluster that we start: actors ask for half a CPU and mostly wait for each other.
_LOGICAL_PER_CORE = 2
_LEAST_LOGICAL = 4
_ANSWER_S = 10.0
_CALLERS: list[threading.Thread] = []


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """The cluster in use: its address, whether we started it, its nodes, and what they have in all."""

    address: str
    started: bool
    nodes: int
    resources: dict[str, float]


@contextmanager
def open_cluster(config: RayConfig, verbose: bool = False) -> Iterator[ClusterFacts]:
    """A Ray to work on; stopped at the end if and only if it was started here.

    `address`: `auto` joins the cluster that RAY_ADDRESS names and else starts one, `local` always starts one,
    anything else is joined.

    Raises:
        ConfigError: nobody answers at the address to join, or it is that of a dashboard.
        ConnectionError: somebody answers there, and is no Ray that can be joined.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        yield _look(started=False)
        return
    address = (os.environ.get("RAY_ADDRESS") or "local") if config.address == "auto" else config.address
    if address != "local":
        _check_answers(address)
        with _kept_handler():
            ray.init(address=address, log_to_driver=verbose, logging_level=logging.WARNING)
        try:
            yield _look(started=False)
        finally:
            _leave()
        return
    temp_dir = Path(tempfile.mkdtemp(prefix="roro-ray-"))
    finished = False
    try:
        start_local(config.object_store_mb, temp_dir, count_logical_cpus(), verbose)
        yield _look(started=True)
        finished = True
    finally:
        _leave()
        if finished:
            shutil.rmtree(temp_dir, ignore_errors=True)
        else:
            logger.warning("Ray's logs are kept in %s", temp_dir)


def _check_answers(address: str) -> None:
    """Ray itself waits for ever for a head that is not there."""
    named = f"the address of Ray to join is {address!r} (ray.address, or RAY_ADDRESS where that is auto)"
    if address.startswith(("http://", "https://")):
        head = address.split("//")[1].split(":")[0]
        raise ConfigError(
            f"{named}: a dashboard's. Give the head's own, such as {head}:6379, or submit the job there: "
            f"`ray job submit --address {address} ..`."
        )
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        return  # Ray has names of its own, such as `auto`
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except OSError as error:
        raise ConfigError(
            f"{named}: nobody answers there ({error}). Is the head up (`ray status --address={address}`), and its port "
            "open to this machine? With ray.address=local the job starts a Ray of its own."
        ) from error


def note_caller(thread: threading.Thread) -> None:
    """Tell of a thread that is inside Ray's own code, where it cannot be stopped, until its work is over."""
    _CALLERS.append(thread)


def _leave() -> None:
    """Disconnect from Ray, or stay until the process ends where a thread has been left behind in a call.

    Its next word to a Ray that was shut down would end the process at once, with exit code 1 and nothing written. Ray
    ends the actors of a driver that is gone, and a Ray that it started ends with it.
    """
    import ray

    _CALLERS[:] = [thread for thread in _CALLERS if thread.is_alive()]
    if not _CALLERS:
        ray.shutdown()


def _look(started: bool) -> ClusterFacts:
    import ray

    nodes = sum(node["Alive"] for node in ray.nodes())
    return ClusterFacts(ray.get_runtime_context().gcs_address, started, nodes, ray.cluster_resources())


def set_environment() -> None:
    """Give this process, and so the cluster that it starts, the default environment; what is set already stays."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # Ray adds the driver's directory to its workers' path, but not where the driver is an installed script.
    root = str(Path(__file__).resolve().parents[1])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *paths])


def start_local(object_store_mb: int, temp_dir: Path, num_cpus: int, verbose: bool = False) -> None:
    """Start a cluster of one node.

    Ray listens on every interface, and whoever reaches it can run code. With RAY_AUTH_MODE unset `ray.init` therefore
    asks for a token; it gets one here that only this process and its children know. Without it Ray would write one into
    the home directory, which later clusters then pick up.
    """
    set_environment()
    if not os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # A second's work of one more process per training; of use only where nodes may be taken away.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # says that there is a token

    with _kept_handler():
        ray.init(
            address="local",  # never join what an earlier run left behind
            num_cpus=num_cpus,
            object_store_memory=object_store_mb * 2**20,
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level=logging.WARNING if verbose else logging.ERROR,
            _temp_dir=str(temp_dir),
        )


def count_logical_cpus() -> int:
    """Logical CPUs to give a local cluster: more than there are cores, since most actors wait for others."""
    return max(_LEAST_LOGICAL, _LOGICAL_PER_CORE * (os.cpu_count() or 1))


@contextmanager
def _kept_handler() -> Iterator[None]:
    """Keep what the caller does on SIGTERM: `ray.init` would have it end the driver with exit code 15."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
