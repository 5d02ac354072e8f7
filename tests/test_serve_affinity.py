"""Session affinity on a real Serve: calls of one request, many at once, all arrive; a session stays on its replica."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve.affinity import make_session, split_session

ROOT = Path(__file__).parents[1]


def test_a_session_id_tells_its_try() -> None:
    assert split_session(make_session("a+b", 3)) == ("a+b", 3)
    assert split_session("plain") == ("plain", 0)
    assert split_session("odd+name") == ("odd+name", 0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_all_calls_of_one_request_arrive_and_sessions_stay() -> None:
    command = [sys.executable, str(ROOT / "tests" / "affinity_host.py"), "600", "32", "40"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert sorted(number for number, _ in answers) == list(range(600))
    homes: dict[int, set[int]] = {}
    for number, pid in answers:
        homes.setdefault(number % 40, set()).add(pid)
    assert all(len(pids) == 1 for pids in homes.values()), "a session's calls met two replicas"
    assert len(set.union(*homes.values())) == 2, "40 sessions should spread over both replicas"
