"""The server's settings: one typed tree, from `args` of serve/config.yaml and `key=value` on the command line.

What it serves (models, limits of an answer, router) comes from a run directory, so that the server decodes exactly as
the router was trained; here stands only how it is served.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from roro_ray.cluster_config import StorageConfig
from roro_ray.config import EpisodeConfig, PoolConfig, RouterConfig
from roro_ray.data.mirror import Mirror, fetch, name_place
from roro_ray.data.run_dir import saved_config
from roro_ray.data.stores import is_remote
from roro_ray.errors import ConfigError, did_you_mean
from roro_ray.storage_checks import check_options


@dataclass
class ReplicaConfig:
    """Replicas of one deployment; Serve scales them by the requests that each has in hand."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing: float = 32.0  # requests in hand that a replica should have
    max_ongoing: int = 1024  # requests in hand that a replica takes at most
    upscale_s: float = 10.0  # more in hand than that for so long brings a replica; Serve's own 30 s is half a deadline
    downscale_s: float = 600.0  # less for so long releases one, and its node where that is then empty
    per_node: int = 0  # most replicas on one node, so that a lost node does not take all of them; 0: any number
    cpus: float = 0.5
    gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)  # custom resources that each replica asks for
    labels: dict[str, str] = field(default_factory=dict)  # node labels that each replica needs


@dataclass
class AnswerConfig:
    """What one request may ask for, and how long it may take."""

    timeout_s: float = 60.0  # deadline of a request, waiting included
    max_concurrent: int = 512  # answers under way at once, per ingress replica
    max_queue: int = 128  # requests that wait for one of these; more get 429
    max_body_bytes: int = 1 << 20
    max_messages: int = 256
    max_text_chars: int = 200_000  # of all messages together
    max_completion_tokens: int = 0  # 0: episode.max_tokens of the run
    max_choices: int = 8
    temperature: float = -1.0  # default of a request; -1: episode.temperature of the run
    chat_template: str = "plain"  # plain, a file or an inline Jinja template that turns messages into text


@dataclass
class RescueConfig:
    """What happens when a model's replica dies or does not answer."""

    retries: int = 2  # other replicas tried for a step
    step_timeout_s: float = 30.0  # a step that takes longer is asked of another replica; above the longest real step
    failover_s: float = 3.0  # after a death: how long another replica may take before the other model takes over
    probe_s: float = 1.0  # how often a model that is down is asked whether it is back


@dataclass
class SecurityConfig:
    """Who may ask, and from where."""

    key_file: str = ""  # lines of `sha256-hex name`; empty and no key_hashes: no key is asked for
    key_hashes: list[str] = field(default_factory=list)
    cors_origins: list[str] = field(default_factory=list)  # origins of other sites' pages that may call; none
    playground: bool = True  # the page at /


@dataclass
class RecordingConfig:
    """Served trajectories as Parquet, for the router to learn from; off unless a directory is given."""

    directory: str = ""
    redact: bool = False  # keep models, tokens and signals, but no text
    flush_every: int = 200  # trajectories a shard
    flush_s: float = 30.0
    max_mb: int = 1024  # recording stops there


@dataclass
class ServerConfig:
    """Everything that the server needs beside the run that it serves."""

    run_dir: str = ""  # the run whose pool, episode limits and router are served: a path or a URI
    router: str = "roro"  # one of the run's routers, or a directory (or URI) that save_router wrote
    cost_weight: float = -1.0  # default of a request; -1: the middle of the range that the router was trained on
    host: str = "127.0.0.1"  # of `python -m serve`; a YAML deployment sets http_options
    port: int = 8000
    haproxy: bool = False  # HAProxy in front: more requests a second, and two more ports on all interfaces
    memo_entries: int = 0  # greedy steps remembered per model; 0: every answer is computed
    access_log: str = ""  # a file; empty: the replica's log
    pool: PoolConfig | None = None  # in place of the run's
    episode: EpisodeConfig | None = None
    ingress: ReplicaConfig = field(default_factory=lambda: ReplicaConfig(max_ongoing=4096))
    models: ReplicaConfig = field(default_factory=ReplicaConfig)
    per_model: dict[str, ReplicaConfig] = field(default_factory=dict)  # by the model's name, in place of `models`
    routers: ReplicaConfig = field(default_factory=ReplicaConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    rescue: RescueConfig = field(default_factory=RescueConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    recording: RecordingConfig = field(default_factory=RecordingConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)  # how each replica reads a run behind a URI


@dataclass(frozen=True, slots=True)
class Served:
    """What a server is made of once its run has been read."""

    config: ServerConfig
    pool: PoolConfig
    episode: EpisodeConfig
    router: str
    examples: tuple[str, ...]
    router_cache_mb: int = RouterConfig.cache_mb  # MiB of states that the router keeps of the texts it has read

    @property
    def router_device(self) -> str:
        """Where the router's replicas compute: on a GPU where they are given one."""
        return "cuda" if self.config.routers.gpus else "cpu"

    def replicas(self, model: str) -> ReplicaConfig:
        """The replicas of one model."""
        return self.config.per_model.get(model, self.config.models)


def load_server_config(args: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> ServerConfig:
    """The settings from a mapping (`args` of the YAML) and `key=value` overrides.

    Raises:
        ConfigError: an unknown key (with a suggestion), or a value of the wrong type or range.
    """
    tree = OmegaConf.structured(ServerConfig())
    try:
        given = OmegaConf.merge(OmegaConf.create(dict(args or {})), OmegaConf.from_dotlist(list(overrides)))
        for key in _paths(cast("dict[str, Any]", OmegaConf.to_container(given)), ServerConfig):
            _check_key(key)
        config = cast(ServerConfig, OmegaConf.to_object(OmegaConf.merge(tree, given)))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the server's settings: {reason}. serve/config.py says what each takes") from error
    _check(config)
    return config


def read_served(config: ServerConfig) -> Served:
    """Find the run and its router.

    Raises:
        ConfigError: no run, or none with a trained router.
    """
    saved = saved_config(config.run_dir, config.storage) if config.run_dir else None
    if saved is None and config.pool is None:
        raise ConfigError(
            f"run_dir={config.run_dir!r} holds no run: expected a directory that `make demo` or a job wrote "
            "(run_dir=runs/NAME), or a `pool` in the server's settings"
        )
    router = _find_router(config)
    pool = config.pool or cast("Any", saved).pool
    episode = config.episode or cast("Any", saved).episode
    pool = dataclasses.replace(pool, memo_entries=config.memo_entries)
    unknown = sorted(set(config.per_model) - {model.name for model in pool.models})
    if unknown:
        names = [model.name for model in pool.models]
        hint = did_you_mean(unknown[0], names)
        raise ConfigError(f"per_model.{unknown[0]}: no such model in the pool ({', '.join(names)}){hint}")
    cache_mb = saved.router.cache_mb if saved is not None else RouterConfig.cache_mb
    return Served(config, pool, episode, router, tuple(_find_examples(pool)), cache_mb)


def _find_router(config: ServerConfig) -> str:
    """Where the router lies, as replicas on every node find it: an absolute path, or a URI.

    Raises:
        ConfigError: there is none.
    """
    place = name_place(config.router)
    if not _holds_router(place, config.storage) and config.run_dir:
        place = Mirror(config.run_dir, config.storage).part(f"router/{config.router}").place
    if not _holds_router(place, config.storage):
        raise ConfigError(
            f"no trained router in {place}: router.json is missing. Run `make demo`, or "
            f"`python -m jobs.train_router run_dir={config.run_dir or 'runs/NAME'}`, or give router=DIRECTORY"
        )
    return place


def _holds_router(place: str, storage: StorageConfig) -> bool:
    return (fetch(place, storage, "router.json") / "router.json").is_file()


def find_newest_run(root: str | Path = "runs") -> str:
    """The directory of the run under `root` whose router was written last.

    Raises:
        ConfigError: there is none.
    """
    found = Path(root).glob("*/router/roro/router.json")
    whole = [path for path in found if (path.parents[2] / "config.yaml").is_file()]
    routers = sorted(whole, key=lambda path: path.stat().st_mtime)
    if not routers:
        raise ConfigError(f"no run with a trained router under {root}/: run `make demo` first, or give run_dir=..")
    return str(routers[-1].parents[2])


def _find_examples(pool: PoolConfig) -> Iterator[str]:
    """Queries for the playground, where the pool is of the embedded world."""
    if all(model.path.startswith("world:") for model in pool.models):
        from roro_ray.world.tasks import SUITES, make_queries

        for suite in SUITES:
            yield from (query.text for query in make_queries(suite, "test", 2, 0))


def _paths(node: Mapping[str, Any], owner: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        yield key
        inner = _SECTIONS.get(key)
        if inner is not None and isinstance(value, Mapping):
            yield from _paths(value, inner, f"{key}.")


_SECTIONS: dict[str, type] = {
    "ingress": ReplicaConfig,
    "models": ReplicaConfig,
    "routers": ReplicaConfig,
    "answer": AnswerConfig,
    "rescue": RescueConfig,
    "security": SecurityConfig,
    "recording": RecordingConfig,
    "storage": StorageConfig,
}


def _check_key(key: str) -> None:
    section, _, name = key.rpartition(".")
    owner = _SECTIONS[section] if section else ServerConfig
    known = [entry.name for entry in dataclasses.fields(owner)]
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConfigError(f"unknown setting {key!r} of the server{hint}: expected one of {', '.join(known)}")


def _check(config: ServerConfig) -> None:
    answer, rescue = config.answer, config.rescue
    least_one = {
        "answer.max_concurrent": answer.max_concurrent,
        "answer.max_body_bytes": answer.max_body_bytes,
        "answer.max_messages": answer.max_messages,
        "answer.max_text_chars": answer.max_text_chars,
        "answer.max_choices": answer.max_choices,
        "recording.flush_every": config.recording.flush_every,
    }
    positive = {
        "answer.timeout_s": answer.timeout_s,
        "rescue.step_timeout_s": rescue.step_timeout_s,
        "rescue.failover_s": rescue.failover_s,
        "rescue.probe_s": rescue.probe_s,
    }
    for key, value in least_one.items():
        if value < 1:
            raise ConfigError(f"{key} is {value}: expected at least 1")
    for key, seconds in positive.items():
        if not seconds > 0:
            raise ConfigError(f"{key} is {seconds}: expected more than 0 seconds")
    check_options(config.storage.options)
    if is_remote(config.recording.directory):
        raise ConfigError(
            f"recording.directory is {config.recording.directory!r}: expected a path. Replicas append to files there; "
            "copy finished shards to object storage afterwards"
        )
    if answer.max_queue < 0 or rescue.retries < 0:
        raise ConfigError("answer.max_queue and rescue.retries: expected 0 or more")
    if answer.max_choices > answer.max_concurrent:
        raise ConfigError(
            f"answer.max_choices ({answer.max_choices}) exceeds answer.max_concurrent ({answer.max_concurrent}): "
            "a request with so many choices could never start"
        )
    sections = [config.ingress, config.models, config.routers, *config.per_model.values()]
    for replicas in sections:
        if not 0 <= replicas.min_replicas <= replicas.max_replicas or replicas.max_replicas < 1:
            raise ConfigError(
                f"min_replicas={replicas.min_replicas}, max_replicas={replicas.max_replicas}: expected "
                "0 <= min_replicas <= max_replicas and max_replicas of at least 1"
            )
