"""`python -m serve [run_dir=runs/NAME] [key=value ..]`: serve a run's router on this machine until Ctrl+C.

Starts a Ray of its own (or joins the one that RAY_ADDRESS names), deploys, and prints the address with a request that
can be pasted. Without `run_dir` the newest run under runs/ is served.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence

from roro_ray.errors import RoroError
from serve.config import Served, ServerConfig, find_newest_run, load_server_config, read_served

_EXAMPLE = "Start with 36. A: double; B: times 04; C: subtract 38."
_USER_ERROR, _INTERRUPTED = 2, 130
_READY_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m serve", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of serve/config.py")
    arguments = parser.parse_args(argv)
    try:
        config = load_server_config(overrides=arguments.overrides)
        config.run_dir = config.run_dir or find_newest_run()
        served = read_served(config)
        _warn_open(config)
        with running(served) as url:
            print(make_greeting(served, url), flush=True)
            _wait_for_signal()
    except RoroError as error:
        print(f"python -m serve: {error}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:  # while it starts; later Ctrl+C is how it ends
        return _INTERRUPTED
    return 0


@contextlib.contextmanager
def running(served: Served) -> Iterator[str]:
    """The application, deployed and answering while the block runs; gives its URL."""
    # One event loop per replica; with HAProxy 3 to 5 times the requests per second of Serve's own proxy.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    # It would hold log lines back until there are a thousand; the access log and errors belong on disk at once.
    os.environ.setdefault("RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE", "1")
    # A hung replica cannot end its work: without this it keeps its CPU or GPU for another minute.
    os.environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")
    if served.config.haproxy:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    else:
        # Of no use without HAProxy, and the server would take half a minute to stop.
        os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", "0")
    from actors.cluster import open_cluster
    from roro_ray.config import RayConfig

    with open_cluster(RayConfig()):
        yield from _serve(served)


def _serve(served: Served) -> Iterator[str]:
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from serve.app import make_application

    config = served.config
    try:
        options = {"host": config.host, "port": config.port, "request_timeout_s": None}
        serve.start(proxy_location="HeadOnly", http_options=options)  # Serve's own default: one on every node
        # Serve would write a line for every call between deployments; the server's own log has one a request.
        quiet = LoggingConfig(enable_access_log=False)
        serve.run(make_application(served), name="roro", route_prefix="/", logging_config=quiet)
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{host}:{config.port}"
        _wait_ready(url)
        yield url
    finally:
        serve.shutdown()


def _wait_ready(url: str) -> None:
    """Wait until the ingress knows its models: whoever is greeted should be answered."""
    until = time.monotonic() + _READY_S
    while True:
        try:
            # Of this machine and without a proxy, whatever the environment says.
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/healthz", timeout=10):
                return
        except OSError as error:  # refused, 503, or no answer yet
            if time.monotonic() > until:
                print(f"warning: {url}/healthz is not well after {_READY_S:g} s ({error})", file=sys.stderr)
                return
        time.sleep(0.1)


def make_greeting(served: Served, url: str) -> str:
    """What a person who has just started the server wants to paste."""
    keyed = bool(served.config.security.key_file or served.config.security.key_hashes)
    key = ' -H "Authorization: Bearer $RORO_KEY"' if keyed else ""
    text = served.examples[0] if served.examples else _EXAMPLE
    body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": text}], "routing": {"trace": True}})
    return "\n".join(
        [
            f"Serving {served.router}",
            f"  page     {url}/",
            f"  OpenAI   base_url={url}/v1  model=auto",
            "  try      " + f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
            "Ctrl+C stops it.",
        ]
    )


def _warn_open(config: ServerConfig) -> None:
    keyed = config.security.key_file or config.security.key_hashes
    if config.host not in ("127.0.0.1", "localhost", "::1") and not keyed:
        print(
            f"warning: listening on {config.host} without API keys: whoever reaches this port can use the models. "
            "Give security.key_file (docs/security.md)",
            file=sys.stderr,
        )


def _wait_for_signal() -> None:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(1.0):
        pass


if __name__ == "__main__":
    sys.exit(main())
