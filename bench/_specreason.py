"""A loop like SpecReason's published one (github.com/ruipeterpan/specreason): two servers, one query at a time, text.

Each step: the small model drafts it, the large one reads all of it behind a question and gives a score in one token,
and where the score is too low it writes the step itself. Every request carries the whole text.

Not of the original: scores are the random models' and mean nothing, so that a script says which drafts are rejected;
prompts are plain text instead of a chat's; steps have a fixed number of tokens; and the list of models is not asked for
before each request, as the original does (which makes this loop faster than it).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from roro_ray.config import STEP_DELIMITER, PoolConfig
from roro_ray.engines.protocol import StepRequest

QUESTION = (
    "Evaluate the last reasoning step solely based on factual correctness and logical validity. Ignore style, "
    "phrasing, or overall usefulness: only judge whether the step is objectively correct and logically follows from "
    "prior steps. Assign a score from 0 to 9.\n\nI think the quality score is: "
)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of a finished query: kept ones, drafts that were thrown away, and scores."""

    kept: tuple[int, int]
    rejected: int
    scores: int


class Completer(Protocol):
    """Continues a text by exactly so many tokens of one of the two models."""

    async def complete(self, model: int, text: str, tokens: int, scores: bool = False) -> tuple[str, int]:
        """The new text, and its number of tokens; `scores`: with the ten likeliest tokens, as a score is read."""
        ...


async def solve(completer: Completer, query: str, script: Sequence[int], step_tokens: int) -> Work:
    """Write one query's steps: where the script says 1, the draft is rejected and the large model writes the step."""
    text, kept, rejected, scores = query + STEP_DELIMITER, [0, 0], 0, 0
    for writer in script:
        step, written = await completer.complete(0, text, step_tokens)
        scores += (await completer.complete(1, text + step + STEP_DELIMITER + QUESTION, 1, True))[1]
        if writer == 1:
            rejected += written
            step, written = await completer.complete(1, text, step_tokens)
        kept[writer] += written
        text += step + STEP_DELIMITER
    return Work((kept[0], kept[1]), rejected, scores)


class EngineCompleter:
    """The loop on this project's engines in this process: no HTTP, no second process."""

    def __init__(self, engines: Sequence[Any]):
        self._engines = engines

    async def complete(self, model: int, text: str, tokens: int, scores: bool = False) -> tuple[str, int]:
        result = await self._engines[model].generate_step(StepRequest(text, tokens, delimiter=""))
        return result.text, len(result.token_ids)


class ServerCompleter:
    """The loop over HTTP, by the official client, which the original uses as well."""

    def __init__(self, urls: Sequence[str]):
        from openai import AsyncOpenAI

        self._clients = [AsyncOpenAI(api_key="EMPTY", base_url=f"{url}/v1", timeout=600, max_retries=0) for url in urls]

    async def complete(self, model: int, text: str, tokens: int, scores: bool = False) -> tuple[str, int]:
        answer = await self._clients[model].completions.create(
            model="model",
            prompt=text,
            max_tokens=tokens,
            temperature=0.0,
            logprobs=10 if scores else None,
            extra_body={"min_tokens": tokens, "ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.choices[0].text, answer.usage.completion_tokens


@contextlib.asynccontextmanager
async def serve_pool(config: PoolConfig, positions: int) -> AsyncIterator[list[str]]:
    """Two `vllm serve` processes, one after the other: urls without /v1."""
    with contextlib.ExitStack() as stack:
        urls = []
        for model in config.models:
            arguments = ["--model", model.path, "--dtype", model.dtype, "--max-model-len", str(positions)]
            if model.device == "cpu":
                arguments += ["--enforce-eager", "--block-size", "32"]
                arguments += ["--kv-cache-memory-bytes", str(config.cache_mb << 20)]
            else:
                arguments += ["--tensor-parallel-size", str(model.tensor_parallel)]
                if model.memory_fraction:
                    arguments += ["--gpu-memory-utilization", str(model.memory_fraction)]
            _, _, gpu = model.device.partition(":")
            gpus = ",".join(map(str, range(int(gpu), int(gpu) + model.tensor_parallel))) if gpu else ""
            environment = {"CUDA_VISIBLE_DEVICES": gpus} if gpu else {}
            urls.append(stack.enter_context(await asyncio.to_thread(_Server, arguments, environment)))
        yield urls


class _Server:
    """A `vllm serve` process on a free port of loopback; a context that gives its url."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], timeout_s: float = 600.0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 (closed in __exit__)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--served-model-name", "model"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--seed", "0", *arguments]
        variables = {**os.environ, **_ENVIRONMENT, **environment}
        variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # of this process's engines
        self._process = subprocess.Popen(command, env=variables, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            _wait(lambda: _is_up(self.url), self._process, Path(self._log.name), timeout_s)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> str:
        return self.url

    def __exit__(self, *_: object) -> None:
        family = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for member in psutil.wait_procs(family, timeout=5)[1]:
            member.kill()
        self._log.close()


def _wait(is_up: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not is_up():
        if process.poll() is not None or time.monotonic() > until:
            state = f"ended with {process.returncode}" if process.poll() is not None else f"no answer in {timeout_s} s"
            raise RuntimeError(f"vllm serve: {state}; its last words:\n{log.read_text()[-3000:]}")
        time.sleep(0.3)


def _is_up(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def total(works: Iterator[Work] | Sequence[Work]) -> Work:
    """The sum over queries."""
    works = list(works)
    kept = (sum(work.kept[0] for work in works), sum(work.kept[1] for work in works))
    return Work(kept, sum(work.rejected for work in works), sum(work.scores for work in works))
