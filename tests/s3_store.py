"""An S3 server of the test's own, in a process of its own, and what a client must know to reach it.

Not in the test's process: moto brings Flask, whose proxies raise when they are looked at outside a request, and vLLM
looks at every object of every module.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test-secret-value",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
WRITES = ("PUT", "POST", "DELETE")


@dataclass
class Gate:
    """Counts the server's requests, and has some answered with an error.

    `fails` is asked with the method, the path and the number of writes so far; True answers 503.
    """

    fails: Callable[[str, str, int], bool] = lambda method, path, writes: False
    writes: int = 0
    refused: int = 0
    log: list[tuple[str, str]] = field(default_factory=list)

    def refuses(self, method: str, path: str) -> bool:
        self.writes += method in WRITES
        refuse = self.fails(method, path, self.writes)
        self.refused += refuse
        self.log.append((method, path))
        return refuse

    def answer(self, server: Connection) -> None:
        """Decide on the server's requests, one after another, until it is gone."""
        while True:
            try:
                server.send(self.refuses(*server.recv()))
            except (EOFError, OSError):
                return


def serve(gate: Connection) -> None:
    """The server's process: tells its address, then asks before each request whether to refuse it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    gate.send(server.get_host_and_port())
    application, turn = server._server.app, threading.Lock()

    def answer(environ: dict[str, Any], start: Any) -> Any:
        with turn:
            gate.send((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
            refuse = gate.recv()
        if refuse:
            start("503 Service Unavailable", [("Content-Type", "application/xml")])
            return [b"<Error><Code>ServiceUnavailable</Code><Message>busy</Message></Error>"]
        return application(environ, start)

    server._server.app = answer
    gate.send("ready")
    threading.Event().wait()


@contextmanager
def running_s3(*buckets: str) -> Iterator[tuple[dict[str, Any], Gate]]:
    """A server with some buckets, and the environment's credentials for it; gives `storage.options` and the gate."""
    import boto3
    import s3fs

    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    server = processes.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    theirs.close()
    gate = Gate()
    with mock.patch.dict(os.environ, CREDENTIALS):
        try:
            if not ours.poll(60):
                raise RuntimeError("The S3 server did not start in 60 s.")
            host, port = ours.recv()
            assert ours.recv() == "ready"
            threading.Thread(target=gate.answer, args=(ours,), daemon=True).start()
            url = f"http://{host}:{port}"
            client = boto3.client("s3", endpoint_url=url)
            for bucket in buckets:
                client.create_bucket(Bucket=bucket)
            s3fs.S3FileSystem.clear_instance_cache()
            # Our own tries are what is tested: botocore's would come before them, with pauses of seconds.
            yield {"endpoint_url": url, "config_kwargs": {"retries": {"max_attempts": 0}}}, gate
        finally:
            server.terminate()
            server.join(10)
            s3fs.S3FileSystem.clear_instance_cache()
