"""Settings of the cluster: what to ask of Ray, where a run is stored, and what happens when something fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RayConfig:
    """What to ask of Ray."""

    address: str = "auto"  # auto: join a running cluster named by RAY_ADDRESS, else start one; local: always start
    workers: int = 2  # rollout workers
    worker_cpus: float = 0.5  # logical CPUs of each rollout worker
    worker_gpus: float = 0.0  # GPUs of each rollout worker, where its models run on one
    learner_cpus: float = 0.5
    learner_gpus: float = 0.0  # GPUs of each Train worker
    reward_cpus: float = 0.5
    reward_gpus: float = 0.0
    engine_cpus: float = 0.5  # of each model's actor with pool.placement=actors
    engine_gpus: float = 0.0
    autoscaler: bool = False  # the cluster can grow: wait for resources that it lacks instead of failing
    object_store_mb: int = 256  # of a cluster that we start
    gpu_memory_gb: float = 80.0  # GiB of each GPU, for what --dry-run works out; a running engine asks the GPU itself
    timeout_s: float = 120.0  # deadline of ready() calls
    concurrency: int = 256  # concurrent episodes per worker
    # By role: rollout, learner, reward, engine, or a model's name (in place of engine).
    resources: dict[str, dict[str, float]] = field(default_factory=dict)  # custom resources of each actor, by role
    labels: dict[str, dict[str, str]] = field(default_factory=dict)  # node labels that an actor needs, by role
    replicas: dict[str, list[int]] = field(default_factory=dict)  # model: [least, most] actors (pool.placement=actors)
    replica_target: float = 32.0  # requests in hand that a replica should have: above it another one is started
    replica_idle_s: float = 30.0  # a replica that is needed no more is released after this long
    step_timeout_s: float = 0.0  # a replica that does not answer so long is probed; 0: a quarter of episode.timeout_s
    grow_timeout_s: float = 0.0  # longest wait for resources that an autoscaler may still bring; 0: timeout_s


@dataclass
class StorageConfig:
    """Where a run directory that is a URI (s3://, gs://, ..) is kept while it is worked on."""

    cache_dir: str = ""  # local copies of remote runs; empty: roro_ray in the user's cache directory
    sync_s: float = 15.0  # metrics are uploaded at least this often while a job runs
    options: dict[str, Any] = field(default_factory=dict)  # handed to the fsspec file system (no secrets: it is saved)


@dataclass
class FaultsConfig:
    """What to do when rollouts, scores or workers fail."""

    rollouts: str = "retry"  # fail_fast | retry | minimum_group: what a failed rollout costs (`routing.failures`)
    attempts: int = 2  # times that a failed rollout is tried in all (retry, minimum_group)
    pause_s: float = 0.5  # before it is tried again; doubles with every attempt
    max_failed_share: float = 0.05  # of a shard's, an iteration's or a sweep's rollouts may fail for good (retry)
    min_group: int = 2  # rollouts that a group must keep, and rewards it must have, to be used (minimum_group)
    max_score_errors: float = 0.5  # share of an iteration's scores that may fail
    worker_attempts: int = 4  # workers that may die over the same episodes before these are given up
