"""Calls through Serve handles, and what their errors mean: is the replica gone, or did the work itself fail?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any, cast

import grpc
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from actors.waiting import unwrap_error
from roro_ray.engines.protocol import StepDelta, StepRequest, StepResult
from roro_ray.errors import EngineUnavailableError
from serve.breaker import SilentReplicaError

Handle = DeploymentHandle[Any]
# What Serve raises of a replica that died, is being stopped or cannot be reached; between deployments it speaks gRPC
# or actor calls, as RAY_SERVE_USE_GRPC_BY_DEFAULT says. Errors of our own code come as RayTaskError.
FAILURES = (RayError, RayServeException, grpc.RpcError, SilentReplicaError, asyncio.CancelledError)


def is_replica_failure(error: BaseException) -> bool:
    """Whether a call failed since its replica is gone, so that another one may do better; else the work itself failed.

    Raises:
        CancelledError: the caller itself is cancelled (a replica that stops cancels calls too).
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise error
        return True
    if isinstance(error, RayTaskError):
        cause = error.cause
        return isinstance(cause, (EngineUnavailableError, RayError, RayServeException, grpc.RpcError))
    return True


async def ask(handle: Handle, *arguments: Any) -> Any:
    """One call; a caller that leaves or runs out of time takes it back."""
    response = handle.remote(*arguments)
    try:
        with _named():
            return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Serve raises a bare RuntimeError where a replica's server stops just when a call comes in."""
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise SilentReplicaError(f"a replica did not take a call: {error}") from error


async def ask_plainly(handle: Handle, name: str) -> Any:
    """One call to a deployment that may fail.

    Raises:
        EngineUnavailableError: the replica is gone; ask again.
    """
    try:
        return await ask(handle)
    except FAILURES as error:
        if is_replica_failure(error):
            raise EngineUnavailableError(f"{name}: its replica is gone ({type(error).__name__})") from error
        raise unwrap_error(error) from error


async def read_parts(handle: Handle, request: StepRequest) -> AsyncGenerator[StepDelta | StepResult, None]:
    """The parts of a remote stream; closing it before the result cancels the remote generator."""
    response = cast("DeploymentResponseGenerator[Any]", handle.remote(request))
    done = False
    try:
        with _named():
            async for parts in response:
                for part in parts:
                    done = isinstance(part, StepResult)
                    yield part
    finally:
        if not done:
            response.cancel()
