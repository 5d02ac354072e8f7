"""A server of its own for tests: `python tests/serve_host.py SETTINGS.json`, started by the code of `python -m serve`.

It takes orders as JSON lines on its standard input and answers each with a line: what the replicas have in hand
(`active`), their processes (`pids`) and nodes (`nodes`), what Serve reports (`status`), and `stop`. A process of its
own, since Serve reads its settings from the environment once, and tests must not share a Ray with others.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

APP = "roro"


def main() -> None:
    from serve.__main__ import running
    from serve.config import load_server_config, read_served

    with open(sys.argv[1]) as file:
        served = read_served(load_server_config(json.load(file)))
    with running(served) as url:
        say({"url": url})
        asyncio.run(obey())


async def obey() -> None:
    """Carry out orders until `stop` or the end of the input."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        what = order.pop("do")
        if what == "stop":
            return
        try:
            say({"found": await ORDERS[what](**order)})
        except Exception as error:  # told to the test, which fails on it
            say({"error": repr(error)})


def say(answer: dict[str, Any]) -> None:
    print(f"@{json.dumps(answer)}", flush=True)


async def read_active(model: str) -> list[dict[str, int]]:
    """What each replica of a model has in hand."""
    from ray import serve

    handle = serve.get_deployment_handle(f"model-{model}", APP)
    return list(await handle.broadcast("active").results_async(timeout_s=10))


async def read_pids(deployment: str) -> list[int]:
    """The processes of a deployment's replicas."""
    from ray._private import state

    name = f"ServeReplica:{APP}:{deployment}"
    records = state.actors().values()
    return sorted(r["Pid"] for r in records if r["State"] == "ALIVE" and r["ActorClassName"] == name)


async def read_nodes(deployment: str) -> list[str]:
    """The nodes of a deployment's replicas."""
    from ray._private import state

    name = f"ServeReplica:{APP}:{deployment}"
    alive = [r for r in state.actors().values() if r["State"] == "ALIVE" and r["ActorClassName"] == name]
    return sorted(record["Address"]["NodeID"] for record in alive)


async def read_status() -> dict[str, Any]:
    """Serve's own report of the deployments, and the address of Ray's dashboard ("" where there is none)."""
    import ray
    from ray import serve

    deployments = serve.status().applications[APP].deployments
    states = {
        name: {str(state): count for state, count in found.replica_states.items()}
        for name, found in deployments.items()
    }
    return {"deployments": states, "dashboard": ray._private.worker.global_worker.node.webui_url or ""}


ORDERS = {"active": read_active, "nodes": read_nodes, "pids": read_pids, "status": read_status}

if __name__ == "__main__":
    main()
