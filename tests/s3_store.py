"""An S3 server of the test's own, in this process, and what a client must know to reach it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """Stands before the server: counts requests, and answers some with an error.

    `fails` is asked with the method, the path and the number of writes so far; True answers 503.
    """

    fails: Callable[[str, str, int], bool] = lambda method, path, writes: False
    writes: int = 0
    refused: int = 0
    log: list[tuple[str, str]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, application: Any) -> Callable[..., Any]:
        def answer(environ: dict[str, Any], start: Any) -> Any:
            method = environ["REQUEST_METHOD"]
            with self._lock:
                self.writes += method in WRITES
                refuse = self.fails(method, environ["PATH_INFO"], self.writes)
                self.refused += refuse
                self.log.append((method, environ["PATH_INFO"]))
            if refuse:
                start("503 Service Unavailable", [("Content-Type", "application/xml")])
                return [b"<Error><Code>ServiceUnavailable</Code><Message>busy</Message></Error>"]
            return application(environ, start)

        return answer


@contextmanager
def running_s3(*buckets: str) -> Iterator[tuple[dict[str, Any], Gate]]:
    """A server with some buckets, and the environment's credentials for it; gives `storage.options` and the gate."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with mock.patch.dict(os.environ, CREDENTIALS):
        server.start()
        try:
            host, port = server.get_host_and_port()
            gate = Gate()
            server._server.app = gate(server._server.app)
            url = f"http://{host}:{port}"
            client = boto3.client("s3", endpoint_url=url)
            for bucket in buckets:
                client.create_bucket(Bucket=bucket)
            s3fs.S3FileSystem.clear_instance_cache()
            # Our own tries are what is tested: botocore's would come before them, with pauses of seconds.
            yield {"endpoint_url": url, "config_kwargs": {"retries": {"max_attempts": 0}}}, gate
        finally:
            server.stop()
            s3fs.S3FileSystem.clear_instance_cache()
