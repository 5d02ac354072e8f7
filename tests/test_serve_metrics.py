"""The server's metrics: what is counted, that labels stay few, what Ray exports, and the dashboard that reads it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from roro_ray.types import Decision, Step, Usage
from serve.facts import RequestFacts
from serve.metrics import INSTRUMENTS, MemoryMetrics, Metrics
from tests.processes import ROOT, clean_environment, free_ports, short_temp_dir

pytestmark = pytest.mark.timeout(60)
DASHBOARD = json.loads((ROOT / "serve" / "grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
# Labels that Ray itself puts on each value of a replica.
RAY_LABELS = {"application", "deployment", "replica", "le"}
FACTS = RequestFacts(
    "req-1",
    "/v1/chat/completions",
    model="auto",
    stream=True,
    duration_ms=120.0,
    ttft_ms=7.0,
    steps={"small": 3, "large": 1},
    flops=40.0,
    flops_large_only=100.0,
)
STEP = Step(1, "A: 3", 4, 0.9, 0.8, "delimiter", Decision(1, 0.0, (0.4, 0.6), 7), Usage(11, 4, 320.0, 80.0))


def make_metrics() -> MemoryMetrics:
    return MemoryMetrics(("small", "large"))


def tell_everything(metrics: Metrics) -> None:
    """One of each, so that every instrument has a value."""
    metrics.observe_request(FACTS)
    metrics.observe_request(replace(FACTS, status=504, error="deadline_exceeded", degraded=True, flops=130.0))
    metrics.observe_step("large", STEP, 12.5)
    metrics.observe_step("small", replace(STEP, degraded=True), 3.0)
    metrics.observe_decision(0.7)
    metrics.observe_queue_wait(4.0)
    metrics.observe_load(queued=3, in_flight=2)
    metrics.observe_retry("large")
    metrics.observe_router(6)
    metrics.observe_router(7)
    metrics.observe_recorded(5)
    metrics.observe_dropped(2, "queue")


def test_what_is_told_is_counted() -> None:
    metrics = make_metrics()
    tell_everything(metrics)
    values = metrics.snapshot()
    chat = 'endpoint="/v1/chat/completions"'
    assert values[f'roro_requests{{code="200",{chat},model="auto"}}'] == 1
    assert values[f'roro_requests{{code="504",{chat},model="auto"}}'] == 1
    assert values[f'roro_errors{{{chat},error="deadline_exceeded"}}'] == 1
    assert values['roro_degraded_requests{model="auto"}'] == 1
    assert values['roro_flops_large_only{model="auto"}'] == 200
    assert (values['roro_flops_saved{model="auto"}'], values['roro_flops_overspent{model="auto"}']) == (60, 30)
    assert (values['roro_steps{model="small"}'], values['roro_steps{model="large"}']) == (1, 1)
    assert values['roro_degraded_steps{model="small"}'] == 1 and 'roro_degraded_steps{model="large"}' not in values
    assert (values['roro_tokens_in{model="large"}'], values['roro_tokens_out{model="large"}']) == (11, 4)
    assert values['roro_flops{model="large"}'] == 320
    assert (values["roro_queue_depth"], values["roro_in_flight_requests"]) == (3, 2)
    assert (values["roro_router_version"], values["roro_router_swaps"]) == (7, 1)
    assert values['roro_retries{model="large"}'] == 1
    assert values["roro_trajectories_recorded"] == 5 and values['roro_trajectories_dropped{reason="queue"}'] == 2
    assert values['roro_time_to_first_token_ms_sum{model="auto",stream="true"}'] == 14
    assert values['roro_time_to_first_token_ms_bucket{le="10",model="auto",stream="true"}'] == 2
    assert values["roro_router_decision_ms_count"] == 1 and values['roro_router_decision_ms_bucket{le="1"}'] == 1
    assert metrics.total("roro_steps") == 2 and metrics.total("roro_requests", code="504") == 1


def test_a_gauge_falls_a_counter_takes_no_zero_and_a_long_wait_has_a_bucket() -> None:
    metrics = make_metrics()
    metrics.observe_load(5, 9)
    metrics.observe_load(0, 1)
    metrics.observe_queue_wait(1e9)
    metrics.observe_router(4)
    metrics.observe_recorded(0)
    values = metrics.snapshot()
    assert (values["roro_queue_depth"], values["roro_in_flight_requests"]) == (0, 1)
    assert values['roro_queue_wait_ms_bucket{le="+Inf"}'] == 1
    assert "roro_router_swaps" not in values and "roro_trajectories_recorded" not in values


def test_what_clients_make_up_becomes_no_label() -> None:
    metrics = make_metrics()
    for number in range(300):
        made_up = replace(FACTS, model=f"gpt-{number}", endpoint=f"/{number}", error=f"code_{number}", status=number)
        metrics.observe_request(made_up)
        metrics.observe_step(f"m{number}", STEP, 1.0)
        metrics.observe_request(replace(FACTS, model=f"router-v{number}", error='x"}\n'))
    metrics.observe_request(replace(FACTS, model="small"))
    labels = {key for key in metrics.snapshot() if key.startswith("roro_requests{")}
    models = {re.search(r'model="([^"]*)"', key)[1] for key in labels}  # type: ignore[index]
    endpoints = {re.search(r'endpoint="([^"]*)"', key)[1] for key in labels}  # type: ignore[index]
    assert models == {"other", "router", "small"} and endpoints == {"other", "/v1/chat/completions"}
    assert len([key for key in metrics.snapshot() if key.startswith("roro_errors{")]) < 70
    assert metrics.total("roro_errors", error="other") >= 300 and metrics.total("roro_requests", code="other") == 100
    assert metrics.total("roro_steps", model="other") == metrics.total("roro_steps") == 300


def test_an_error_without_a_code_is_an_error_too() -> None:
    metrics = make_metrics()
    metrics.observe_request(replace(FACTS, status=400, error=None))
    assert metrics.total("roro_errors", error="http_400") == 1


def test_counts_from_many_threads_add_up() -> None:
    metrics = make_metrics()

    def tell() -> None:
        for _ in range(500):
            metrics.observe_step("small", STEP, 1.0)

    threads = [threading.Thread(target=tell) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.total("roro_steps", model="small") == 4000 and metrics.total("roro_tokens_in") == 44_000


def test_names_say_their_unit() -> None:
    for name, instrument in INSTRUMENTS.items():
        assert name.startswith("roro_") and instrument.help.endswith(".")
        assert not name.endswith("_total"), "Ray's exporter adds it"
        if instrument.kind == "histogram":
            assert name.endswith("_ms") and list(instrument.bounds) == sorted(set(instrument.bounds))


def exported_names() -> dict[str, set[str]]:
    """By the name that Prometheus sees: the labels."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    return {
        f"ray_{each.name}{suffix}": set(each.labels) for each in INSTRUMENTS.values() for suffix in suffixes[each.kind]
    }


def test_the_dashboard_reads_what_is_exported_and_all_of_it() -> None:
    exported, shown = exported_names(), set()
    for query in QUERIES:
        names = set(re.findall(r"\b(?:ray_)?roro_\w+", query))
        assert names and names <= set(exported), f"{query} reads what nobody exports: {names - set(exported)}"
        matched = set(re.findall(r'(\w+)=~?"', query)) - RAY_LABELS
        grouped = {label for part in re.findall(r"by \(([^)]*)\)", query) for label in part.split(", ")} - RAY_LABELS
        for name in names:
            assert grouped <= exported[name], f"{query} groups {name} by a label that it lacks"
        assert matched <= set().union(*(exported[name] for name in names)), query
        shown |= names
    base = {re.sub(r"^ray_|_(total|bucket|count|sum)$", "", name) for name in shown}
    assert base == set(INSTRUMENTS)
    assert not [name for name in shown if name.endswith("_sum")], "Ray makes sums up from the middles of buckets"


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    assert DASHBOARD["schemaVersion"] >= 39 and "id" not in DASHBOARD
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "application"}
    panels = DASHBOARD["panels"]
    for key in ("id", "title"):
        assert len({panel[key] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["description"] and panel["datasource"]["uid"] == "${datasource}" and panel["targets"]
            assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


RECORD = """
import sys
from pathlib import Path
import ray
from serve.metrics import RayMetrics
from tests.test_serve_metrics import tell_everything
ray.init(
    address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="WARNING",
    _temp_dir=sys.argv[1], _metrics_export_port=int(sys.argv[2]), _node_ip_address="127.0.0.1",
)
tell_everything(RayMetrics(("small", "large")))
print("told", flush=True)
sys.stdin.readline()
ray.shutdown()
"""


def scrape(port: int) -> dict[str, tuple[set[str], float]]:
    """Labels and value of the last sample of each of our names; nothing while nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        text = opener.open(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        return {}
    found = re.findall(r"^(ray_roro_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return {name: (set(re.findall(r'(\w+)="', labels)), float(value)) for name, labels, value in found}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_real_ray_exports_every_name_that_the_dashboard_reads() -> None:
    (port,) = free_ports(1)
    with short_temp_dir() as temp_dir:
        environment = {**clean_environment(temp_dir), "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-c", RECORD, str(temp_dir), str(port)]
        log = (temp_dir / "job.log").open("w")
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
        )
        try:
            wanted, deadline, got = exported_names(), time.monotonic() + 150, {}
            while not set(wanted) <= set(got):
                missing = set(wanted) - set(got)
                assert time.monotonic() < deadline and process.poll() is None, (
                    f"not exported: {sorted(missing)}\n{Path(log.name).read_text()[-3000:]}"
                )
                time.sleep(0.5)
                got = scrape(port)
        finally:
            process.communicate("\n", timeout=30)
            log.close()
    assert set(got) == set(wanted), "exported, and not in the table"
    assert all(wanted[name] <= labels for name, (labels, _) in got.items())
    assert got["ray_roro_router_version"][1] == 7 and got["ray_roro_router_swaps_total"][1] == 1
    assert got["ray_roro_queue_depth"][1] == 3 and got["ray_roro_trajectories_recorded_total"][1] == 5
