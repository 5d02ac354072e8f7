"""serve/config.yaml: it parses, holds nothing that Serve or the server would not know, and serves; router swaps."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from processes import BIN, ROOT, find_processes, free_ports, running_ray
from ray.serve.schema import ServeDeploySchema
from serve_server import MODELS, Reply, make_body, make_client, make_questions, make_router_files, make_run, take_line

from roro_ray.errors import ConfigError
from serve.app import make_application
from serve.config import load_server_config, read_served

CONFIG = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
QUESTIONS = make_questions(8)


def find_unknown(given: Any, parsed: Any, path: str = "") -> list[str]:
    """Keys of a YAML that the schema dropped."""
    if isinstance(given, list):
        return [each for i, item in enumerate(given) for each in find_unknown(item, parsed[i], f"{path}[{i}]")]
    if not isinstance(given, dict) or path.endswith(("args", "user_config")):
        return []
    missing = [f"{path}.{key}" for key in given if key not in parsed]
    known = [key for key in given if key in parsed]
    return missing + [each for key in known for each in find_unknown(given[key], parsed[key], f"{path}.{key}")]


def test_the_file_parses_and_every_key_is_known() -> None:
    parsed = ServeDeploySchema.model_validate(CONFIG)
    assert find_unknown(CONFIG, parsed.model_dump()) == []
    [application] = CONFIG["applications"]
    assert application["import_path"] == "serve.app:build"
    assert load_server_config(application["args"]).run_dir == "runs/demo"
    assert CONFIG["http_options"]["host"] == "127.0.0.1"


def test_what_stands_in_comments_is_known_too(tmp_path: Path) -> None:
    """Commented settings are copied by users: they must be right once the hash is gone."""
    text = (ROOT / "serve" / "config.yaml").read_text()
    body = text[text.index("applications:") :]
    shown = re.sub(r"(?m)^( +)# (?=\s*[\w-]+:|\s*- )", r"\1", body)
    [application] = yaml.safe_load(shown)["applications"]
    config = load_server_config(application["args"])
    assert config.per_model["large"].gpus == 1
    assert config.models.max_replicas == 4
    found = ServeDeploySchema.model_validate({"applications": [application]})
    assert [each.name for each in found.applications[0].deployments] == ["router"]
    assert list(application["deployments"][0]["user_config"]) == ["routers"]


def test_replicas_reach_serve(tmp_path: Path) -> None:
    settings = {
        "run_dir": str(make_run(tmp_path)),
        "models": {"min_replicas": 1, "max_replicas": 3, "target_ongoing": 7, "cpus": 2},
        "per_model": {"large": {"min_replicas": 2, "max_replicas": 2, "gpus": 0.5}},
    }
    application = make_application(read_served(load_server_config(settings)))
    ingress = application._bound_deployment
    _, models, router = ingress.init_args
    small, large = (models[name]._bound_deployment for name in MODELS)
    scaling = small._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 7)
    assert small.ray_actor_options["num_cpus"] == 2
    assert (large.num_replicas, large._deployment_config.autoscaling_config) == (2, None)
    assert large.ray_actor_options["num_gpus"] == 0.5
    user_config = router._bound_deployment.user_config
    assert user_config == {"routers": [str(tmp_path / "run" / "router" / "roro")]}


def test_a_run_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="runs/nowhere"):
        read_served(load_server_config({**CONFIG["applications"][0]["args"], "run_dir": "runs/nowhere"}))


# With Serve


@contextmanager
def served(folder: Path, environment: dict[str, str], address: str, port: int) -> Iterator[Path]:
    """`serve run` with the checked-in file, on another run and port; gives the file."""
    run = make_run(folder / "served")
    file = folder / "config.yaml"
    write_config(file, run, port, [])
    with (folder / "serve.log").open("w") as log:
        command = [str(BIN / "serve"), "run", f"--address={address}", str(file)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            yield file
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def write_config(file: Path, run: Path, port: int, routers: list[Path]) -> None:
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port
    [application] = config["applications"]
    application["args"]["run_dir"] = str(run)
    application["args"]["routers"] = {"min_replicas": 1, "max_replicas": 2, "target_ongoing": 0.1}
    if routers:
        application["deployments"] = [{"name": "router", "user_config": {"routers": [str(each) for each in routers]}}]
    file.write_text(yaml.safe_dump(config))


async def wait_for_models(url: str, wanted: set[str], timeout_s: float = 120) -> None:
    async with make_client(5) as client, asyncio.timeout(timeout_s):
        while True:
            try:
                answer = await client.get(f"{url}/v1/models")
                if answer.status_code == 200 and wanted == {each["id"] for each in answer.json()["data"]}:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.3)


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[Reply, set[int]]:
    """A streamed answer, and the routers that decided its steps."""
    reply, versions = Reply(), set()
    body = {**body, "stream": True, "routing": {"trace": True}}
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        reply.status = response.status_code
        async for line in response.aiter_lines():
            take_line(reply, line)
            versions |= {int(found) for found in re.findall(r'"event":"step_end".*?"router_version":(-?\d+)', line)}
    return reply, versions


async def ask_until(stopped: asyncio.Event, url: str) -> list[tuple[Reply, set[int]]]:
    """Load: eight clients that ask again and again."""
    async with make_client() as client:

        async def one(index: int) -> list[tuple[Reply, set[int]]]:
            found = []
            while not stopped.is_set():
                found.append(await ask(client, url, make_body(QUESTIONS[index], index)))
            return found

        return [each for found in await asyncio.gather(*(one(index) for index in range(8))) for each in found]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_serve_run_answers_and_under_load_routers_are_swapped_and_added() -> None:
    with running_ray() as (folder, environment, dashboard):
        address = find_address(folder)
        port = free_ports(1)[0]
        url = f"http://127.0.0.1:{port}"
        with served(folder, environment, address, port) as file:
            await wait_for_models(url, {"auto", "router-v3", *MODELS})
            run = folder / "served" / "run"
            old = run / "router" / "roro"
            new = make_router_files(folder / "next", 4, lean=1000.0)
            broken = make_router_files(folder / "broken", 5)
            (broken / "router.safetensors").write_bytes(b"not a router")

            async def deploy(routers: list[Path]) -> None:
                write_config(file, run, port, routers)
                command = [str(BIN / "serve"), "deploy", f"--address={dashboard}", str(file)]
                await asyncio.to_thread(subprocess.run, command, cwd=ROOT, env=environment, check=True, timeout=60)

            before = find_replicas(folder)
            stopped = asyncio.Event()
            load = asyncio.create_task(ask_until(stopped, url))
            await asyncio.sleep(1.0)
            await deploy([old, new])
            await wait_for_models(url, {"auto", "router-v3", "router-v4", *MODELS}, 30)
            await asyncio.sleep(1.5)
            await deploy([old, new, broken])
            async with asyncio.timeout(90):  # the load brings a second replica, which must do without the broken one
                while len(find_replicas(folder)) == len(before):
                    await asyncio.sleep(0.5)
            await asyncio.sleep(3.0)
            stopped.set()
            answers = await load
            assert all(reply.whole and not reply.summary["degraded"] for reply, _ in answers)
            assert all(len(versions) == 1 for _, versions in answers), "an answer changed its router midway"
            assert {version for _, versions in answers for version in versions} == {3, 4}
            assert find_replicas(folder) >= before, "a change of user_config started replicas anew"
            await wait_for_models(url, {"auto", "router-v3", "router-v4", *MODELS}, 10)
            async with make_client() as client:
                newest, versions = await ask(client, url, make_body(QUESTIONS[0]))
                assert versions == {4} and newest.summary["steps"]["small"] == 0
                _, versions = await ask(client, url, make_body(QUESTIONS[0], model="router-v3"))
                assert versions == {3}


def find_address(folder: Path) -> str:
    """Where drivers join this test's Ray: from the command that started it."""
    words = [word for process in find_processes(folder) for word in process.cmdline()]
    return "127.0.0.1:" + next(word for word in words if word.startswith("--port=")).removeprefix("--port=")


def find_replicas(folder: Path) -> set[int]:
    """The processes of Serve's replicas on this test's Ray."""
    import psutil

    found = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::ServeReplica:roro:"):
            parents = [" ".join(parent.cmdline()) for parent in process.parents()]
            if any(str(folder) in line for line in parents):
                found.add(process.pid)
    assert found
    return found
