"""The access log: one line of JSON a request, whatever a client sends, and nothing that must not be kept."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serve.access_log import AccessLog, make_request_id
from serve.facts import RequestFacts

pytestmark = pytest.mark.timeout(60)
FACTS = RequestFacts(
    request_id="req-1",
    endpoint="/v1/chat/completions",
    client="127.0.0.1",
    key_name="team-a",
    model="auto",
    router_version=30,
    stream=True,
    duration_ms=120.12345,
    ttft_ms=7.0,
    queue_ms=0.25,
    steps={"small": 3, "large": 1},
    tokens_in=70,
    tokens_out=40,
    flops=4e9,
    flops_large_only=1e10,
    ends=("answer",),
    user="ann@example.org",
)
FORGED = 'x"}\r\n{"status":200,\x00\x1b[31m\x7f\x85\u2028\ud800'


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_all_that_is_known(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "logs" / "access.log", replica="r1")
    log.write(FACTS)
    log.close()
    (line,) = read_lines(tmp_path / "logs" / "access-r1.log")
    age = datetime.now(UTC) - datetime.fromisoformat(line.pop("time"))
    assert 0 <= age.total_seconds() < 30
    user = line.pop("user")
    assert len(user) == 16 and int(user, 16)
    assert line == {
        "request_id": "req-1",
        "client": "127.0.0.1",
        "key": "team-a",
        "endpoint": "/v1/chat/completions",
        "model": "auto",
        "router_version": 30,
        "status": 200,
        "error": None,
        "stream": True,
        "duration_ms": 120.123,
        "ttft_ms": 7.0,
        "queue_ms": 0.25,
        "steps": {"small": 3, "large": 1},
        "tokens_in": 70,
        "tokens_out": 40,
        "flops": 4e9,
        "flops_saved": 6e9,
        "degraded": False,
        "ends": ["answer"],
    }


def test_to_stdout_where_no_file_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    log = AccessLog()
    log.write(FACTS)
    log.write(RequestFacts("req-2", "/healthz", status=503, error="loading"))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["request_id"], second["status"], second["error"]) == ("req-1", 503, "loading")
    assert second["flops_saved"] is None and second["user"] is None and second["ttft_ms"] is None


def test_no_client_can_forge_a_line_or_fill_the_disk(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "a.log")
    names = ("request_id", "endpoint", "client", "key_name", "model", "error", "user")
    log.write(replace(FACTS, **dict.fromkeys(names, FORGED)))
    log.write(replace(FACTS, **dict.fromkeys(names, "y" * 1_000_000)))
    log.close()
    raw = (tmp_path / "a.log").read_bytes()
    assert raw.count(b"\n") == 2 and len(raw) < 5000
    assert all(byte == 0x0A or 0x20 <= byte < 0x7F for byte in raw)
    forged, long = read_lines(tmp_path / "a.log")
    assert forged["model"] == FORGED and forged["status"] == 200 and long["model"] == "y" * 200 + "..."


def test_figures_that_are_none_are_valid_json(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "a.log")
    log.write(replace(FACTS, duration_ms=math.nan, flops=math.inf))
    line = json.loads((tmp_path / "a.log").read_text(), parse_constant=pytest.fail)
    assert line["duration_ms"] is None and line["flops"] is None and line["flops_saved"] is None


def test_a_user_is_only_a_hash_that_agrees_under_one_secret() -> None:
    def users(log: AccessLog) -> list[str]:
        return [json.loads(log.format(replace(FACTS, user=user)))["user"] for user in ("ann", "bob", "ann")]

    ann, bob, again = users(AccessLog(user_key="secret"))
    assert ann == again != bob and "ann" not in ann
    assert users(AccessLog(user_key="secret"))[0] == ann != users(AccessLog(user_key="other"))[0]
    assert users(AccessLog())[0] != users(AccessLog())[0]  # without a secret nobody can try names out


def test_files_are_set_aside_at_their_size_and_only_the_last_kept(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "a.log", max_mb=0.002, backups=2)
    for number in range(40):
        log.write(replace(FACTS, request_id=f"req-{number}"))
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "a.log.1", "a.log.2"]
    assert all(path.stat().st_size <= 0.002 * 2**20 for path in tmp_path.iterdir())
    assert read_lines(tmp_path / "a.log")[-1]["request_id"] == "req-39"


def test_a_disk_that_fails_costs_lines_and_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    log = AccessLog("/dev/full")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            log.write(FACTS)
        log.close()
    assert log.failed == 3 and len(caplog.records) == 1 and "No space left" in caplog.text
    assert capsys.readouterr().err.count("Traceback") == 0


@pytest.mark.parametrize("given", ["a", "req-1", "0123456789abcdef:x_y.z", "a" * 128])
def test_a_clients_request_id_is_kept_where_it_is_safe(given: str) -> None:
    assert make_request_id(given) == given


@pytest.mark.parametrize("given", [None, "", "a" * 129, "a b", "a\n", "a\r\nSet-Cookie: x", 'a"', "ä", "a/b", "\u0661"])
def test_any_other_is_replaced_by_a_new_one(given: str | None) -> None:
    made = make_request_id(given)
    assert made != make_request_id(given) and made.startswith("req-") and len(made) == 36
    assert make_request_id(made) == made
