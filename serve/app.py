"""The Serve application: `serve run serve/config.yaml`, `serve deploy serve/config.yaml`, or `python -m serve`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from serve.config import ReplicaConfig, Served, load_server_config, read_served
from serve.deployments import IngressReplica, ModelReplica, RouterReplica

# By the session id of a call: a trajectory's steps meet the replica that has its prefix in the cache.
AFFINITY = RequestRouterConfig(
    request_router_class="serve.affinity:SessionRouter"  # type: ignore[arg-type]
)
# Trajectories under way when a replica is told to go have so long to end.
_DRAIN_S = 60.0


def build(args: Mapping[str, Any]) -> Application:
    """The application that `args` describe: see `serve.config.ServerConfig` for the keys.

    Raises:
        ConfigError: a wrong setting, or a run that has no trained router.
    """
    return make_application(read_served(load_server_config(args)))


def make_application(served: Served) -> Application:
    """The deployments and how they are joined."""
    models = {
        model.name: serve.deployment(
            name=f"model-{model.name}", request_router_config=AFFINITY, **_options(served.replicas(model.name))
        )(ModelReplica).bind(model, served.pool)
        for model in served.pool.models
    }
    router = serve.deployment(
        name="router",
        request_router_config=AFFINITY,
        user_config={"routers": [served.router]},
        **_options(served.config.routers),
    )(RouterReplica).bind(
        served.router, served.pool, served.router_device, served.router_cache_mb, served.config.storage
    )
    ingress = serve.deployment(name="ingress", **_options(served.config.ingress))(serve.ingress()(IngressReplica))
    return ingress.bind(served, models, router)


def _options(replicas: ReplicaConfig) -> dict[str, Any]:
    actor: dict[str, Any] = {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus}
    if replicas.resources:
        actor["resources"] = dict(replicas.resources)
    if replicas.labels:
        actor["label_selector"] = dict(replicas.labels)
    options: dict[str, Any] = {
        "max_ongoing_requests": replicas.max_ongoing,
        "max_queued_requests": -1,  # the ingress refuses what is too much, with an error that clients understand
        "ray_actor_options": actor,
        "graceful_shutdown_timeout_s": _DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
    }
    if replicas.min_replicas == replicas.max_replicas:
        options["num_replicas"] = replicas.max_replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": replicas.target_ongoing,
            "upscale_delay_s": replicas.upscale_s,
            "downscale_delay_s": replicas.downscale_s,
        }
    if replicas.per_node:
        options["max_replicas_per_node"] = replicas.per_node
    return options
