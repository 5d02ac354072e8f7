"""Real jobs as processes of their own, a Ray of their own beside them, and an end to both by their own pids."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# Every stage in seconds, on the shipped models.
TINY = (
    "data.suites=[chain]",
    "data.train_queries=8",
    "data.router_queries=12",
    "data.validation_queries=4",
    "data.test_queries=4",
    "router.iterations=2",
    "router.queries=4",
    "evaluate.every=1",
    "calibrate.queries=4",
)


def clean_environment(temp_dir: Path) -> dict[str, str]:
    """The environment without what an earlier test or the caller told Ray, and with a folder for temporary files."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = os.pathsep.join([str(BIN), kept.get("PATH", "")])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "TMPDIR": str(temp_dir), "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def short_temp_dir() -> Iterator[Path]:
    """A folder with a short name (Ray's socket paths must stay below 108 characters); ends what still runs in it."""
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    try:
        yield folder
    finally:
        end_processes(folder)
        shutil.rmtree(folder, ignore_errors=True)


def find_processes(folder: Path) -> list[psutil.Process]:
    """The processes that were started with this folder in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def end_processes(folder: Path) -> None:
    """End the processes of a folder and their children, by pid."""
    for process in find_processes(folder):
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
        for member in family:
            try:
                member.kill()
            except psutil.Error:
                continue


def start_job(temp_dir: Path, *command: str, address: str | None = None) -> subprocess.Popen[str]:
    """Start `python ...` in the project's root; its output goes to a file beside.

    Args:
        address: of a `running_ray` that it joins.
    """
    log = (temp_dir / "job.log").open("a")
    joined = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"} if address else {}
    environment = {**clean_environment(temp_dir), **joined}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log, text=True)


def run_job(temp_dir: Path, *command: str, timeout_s: float = 300, address: str | None = None) -> str:
    """Run `python ...` to its end and give what it printed; fails with its output."""
    process = start_job(temp_dir, *command, address=address)
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        code = None
    text = (temp_dir / "job.log").read_text()
    assert code == 0, f"{' '.join(command)} ended with {code}:\n{text[-4000:]}"
    return text


@contextmanager
def running_ray() -> Iterator[tuple[Path, dict[str, str], str]]:
    """A Ray head of its own: its folder, the environment of its users, and its job address."""
    with short_temp_dir() as temp_dir:
        dashboard, *ports = free_ports(6)
        agent = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        names = ("port", "ray-client-server-port", "metrics-export-port", *agent)
        patient = {"RAY_raylet_start_wait_time_s": "200"}  # on a machine that does much else; the default is 30
        environment = {**clean_environment(temp_dir), "RAY_AUTH_MODE": "disabled", **patient}
        options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={temp_dir}"]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=209715200", f"--dashboard-port={dashboard}"]
        with (temp_dir / "ray.log").open("w") as log:
            head = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
        try:
            wait_for_text("Ray runtime started", head, temp_dir / "ray.log")
            wait_for_port(dashboard, head, temp_dir / "ray.log")
            yield temp_dir, environment, f"http://127.0.0.1:{dashboard}"
        finally:
            family = [head.pid, *(child.pid for child in psutil.Process(head.pid).children(recursive=True))]
            for pid in family:
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)
            head.wait(20)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 90) -> None:
    """Wait until somebody answers at a port, as long as the process lives."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nobody listens on port {port}:\n{log.read_text()[-2000:]}")


def wait_for_text(text: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 240) -> None:
    """Wait until a process has written a text to its log, as long as it lives."""
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text(errors="replace"):
        assert time.monotonic() < deadline and process.poll() is None, f"no {text!r} in:\n{log.read_text()[-2000:]}"
        time.sleep(0.2)
