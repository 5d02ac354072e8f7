"""What a user does with a cluster that runs: submit a job, wait for it, stop it, read its log, look what is left."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import BIN, ROOT, running_ray

# Of Ray's own, and asking for nothing: the first is one in a cluster and stays with whoever used Ray Train first; the
# second removes the placement group of a training that was killed, and then means to end itself from a thread of its
# own, where Ray's `exit_actor` ends the thread only (Ray 2.60).
_RAYS_OWN = {"_AutoscalingCoordinatorActor", "PlacementGroupCleaner"}
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclass(frozen=True)
class Cluster:
    """A Ray head with its dashboard: the environment of its users, and its addresses."""

    environment: dict[str, str]
    dashboard: str
    address: str

    def ray_job(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job VERB ..` in the project's root."""
        command = [str(BIN / "ray"), "job", verb, "--address", self.dashboard, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )

    def submit(self, name: str, *command: str, runtime_env: Path | None = None) -> None:
        """Submit a job under a name, and go on."""
        options = ["--working-dir", ".", "--no-wait", "--submission-id", name]
        options += ["--runtime-env", str(runtime_env)] if runtime_env else []
        done = self.ray_job("submit", *options, "--", *command)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def find(self, name: str) -> dict[str, Any]:
        """Ray's record of a job: `status`, `driver_exit_code`, .."""
        return dict(self._get(f"/api/jobs/{name}"))

    def read_log(self, name: str) -> str:
        """What the job wrote, from its own first line on."""
        text = str(self._get(f"/api/jobs/{name}/logs")["logs"])
        return text.partition("Running entrypoint")[2].partition("\n")[2]

    def wait(self, name: str, timeout_s: float = 500) -> dict[str, Any]:
        """The record of a job that ended."""
        self.wait_until(name, lambda: False, timeout_s)
        return self.find(name)

    def wait_until(self, name: str, happened: Callable[[], bool], timeout_s: float = 500) -> None:
        """Wait until something happened or the job ended."""
        deadline = time.monotonic() + timeout_s
        while not happened() and self.find(name)["status"] not in _ENDED:
            assert time.monotonic() < deadline, self.read_log(name)[-3000:]
            time.sleep(0.05)

    def run(self, name: str, *command: str, runtime_env: Path | None = None) -> str:
        """Submit a job, wait until it has succeeded, and give its log."""
        self.submit(name, *command, runtime_env=runtime_env)
        record = self.wait(name)
        assert (record["status"], record["driver_exit_code"]) == ("SUCCEEDED", 0), self.read_log(name)[-4000:]
        return self.read_log(name)

    def wait_until_empty(self, timeout_s: float = 60) -> None:
        """Wait until no actor and no placement group is left of any job; fails with those that are."""
        deadline = time.monotonic() + timeout_s
        while left := [*self._find_actors(), *self._find_groups()]:
            assert time.monotonic() < deadline, f"left on the cluster: {left}"
            time.sleep(0.3)

    def _find_actors(self) -> list[str]:
        found = self._get("/api/v0/actors?limit=1000")["data"]["result"]["result"]
        alive = [str(each["class_name"]) for each in found if each["state"] != "DEAD"]
        return [name for name in alive if name not in _RAYS_OWN]

    def _find_groups(self) -> list[str]:
        found = self._get("/api/v0/placement_groups?limit=1000")["data"]["result"]["result"]
        return [str(each["placement_group_id"]) for each in found if each["state"] != "REMOVED"]

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.dashboard + path, timeout=60) as answer:
            return json.load(answer)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A Ray of its own to submit to."""
    with running_ray() as (folder, environment, dashboard):
        yield Cluster(environment, dashboard, (folder / "ray_current_cluster").read_text().strip())
