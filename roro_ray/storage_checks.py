"""Refuses places and options of storage that cannot work, and secrets where they would be saved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from roro_ray.config import Config
from roro_ray.errors import ConfigError

_SECRET = re.compile(r"key|secret|token|passw|credential|signature|sas|connection_?string", re.IGNORECASE)
# Named like secrets, and none: the name of a key that the store itself keeps, and ways to find credentials.
_HARMLESS = frozenset({"ssekmskeyid", "kms_key_name", "default_kms_key_name", "encryption_key_name"})
_WAYS = frozenset({"anon", "cloud", "google_default", "cache"})
_USER_AND_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]*@")
_READ_ONLY = ("http", "https", "github", "git", "hf", "zip", "tar", "data", "reference")


def check_storage(settings: Config) -> None:
    """Check `run_dir` and `storage`.

    Raises:
        ConfigError: names the key and what to do, but never the value of what looks like a secret.
    """
    if settings.storage.sync_s <= 0:
        raise ConfigError(f"storage.sync_s: got {settings.storage.sync_s}, expected more than 0 seconds.")
    protocol, has_protocol, rest = settings.run_dir.partition("://")
    if has_protocol and (protocol in _READ_ONLY or not rest.strip("/")):
        raise ConfigError(
            f"run_dir: got {settings.run_dir!r}, expected a path or the URI of a folder that can be written, such as "
            "s3://bucket/run or gs://bucket/run."
        )
    if _USER_AND_PASSWORD.search(settings.run_dir):
        raise ConfigError("run_dir contains a password, and is saved in config.yaml: give it through the environment.")
    check_options(settings.storage.options)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse secrets among the options of a file system, which are saved and shown.

    Raises:
        ConfigError: names the key, but never its value.
    """
    for key, value in _leaves(options):
        name = key.rpartition(".")[2].lower()
        if (_SECRET.search(name) and name not in _HARMLESS and str(value) not in _WAYS) or (
            isinstance(value, str) and _USER_AND_PASSWORD.search(value)
        ):
            raise ConfigError(
                f"storage.options.{key} looks like a secret, and options are saved in config.yaml. Leave it out and "
                "give it through the environment of the driver and of the Ray workers (AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, ..) or the machines' role."
            )


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
