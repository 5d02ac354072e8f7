"""The calibration job as users start it: killed and resumed on Ray, and no work done twice."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from roro_ray.config import RouterConfig
from roro_ray.evaluation.calibrate import calibrate
from roro_ray.evaluation.calibration import check_calibration, load_calibration
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.routing.router import make_router
from roro_ray.routing.router_files import save_router
from roro_ray.settings import load_config
from tests.processes import TINY, run_job, short_temp_dir, start_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
WEIGHTS = [0.01, 0.2, 0.24, 0.28, 0.4, 10.0]
SETTINGS = [
    *TINY,
    "calibrate.queries=30",
    "calibrate.bootstrap=50",
    f"calibrate.cost_weights={WEIGHTS}".replace(" ", ""),
]


def test_calibrate_killed_and_run_again_goes_on_and_is_then_done(tmp_path: Path) -> None:
    router = save_router(make_router(RouterConfig(prior=0.5), 2), tmp_path / "router", 12)
    shutil.copytree(router, tmp_path / "other")
    partial = router / "calibration.partial.json"
    command = ["-m", "jobs.calibrate", *SETTINGS, f"run_dir={tmp_path / 'run'}", "--router", str(router)]
    with short_temp_dir() as temp_dir:
        process = start_job(temp_dir, *command)
        deadline = time.monotonic() + 120
        while not partial.exists():
            assert process.poll() is None and time.monotonic() < deadline, (temp_dir / "job.log").read_text()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert load_calibration(router) is None, "the job was to be killed in the middle"
    content = json.loads(partial.read_text())
    assert "small" in content["scores"] and len(content["scores"]) < len(WEIGHTS) + 2
    # An accuracy that no rollout gives shows whether what was kept is used.
    content["scores"]["small"]["values"][0] = [0.125] * 30
    partial.write_text(json.dumps(content))
    with short_temp_dir() as temp_dir:
        printed = run_job(temp_dir, *command)
    found = load_calibration(router)
    assert found is not None and not partial.exists()
    assert found.small_accuracy.value == 0.125, "what was kept was rolled out again"
    assert "on 30 held-out queries" in printed and f"Calibration: {router / 'calibration.json'}" in printed

    with LocalHost(load_config(SETTINGS)) as host:
        engines = asyncio.run(host.pool.ready())
        straight = calibrate(host.config, tmp_path / "other", engines, host)
    check_calibration(found, [engine.fingerprint for engine in engines], 12)
    assert [at.cost_weight for at in found.points] == WEIGHTS
    assert (found.points[0].large_share.value, found.points[-1].large_share.value) == (1.0, 0.0)
    for one, other in zip(found.points, straight.points, strict=True):
        # Batches of other sizes round otherwise, so that a decision on the edge may fall otherwise.
        assert one.large_share.value == pytest.approx(other.large_share.value, abs=0.02)
        assert one.accuracy.value == pytest.approx(other.accuracy.value, abs=0.04)

    written = (router / "calibration.json").stat().st_mtime_ns
    with short_temp_dir() as temp_dir:
        assert f"calibrate: already done in {router}" in run_job(temp_dir, *command)
    assert (router / "calibration.json").stat().st_mtime_ns == written
