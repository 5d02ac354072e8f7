"""Routing controls over HTTP, in the body and as headers; model names; explain and info."""

from __future__ import annotations

import math
from typing import Any

import pytest

from roro_ray.routing.opinion import TILT_CENTRE
from roro_ray.types import Peek
from serve.api import ApiOptions
from serve.backend import RouterFacts
from serve.service import ServiceOptions
from tests.serving import (
    CHAT,
    EXPLAIN,
    ScriptedRouters,
    ask,
    check_error,
    events_of,
    make_calibration,
    make_served,
    read_stream,
    running,
)

pytestmark = pytest.mark.timeout(60)


async def post(body: dict[str, Any], headers: dict[str, str] | None = None, path: str = CHAT, **served: Any) -> Any:
    async with running(make_served(**served)) as client:
        return await client.post(path, json=body, headers=headers)


def routed(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()["routing"]


async def test_model_names() -> None:
    served = make_served()
    async with running(served) as client:
        listed = (await client.get("/v1/models")).json()
        names = ["auto", "router-v3", "router-v7", "small", "large"]
        assert [model["id"] for model in listed["data"]] == names and listed["object"] == "list"
        for name, model in zip(names, listed["data"], strict=True):
            assert (await client.get(f"/v1/models/{name}")).json() == model
            answer = await client.post(CHAT, json=ask(model=name))
            router = {"auto": "router-v7", "small": None, "large": None}.get(name, name)
            assert answer.json()["model"] == (router or name) and routed(answer)["router"] == router
        unknown = await client.get("/v1/models/smal")
        assert "small" in check_error(unknown, 404, "model", "model_not_found")
        for name in ("router-v4", "router-v", "gpt-5", "AUTO", "router-v3 "):
            message = check_error(await client.post(CHAT, json=ask(model=name)), 404, "model", "model_not_found")
            assert "router-v7" in message
    assert {version for version, _, _ in served.routers.asked} == {3, 7}


@pytest.mark.parametrize(("model", "share"), [("small", 0.0), ("large", 1.0)])
async def test_a_single_model_writes_all_by_name_or_by_force(model: str, share: float) -> None:
    served = make_served()
    async with running(served) as client:
        for response in (
            await client.post(CHAT, json=ask(model=model)),
            await client.post(CHAT, json=ask(routing={"force": model})),
            await client.post(CHAT, json=ask(), headers={"X-Roro-Force": model}),
            await client.post(CHAT, json=ask(model=model, routing={"force": model})),
        ):
            found = routed(response)
            assert (found["router"], found["router_version"], found["cost_weight"]) == (None, -1, None)
            assert found["large_share"] == share and found["steps"][model] == 4
    assert served.routers.asked == [], "no router is asked"
    if model == "large":
        assert found["flops_saved"] == 0.0


@pytest.mark.parametrize(("weight", "steps"), [(0, 4), (0.01, 4), (TILT_CENTRE, 2), (10.0, 0)])
async def test_the_cost_weight_by_body_and_by_header(weight: float, steps: int) -> None:
    by_body = routed(await post(ask(routing={"cost_weight": weight, "trace": True})))
    by_header = routed(await post(ask(), {"x-roro-cost-weight": repr(weight), "X-RORO-TRACE": "True"}))
    both = routed(await post(ask(routing={"cost_weight": weight}), {"x-roro-cost-weight": repr(weight)}))
    assert by_body["steps"]["large"] == by_header["steps"]["large"] == both["steps"]["large"] == steps
    assert by_body["cost_weight"] == by_header["cost_weight"] == weight
    shares = [[step["probabilities"] for step in found["trace"]] for found in (by_body, by_header)]
    assert shares[0] == shares[1]


async def test_the_default_cost_weight_is_the_servers() -> None:
    assert routed(await post(ask()))["cost_weight"] == TILT_CENTRE
    options = ServiceOptions(cost_weight=10.0)
    assert routed(await post(ask(), options=options))["steps"] == {"small": 4, "large": 0}


@pytest.mark.parametrize(
    ("target", "weight"),
    [({"large_share": 0.5}, 0.3), ({"accuracy_within": 0.02}, 0.05), ({"accuracy_within": 1}, 2.0)],
)
async def test_a_target_picks_the_calibrated_weight(target: dict[str, float], weight: float) -> None:
    header = {"X-Roro-Target": ",".join(f"{name}={value}" for name, value in target.items())}
    for body, headers in ((ask(routing={"target": target}), {}), (ask(), header)):
        routers = ScriptedRouters(calibration=make_calibration())
        assert routed(await post(body, headers, routers=routers))["cost_weight"] == weight


async def test_a_target_that_cannot_be_met_or_trusted_is_refused() -> None:
    asked = ask(routing={"target": {"large_share": 0.01}})
    message = check_error(await post(asked), 400, "routing.target")
    assert "calibrate" in message and "cost_weight" in message
    routers = ScriptedRouters(calibration=make_calibration())
    assert "0.05" in check_error(await post(asked, routers=routers), 400, "routing.target")
    asked = ask(routing={"target": {"large_share": 0.5}})
    for calibration, word in ((make_calibration(6), "version 6"), (make_calibration(pool=("a", "b")), "pool")):
        routers = ScriptedRouters(versions=[7], calibration=calibration)
        assert word in check_error(await post(asked, routers=routers), 400, "routing.target")
    routers = ScriptedRouters()
    routers.routers = (RouterFacts(7, Peek.NONE, None, "calibration.json is damaged"),)
    assert "is damaged" in check_error(await post(asked, routers=routers), 400, "routing.target")


@pytest.mark.parametrize("most", [0, 1, 2, 9])
async def test_a_cap_on_large_steps_is_kept_and_flagged(most: int) -> None:
    routers = ScriptedRouters(lambda reading: 0.9)
    found = routed(await post(ask(routing={"max_large_steps": most, "trace": True}), routers=routers))
    assert found["steps"]["large"] == min(most, 4)
    capped = [step["capped"] for step in found["trace"]]
    assert capped == [index >= most for index in range(4)]
    assert all(step["probability"] == pytest.approx(0.1 if step["capped"] else 0.9) for step in found["trace"])
    header = routed(await post(ask(), {"X-Roro-Max-Large-Steps": str(most)}, routers=routers))
    assert header["steps"] == found["steps"]
    chunks = read_stream((await post(ask(stream=True, routing={"max_large_steps": most, "trace": True}))).text)
    assert sum(step["model"] == "large" for step in events_of(chunks, "step_end")) == min(most, 2)


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({"routing": {"cost_weight": 1, "target": {"large_share": 0.5}}}, {}, "routing.cost_weight, routing.target"),
        ({"routing": {"cost_weight": 1}}, {"X-Roro-Cost-Weight": "2"}, "routing.cost_weight, X-Roro-Cost-Weight"),
        ({"routing": {"trace": False}}, {"X-Roro-Trace": "true"}, "routing.trace, X-Roro-Trace"),
        ({"routing": {"force": "small", "cost_weight": 1}}, {}, "routing.force, routing.cost_weight"),
        ({"routing": {"force": "small", "max_large_steps": 1}}, {}, "routing.max_large_steps"),
        ({"routing": {"force": "smal"}}, {}, "routing.force"),
        ({"routing": {"force": "auto"}}, {}, "routing.force"),
        ({"model": "large", "routing": {"force": "small"}}, {}, "routing.force"),
        ({"model": "small", "routing": {"cost_weight": 0.5}}, {}, "routing.cost_weight"),
        ({"model": "small"}, {"X-Roro-Cost-Weight": "0.5"}, "routing.cost_weight"),
        ({"model": "small", "routing": {"target": {"large_share": 0.5}}}, {}, "routing.target"),
        ({"routing": {"cost_weight": -1}}, {}, "routing.cost_weight"),
        ({"routing": {"cost_weight": True}}, {}, "routing.cost_weight"),
        ({"routing": {"max_large_steps": 1.5}}, {}, "routing.max_large_steps"),
        ({"routing": {"target": {}}}, {}, "routing.target"),
        ({"routing": {"target": {"large_share": 1.1}}}, {}, "routing.target.large_share"),
        ({"routing": {"costweight": 1}}, {}, "routing.costweight"),
        ({"routing": []}, {}, "routing"),
        ({}, {"X-Roro-Cost-Weight": "cheap"}, "X-Roro-Cost-Weight"),
        ({}, {"X-Roro-Cost-Weight": "nan"}, "X-Roro-Cost-Weight"),
        ({}, {"X-Roro-Target": "half"}, "X-Roro-Target"),
        ({}, {"X-Roro-Max-Large-Steps": "-1"}, "X-Roro-Max-Large-Steps"),
        ({}, {"X-Roro-Trace": "yes"}, "X-Roro-Trace"),
        ({}, {"X-Roro-Traces": "true"}, "X-Roro-Traces"),
    ],
)
async def test_controls_that_make_no_sense_are_refused_by_name(
    body: dict[str, Any], headers: dict[str, str], param: str
) -> None:
    check_error(await post(ask() | body, headers), 400, param)
    check_error(await post(ask() | body, headers, EXPLAIN), 400, param)


async def test_explain_over_the_range_of_weights_generates_nothing() -> None:
    served = make_served(routers=ScriptedRouters(lambda reading: 0.5, calibration=make_calibration()))
    async with running(served) as client:
        found = (await client.post(EXPLAIN, json=ask(routing={"cost_weight": 0.1}))).json()
        plain = (await client.post(EXPLAIN, json=ask(model="router-v3"))).json()
    assert (found["router"], found["router_version"]) == ("router-v7", 7)
    assert found["decisions"] == [
        {"index": 0, "cost_weight": 0.1, "model": "large", "probabilities": found["decisions"][0]["probabilities"]}
    ]
    assert [each["cost_weight"] for each in found["by_cost_weight"]] == [0.05, 0.3, 2.0]
    shares = [each["probabilities"]["large"] for each in found["by_cost_weight"]]
    assert shares == sorted(shares, reverse=True)
    odds = math.log(shares[0] / (1 - shares[0])) - math.log(shares[2] / (1 - shares[2]))
    assert odds == pytest.approx(3.0 * math.log(2.0 / 0.05))
    assert plain["router"] == "router-v3" and plain["decisions"][0]["cost_weight"] == TILT_CENTRE
    assert not any(engine.requests for engine in served.engines)


async def test_explain_keeps_the_cap_as_the_answer_does() -> None:
    given = {"text": "A: x", "tokens": 3, "confidence": 0.9, "confidence_min": 0.8}
    steps = [{"model": "large", **given}, {"model": "small", **given}]
    routers = ScriptedRouters(lambda reading: 0.9)
    for most, models in ((None, ["large"] * 3), (0, ["small"] * 3), (1, ["large", "small", "small"])):
        body = ask(steps=steps, routing={"max_large_steps": most})
        found = (await post(body, path=EXPLAIN, routers=routers)).json()
        assert [each["model"] for each in found["decisions"]] == models


async def test_explain_refuses_what_it_cannot_know() -> None:
    step = {"model": "small", "text": "A: x", "tokens": 3, "confidence": 0.9, "confidence_min": 0.8}
    for body, param in (
        (ask(model="small"), "model"),
        (ask(steps=[step | {"model": "medium"}]), "steps[0].model"),
        (ask(steps=[step, {"model": "small", "text": "x"}]), "steps[1].confidence"),
        (ask(steps=[step | {"confidence_min": None}]), "steps[0].confidence_min"),
        (ask(steps=[step] * 65), "steps"),
        (ask(steps={}), "steps"),
        (ask(stream=True), "stream"),
    ):
        check_error(await post(body, path=EXPLAIN), 400, param)
    for peek in (Peek.STEP, Peek.FIRST_TOKEN):
        refused = await post(ask(), path=EXPLAIN, routers=ScriptedRouters(peek=peek))
        assert "routing.trace" in check_error(refused, 400, "model")


async def test_explain_without_a_router() -> None:
    for kind, status, code in (("gone", 503, "unavailable"), ("dropped", 503, "unavailable")):
        routers = ScriptedRouters()
        setattr(routers, kind, 0)
        check_error(await post(ask(), path=EXPLAIN, routers=routers), status, code=code)
    routers = ScriptedRouters()
    routers.hangs = True
    late = await post(ask(), path=EXPLAIN, routers=routers, options=ServiceOptions(timeout_s=0.1))
    check_error(late, 504, code="deadline_exceeded")


@pytest.mark.parametrize("calibrated", [True, False])
async def test_info_says_what_is_served(calibrated: bool) -> None:
    routers = ScriptedRouters(calibration=make_calibration() if calibrated else None)
    api = ApiOptions(examples=["Say q."])
    async with running(make_served(routers=routers, api=api)) as client:
        found = (await client.get("/v1/routing/info")).json()
    assert found["models"] == [
        {"name": "small", "parameters": 10, "flops_per_token": 20.0},
        {"name": "large", "parameters": 100, "flops_per_token": 200.0},
    ]
    assert (found["routers"], found["default"]) == (["router-v3", "router-v7"], "router-v7")
    weights = found["cost_weight"]
    assert weights["low"] < weights["default"] == TILT_CENTRE < weights["high"]
    assert (found["examples"], found["needs_key"]) == (["Say q."], False)
    assert found["limits"]["max_choices"] == 8
    if not calibrated:
        assert found["calibration"] is None
        return
    point = found["calibration"]["points"][1]
    assert found["calibration"]["queries"] == 100 and point["cost_weight"] == 0.3
    assert point["accuracy"] == pytest.approx([0.93, 0.92, 0.94]) and len(found["calibration"]["points"]) == 3
