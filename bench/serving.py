"""The server under load: what routing over HTTP costs beside the models, streams by the hundred, and overload.

    python -m bench.serving [--quick] [--run-dir RUN] [--plot FILE.png] [--haproxy]

Everything is measured in one run, on one machine, with the client on the server's own cores. The memo is off. Two
regimes: the shipped models, whose steps take a few milliseconds (no real model is so fast, so overhead shows most), and
the same models with every forward pass slowed by a wait, as if it ran on an accelerator at a large model's pace. Wall
time is noisy where other work shares the machine, so processor time of each process is told beside it. The bench fails
where a stream is refused, broken or differs from the plain answer, and where a request beyond the limit is not refused
at once with 429. `--haproxy` measures the same a second time behind Serve's HAProxy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench._serving_client import Client
from bench._serving_host import (
    LoopThread,
    connect,
    deploy,
    free_port,
    make_local_pool,
    make_run,
    wait_ready,
    with_answers,
)
from bench._serving_overhead import Overhead, Recorded, record
from bench._serving_plot import plot_streams
from bench._serving_streams import compare_ttft, measure_streams, overload
from roro_ray.data.run_dir import make_versions
from serve.__main__ import running
from serve.config import Served, load_server_config, read_served

_DEADLINE_S = 300  # of an answer: a machine that is busy with other work must not fail the bench


@dataclass(frozen=True, slots=True)
class Regime:
    """How much is measured with models of one pace.

    `token_ms` is the wait in each forward pass; `solo` and `crowd` are the requests of the overhead comparison one at
    a time and `lanes` at a time; `levels` the numbers of concurrent streams, each with at least `least` streams.
    """

    name: str
    token_ms: float
    solo: int
    crowd: int
    lanes: int
    rounds: int
    levels: tuple[int, ...]
    least: int
    ttft: int


@dataclass(frozen=True, slots=True)
class Overload:
    """A server of so many slots and places in its queue, slowed so that no answer ends while it is asked for more."""

    slots: int
    queue: int
    extra: int
    token_ms: float


FULL = (
    Regime("shipped", 0.0, 40, 128, 32, 3, (1, 8, 32, 125, 250, 500), 32, 20),
    Regime("slowed", 20.0, 5, 64, 32, 3, (1, 8, 32, 125, 500), 5, 8),
)
QUICK = (
    Regime("shipped", 0.0, 4, 8, 4, 2, (1, 8), 6, 3),
    Regime("slowed", 5.0, 2, 8, 4, 1, (1, 8), 2, 2),
)
FULL_OVERLOAD = Overload(16, 16, 200, 100.0)
QUICK_OVERLOAD = Overload(2, 2, 10, 100.0)


@dataclass(frozen=True, slots=True)
class Bench:
    """One server, behind one proxy, and what is to be measured on it."""

    served: Served
    url: str
    loop: LoopThread
    ttft_rounds: int

    def measure(self, regimes: Sequence[Regime], limits: Overload) -> dict[str, Any]:
        """All regimes, then the overload."""
        found: dict[str, Any] = {}
        recorded: list[Recorded] = []
        for place, regime in enumerate(regimes):
            if place or regime.token_ms:
                deploy(self.served, self.url, regime.token_ms)
            found[regime.name], recorded = self.loop.run(self._measure_regime(regime))
        narrow = with_answers(self.served, max_concurrent=limits.slots, max_queue=limits.queue, max_choices=1)
        deploy(narrow, self.url, limits.token_ms)
        found["overload"] = self.loop.run(self._overload(limits, recorded))
        return found

    async def _measure_regime(self, regime: Regime) -> tuple[dict[str, Any], list[Recorded]]:
        async with Client(self.url) as client:
            _say(f"{regime.name}: recording")
            recorded = await record(client, max(regime.crowd, regime.solo, regime.ttft))
            handles, backend = connect(self.served)
            version = (await backend.routers.describe()).default
            pool = await make_local_pool(self.served.pool, regime.token_ms)
            log = Path(self.served.config.access_log)
            ways = Overhead(client, handles, backend.routers, pool, self.served.episode, log, version)

            async def decide(item: Recorded) -> None:
                await ways.decide(item.readings()[:1], "ttft")

            overhead, streams = [], []
            for lanes, count in ((1, regime.solo), (regime.lanes, regime.crowd)):
                overhead.append(await ways.compare(recorded[:count], lanes, regime.rounds))
                _say(f"{regime.name}: {overhead[-1]}")
            parts = await ways.break_down(recorded[: regime.solo])
            _say(f"{regime.name}: {parts}")
            small = self.served.pool.models[0].name
            ttft = await compare_ttft(client, recorded, small, self.ttft_rounds, decide, regime.ttft)
            _say(f"{regime.name}: {ttft}")
            for level in regime.levels:
                streams.append(await measure_streams(client, recorded, level, regime.least))
                _say(f"{regime.name}: {streams[-1]}")
        found = {
            "token_ms": regime.token_ms,
            "overhead": overhead,
            "steps_unlike_recorded": ways.other_steps,
            "breakdown_ms": parts,
            "ttft": ttft,
            "streams": streams,
        }
        return found, recorded

    async def _overload(self, limits: Overload, recorded: Sequence[Recorded]) -> dict[str, Any]:
        async with Client(self.url) as client:
            longest = sorted(recorded, key=lambda each: -each.tokens)
            found = await overload(client, longest, limits.slots, limits.queue, limits.extra)
        _say(f"overload: {found}")
        return found


def measure_proxy(options: argparse.Namespace, run_dir: Path, folder: Path) -> dict[str, Any]:
    """Serve the run behind the proxy asked for, and measure."""
    haproxy = options.proxy == "haproxy"
    overrides = [f"run_dir={run_dir}", f"port={free_port()}", f"haproxy={haproxy}", "memo_entries=0"]
    overrides.append(f"answer.timeout_s={_DEADLINE_S}")
    served = read_served(load_server_config(overrides=[*overrides, f"access_log={folder / 'access.log'}"]))
    regimes, limits = (QUICK, QUICK_OVERLOAD) if options.quick else (FULL, FULL_OVERLOAD)
    if haproxy:
        _separate_haproxy(folder)
    loop = LoopThread()
    try:
        with running(served) as url:
            wait_ready(url)
            return Bench(served, url, loop, 1 if options.quick else 3).measure(regimes, limits)
    finally:
        loop.close()


def _separate_haproxy(folder: Path) -> None:
    """Its files and ports apart from those of another one on this machine."""
    for name in ("CONFIG_FILE_LOC", "SOCKET_PATH", "SERVER_STATE_FILE", "METRICS_SOCKET_PATH"):
        os.environ.setdefault(f"RAY_SERVE_HAPROXY_{name}", str(folder / name.lower()))
    os.environ.setdefault("RAY_SERVE_HAPROXY_SERVER_STATE_BASE", str(folder))
    for name in ("METRICS_PORT", "STATS_PORT"):
        os.environ.setdefault(f"RAY_SERVE_HAPROXY_{name}", str(free_port()))


def _measure_apart(options: argparse.Namespace, run_dir: Path, proxy: str) -> dict[str, Any]:
    """The same behind another proxy, in a process of its own, since Serve reads that choice when it is imported."""
    command = [sys.executable, "-m", "bench.serving", "--run-dir", str(run_dir), "--proxy", proxy]
    done = subprocess.run([*command, *(["--quick"] if options.quick else [])], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the measurement behind {proxy} failed (its error is above)")
    found: dict[str, Any] = json.loads(done.stdout)["proxies"][proxy]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description="The server under load: overhead, streams, overload.")
    parser.add_argument("--quick", action="store_true", help="tiny counts: to see that it works")
    parser.add_argument("--run-dir", type=Path, help="the run to serve; default: one with an untrained router")
    parser.add_argument("--plot", type=Path, help="a PNG file for throughput and waiting against concurrency")
    parser.add_argument("--haproxy", action="store_true", help="measure behind Serve's HAProxy too")
    parser.add_argument("--proxy", choices=["default", "haproxy"], default="default", help="which to measure first")
    options = parser.parse_args(argv)
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="rb-") as temporary:
        folder = Path(temporary)
        run_dir = options.run_dir or make_run(folder / "run")
        proxies = {options.proxy: measure_proxy(options, run_dir, folder)}
        if options.haproxy and options.proxy != "haproxy":
            proxies["haproxy"] = _measure_apart(options, run_dir, "haproxy")
    conditions = {
        "cores": os.cpu_count(),
        "load_average_before": load_before,
        "load_average_after": os.getloadavg(),
        "client": "on the server's cores, in the process `client` of the processor times",
        "versions": make_versions(),
    }
    found = {"conditions": conditions, "proxies": proxies}
    if options.plot:
        plot_streams(proxies, options.plot)
    print(json.dumps(found))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
