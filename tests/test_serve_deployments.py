"""The Serve shells as plain objects: what they load, what they refuse, what they count."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from serve_server import make_router_files

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.engines.protocol import StepRequest, StepResult
from roro_ray.errors import CheckpointError, ConfigError, EngineError
from serve.deployments import ModelReplica, RouterReplica

pytestmark = pytest.mark.timeout(60)
POOL = PoolConfig()


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories: versions 3 and 4, another version 4, and one that holds no router."""
    folder = tmp_path_factory.mktemp("routers")
    found = {name: make_router_files(folder / name, version) for name, version in (("v3", 3), ("v4", 4), ("twin", 4))}
    broken = make_router_files(folder / "broken", 5)
    (broken / "router.safetensors").write_bytes(b"not a router")
    return {**{name: str(path) for name, path in found.items()}, "broken": str(broken), "none": str(folder / "none")}


async def names(replica: RouterReplica) -> tuple[list[str], int]:
    found = await replica.describe()
    return [facts.name for facts in found.routers], found.default


async def test_new_routers_join_the_old_and_the_last_is_the_default(routers: dict[str, str]) -> None:
    replica = RouterReplica(routers["v3"], POOL)
    await replica.reconfigure({"routers": [routers["v3"]]})
    assert await names(replica) == (["router-v3"], 3)
    await replica.reconfigure({"routers": [routers["v3"], routers["v4"]]})
    assert await names(replica) == (["router-v3", "router-v4"], 4)
    await replica.reconfigure({"routers": [routers["v4"], routers["v3"]]})
    assert (await names(replica))[1] == 3


async def test_without_a_list_the_first_router_is_loaded(routers: dict[str, str]) -> None:
    replica = RouterReplica(routers["v3"], POOL)
    await replica.reconfigure({})
    assert await names(replica) == (["router-v3"], 3)


@pytest.mark.parametrize(
    ("user_config", "reason"),
    [
        ({"routers": ["v3", "broken"]}, "broken"),
        ({"routers": ["v3", "none"]}, "none"),
        ({"routers": ["v4", "twin"]}, "version 4"),
        ({"routers": "v3"}, "expected {'routers': "),
        ({"routers": [3]}, "expected {'routers': "),
        ({"router": ["v3"]}, "expected {'routers': "),
    ],
)
async def test_a_mistake_is_logged_and_changes_nothing(
    routers: dict[str, str], user_config: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    replica = RouterReplica(routers["v3"], POOL)
    await replica.reconfigure({"routers": [routers["v3"]]})
    given = {
        key: [routers.get(str(item), item) for item in value] if isinstance(value, list) else value
        for key, value in user_config.items()
    }
    with caplog.at_level(logging.ERROR):
        await replica.reconfigure(given)
    assert await names(replica) == (["router-v3"], 3)
    assert "refused" in caplog.text and reason in caplog.text


async def test_a_replica_that_starts_takes_what_can_be_loaded(routers: dict[str, str]) -> None:
    replica = RouterReplica(routers["v3"], POOL)
    await replica.reconfigure({"routers": [routers["v4"], routers["broken"]]})
    assert await names(replica) == (["router-v4"], 4)
    replica = RouterReplica(routers["v3"], POOL)
    await replica.reconfigure({"routers": [routers["broken"]]})
    assert await names(replica) == (["router-v3"], 3)


async def test_a_replica_that_starts_with_nothing_says_why(routers: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match="none"):
        await RouterReplica(routers["none"], POOL).reconfigure({"routers": [routers["broken"]]})
    with pytest.raises(ConfigError, match=r"expected \{'routers': "):
        await RouterReplica(routers["v3"], POOL).reconfigure({"routers": "v3"})


async def test_a_model_is_loaded_before_its_replica_counts_as_well(tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        await ModelReplica(ModelConfig("small", str(tmp_path / "nowhere")), POOL).check_health()
    replica = ModelReplica(ModelConfig("small", "world:small"), POOL)
    await replica.check_health()
    assert (await replica.facts()).seconds >= 0


async def test_work_in_hand_is_counted_down_to_the_rows() -> None:
    replica = ModelReplica(ModelConfig("small", "world:small"), POOL)
    await replica.check_health()
    request = StepRequest("Start with 36. A: double.\n\n", 40)
    stream = replica.stream_step(request)
    await anext(stream)
    busy = await replica.active()
    assert (busy["calls"], busy["streams"]) == (0, 1)
    assert busy["rows"] <= 1  # the decode thread may have finished the step by now
    await stream.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(5):
        while (await replica.active())["rows"]:
            await asyncio.sleep(0.01)
    result = await replica.generate_step(request)
    assert isinstance(result, StepResult)
    idle = await replica.active()
    assert (idle["calls"], idle["streams"], idle["rows"], idle["steps"]) == (0, 0, 0, 2)
