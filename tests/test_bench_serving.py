"""The serving benchmark runs, and tells what its readers look for. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench._serving_client import _StreamReader
from bench._serving_streams import percentiles
from tests.processes import run_job, short_temp_dir


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_quick_run_tells_everything(tmp_path: Path) -> None:
    plot = tmp_path / "streams.png"
    with short_temp_dir() as temp_dir:
        printed = run_job(temp_dir, "-m", "bench.serving", "--quick", "--plot", str(plot), timeout_s=560)
    found = json.loads(next(line for line in printed.splitlines() if line.startswith('{"conditions"')))
    assert found["conditions"]["versions"]["ray"] and found["conditions"]["cores"] >= 1
    measured = found["proxies"]["default"]
    for regime in ("shipped", "slowed"):
        one, several = measured[regime]["overhead"]
        assert one["concurrency"] == 1 and several["concurrency"] > 1
        for level in (one, several):
            assert set(level["ms_per_request"]) == {"served", "handles", "in_process"}
            assert min(level["ms_per_request"].values()) > 0 and level["ratio"]["served/handles"] > 0
            assert {"ingress", "router", "models", "proxy", "client"} <= set(level["cpu_ms_per_request"]["served"])
        parts = measured[regime]["breakdown_ms"]
        whole = sum(parts[name] for name in ("http", "router_decisions", "engine", "engine_handles", "rest"))
        assert whole == pytest.approx(parts["total"], abs=0.1)
        assert measured[regime]["ttft"]["queries"] > 0 and measured[regime]["ttft"]["decision_ms"] > 0
        assert [level["concurrency"] for level in measured[regime]["streams"]] == [1, 8]
        for level in measured[regime]["streams"]:
            assert level["refused"] == level["dropped"] == level["garbled"] == 0
            assert level["streams"] >= level["concurrency"] and level["streams_per_s"] > 0
    # With every forward pass 5 ms longer, the models must take longer: else nothing was slowed.
    assert measured["slowed"]["breakdown_ms"]["engine"] > 5 * measured["slowed"]["breakdown_ms"]["steps_per_request"]
    full = measured["overload"]
    assert full["answered"] == full["slots"] + full["queue"] and full["refused_429"] == full["sent_beyond"] > 0
    assert min(full["retry_after_s"]) >= 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def chunk(finish: str | None = None, **delta: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]}).encode() + b"\n\n"


def test_a_whole_stream_is_read_however_it_is_cut() -> None:
    events = [chunk(role="assistant", content=""), chunk(content="é 1"), chunk(content="2"), chunk("stop")]
    whole = b"".join([*events, b"data: [DONE]\n\n"])
    for size in (1, 7, len(whole)):
        reader = _StreamReader(0.0)
        for start in range(0, len(whole), size):
            reader.feed(whole[start : start + size])
        assert reader.find_problem() is None and "".join(reader.texts) == "é 12" and reader.ttft_s is not None


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([chunk(role="assistant"), chunk(content="1"), chunk("stop")], "ended without"),
        ([chunk(content="1"), chunk("stop"), b"data: [DONE]\n\n"], "names no role"),
        ([chunk(role="assistant"), b"data: [DONE]\n\n"], "finish_reason"),
        ([chunk(role="assistant"), b'data: {"error": {"code": "timeout"}}\n\n'], "error amid"),
        ([chunk(role="assistant"), chunk("stop"), b"data: [DONE]\n\n", chunk(content="1")], "after the end"),
        ([chunk(role="assistant"), b"event: odd\n\n"], "is none"),
    ],
)
def test_a_damaged_stream_is_noticed(events: list[bytes], problem: str) -> None:
    reader = _StreamReader(0.0)
    reader.feed(b"".join(events))
    assert problem in (reader.find_problem() or "")


def test_percentiles_of_a_hundred() -> None:
    assert percentiles([float(i) for i in range(1, 101)]) == {"p50": 51.0, "p95": 96.0, "p99": 100.0, "max": 100.0}
