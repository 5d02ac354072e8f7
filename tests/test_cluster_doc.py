"""docs/cluster.md: nodes on one machine are started, worked on, lost and taken down by the commands that it prints."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from roro_ray.data.store import load_trajectories
from roro_ray.settings import load_config
from tests.cluster_files import list_kinds, read_yaml
from tests.documents import ROOT, find_blocks, find_commands
from tests.processes import TINY, clean_environment, end_processes, find_processes, free_ports, short_temp_dir
from tests.test_real_models_doc import arguments_of

DOCUMENT = "docs/cluster.md"
COMMANDS = find_commands(DOCUMENT)
LOCAL = COMMANDS[: next(i for i, command in enumerate(COMMANDS) if command.startswith("rm -r /tmp/roro-ray"))]
JOBS = [command for command in COMMANDS if " -m jobs." in command and "docker" not in command]
STAGES = ["collect", "make_pairs", "learn_reward", "train_router", "evaluate", "calibrate"]


class Shell:
    """One bash with job control, to which commands are typed one after the other, as a reader does."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            ["bash", "--norc", "-m"],
            cwd=ROOT,
            env=clean_environment(folder) | {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": "240"},  # a busy machine
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def type(self, command: str) -> tuple[int, str]:
        """The exit code of a command and what it printed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(f'{command}\necho "@done $?"\n')
        stdin.flush()
        printed = ""
        while not (found := re.search(r"@done (\d+)\n", printed)):
            line = stdout.readline()
            assert line, f"the shell ended at {command!r}:\n{printed}"
            printed += line
        return int(found[1]), printed[: found.start()]

    def repeat(self, command: str, pattern: str, timeout_s: float = 150) -> str:
        """Type a command again and again until it prints what is waited for."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            _, printed = self.type(command)
            if re.search(pattern, printed):
                return printed
            time.sleep(0.5)
        raise AssertionError(f"{command!r} never printed {pattern!r}:\n{printed}")

    def start_node(self, command: str, status: str, pattern: str) -> None:
        """Start a node and wait until the cluster has what it brings.

        Ray gives up a node that is not there after 30 s, which happens where eight others work on two cores; the reader
        sees it in the log and types the command again.
        """
        log = command.split("> ")[1].split()[0]
        for _ in range(4):
            self.type(command)
            self.repeat(f"{status}; grep -h 'timed out during startup' {log}", f"{pattern}|timed out")
            if re.search(pattern, self.type(status)[1]):
                return
            self.type("jobs")  # forgets the one that ended, so that the next gets its number
        raise AssertionError(f"a node would not start: {command}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def find(start: str) -> str:
    """The one command of the walk-through that begins so."""
    [command] = [command for command in LOCAL if command.startswith(start)]
    return command


@pytest.fixture
def typed() -> Iterator[tuple[Shell, dict[str, str]]]:
    """A shell, and what the document's ports and folders are here."""
    with short_temp_dir() as folder:
        ports = dict(zip(["6390", "8290", "52391", "52392", "52393"], map(str, free_ports(5)), strict=True))
        shell = Shell(folder)
        try:
            yield shell, ports | {"/tmp/roro-": f"{folder}/"}
        finally:
            end_processes(folder)
            shell.close()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_walk_through_on_one_machine(typed: tuple[Shell, dict[str, str]]) -> None:
    shell, here = typed
    folder = Path(here["/tmp/roro-"])

    def change(command: str) -> str:
        return re.sub("|".join(map(re.escape, here)), lambda found: here[found[0]], command)

    def do(start: str) -> str:
        code, printed = shell.type(change(find(start)))
        assert code == 0, f"{start}: {code}\n{printed}"
        return printed

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS"):
        do(f"export {name}=")
    status = change(find("ray status"))
    shell.start_node(change(find("ray start --head")), status, "Active|No cluster status")
    second, third = (change(command) for command in LOCAL if command.startswith("ray start --address"))
    shell.start_node(second, status, r"0\.0/2\.0 rollout")
    shell.start_node(third, status, r"0\.0/4\.0 rollout")
    shown = shell.type(status)[1]
    [pasted] = [block for block in find_blocks(DOCUMENT, "text") if "Total Usage" in block]
    assert pasted.count("node_") == shown.count("node_") == 3
    assert all(line in shown for line in pasted.splitlines() if re.match(r" \d+\.\d/", line))
    code, refused = shell.type(f"RAY_AUTH_TOKEN=another {status}")
    assert code != 0 and "Active" not in refused, "a wrong token was taken"

    submitted = change(find("ray job submit --submission-id collect"))
    code, printed = shell.type(f"{submitted} {shlex.join(TINY)}")
    assert code == 0 and "Job 'collect' succeeded" in printed, printed[-3000:]
    assert len(load_trajectories(folder / "run" / "trajectories")) == 8 * 4
    assert "collect" in do("ray job list")

    do("kill -9 %2")
    shell.repeat(status, r"0\.0/2\.0 rollout")
    shell.type("wait %2")
    assert not find_processes(Path(f"listen-port={here['52392']}"))
    do("kill %3")
    do("kill %1")
    shell.type("wait %1 %3")
    deadline = time.monotonic() + 30
    while left := find_processes(folder / "ray"):
        assert time.monotonic() < deadline, [each.cmdline()[:4] for each in left]
        time.sleep(0.2)


def test_the_walk_through_shows_every_stage_and_leaves_nothing() -> None:
    named = [arguments_of(command)[0] for command in LOCAL if " -m jobs." in command]
    assert [stage for stage in named if stage != "train_router"] == [each for each in STAGES if each != "train_router"]
    assert named.count("train_router") == 2  # stopped, and gone on with
    assert not any(command.startswith("ray stop") for command in COMMANDS)
    [clean] = [command for command in COMMANDS if command.startswith("rm -r /tmp/roro-")]
    made = set(re.findall(r"/tmp/roro-[\w.-]+", " ".join(LOCAL)))
    assert made == set(clean.split()[2:])


@pytest.mark.parametrize("command", JOBS)
def test_every_command_of_a_job_has_settings_that_load(command: str) -> None:
    """Of those that have a bucket's name to fill in, too."""
    _, arguments = arguments_of(command)
    overrides = [each for each in arguments if not each.startswith("--")]
    config = None
    if "--config" in arguments:
        config = ROOT / arguments[arguments.index("--config") + 1]
        overrides.remove(arguments[arguments.index("--config") + 1])
    load_config(overrides, config)


def test_the_table_of_machines_is_that_of_the_file() -> None:
    rows = [line.strip("| ").split(" | ") for line in (ROOT / DOCUMENT).read_text("utf-8").splitlines()]
    told = {name: (row[1], row[2]) for row in rows if len(row) == 4 for name in row[0].split(", ")}
    cluster = read_yaml("cluster.yaml")
    for kind in list_kinds(cluster):
        node = cluster["available_node_types"][kind.name]["node_config"]
        machine, count = told[kind.name]
        assert machine.startswith(node["InstanceType"])
        assert ("spot" in machine) == ("InstanceMarketOptions" in node)
        assert count.split()[0].rstrip(",") == str(kind.count)


def test_what_is_to_be_filled_in_is_told() -> None:
    told = (ROOT / DOCUMENT).read_text("utf-8")
    for path in ["cluster.yaml", *(str(each.relative_to(ROOT)) for each in (ROOT / "cluster").rglob("*.yaml"))]:
        text = (ROOT / path).read_text("utf-8")
        for mark in re.findall(r"(?:ami|sg)-0+\b|registry\.example\.com|BUCKET", text):
            assert mark in told, (path, mark)
    assert os.path.exists(ROOT / "cluster" / "aws" / "trust-policy.json")
