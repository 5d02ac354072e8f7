"""`vllm serve` of a tiny model as a process of its own, on a free port of loopback."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from processes import clean_environment, free_ports, short_temp_dir

# One thread, no compilation, no telemetry, no binding to a core that others may use.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_OPTIONS = (
    *("--enforce-eager", "--dtype", "float32", "--seed", "0"),
    *("--block-size", "32", "--kv-cache-memory-bytes", str(64 * 2**20)),
    *("--max-model-len", "2048", "--max-num-seqs", "16"),
)


@contextmanager
def running_vllm(model: Path, name: str, *options: str, timeout_s: float = 300.0) -> Iterator[str]:
    """The server's url (without /v1), once it answers; the server and its family are ended at the end."""
    with short_temp_dir() as folder:
        port = free_ports(1)[0]
        log = folder / "vllm.log"
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), *_OPTIONS, *options),
        ]
        with log.open("w") as out:
            environment = {**clean_environment(folder), **_ENVIRONMENT}
            process = subprocess.Popen(command, env=environment, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log, timeout_s)
            yield url
        finally:
            _end(process)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        assert process.poll() is None, f"vLLM ended:\n{log.read_text()[-3000:]}"
        try:
            if httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise AssertionError(f"vLLM does not answer within {timeout_s} s:\n{log.read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=5)
    for member in alive:
        member.kill()
