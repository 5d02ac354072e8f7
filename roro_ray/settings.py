"""Reads the settings: defaults, then a YAML file, then `key=value` overrides, into one typed tree.

OmegaConf converts and merges; what is added here is that a wrong key or value is refused at once with a message that
names it and suggests the right one. Imports in a tenth of a second, since `--help` and `--dry-run` need nothing more.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from roro_ray import config as sections
from roro_ray.config import Config, ModelConfig
from roro_ray.config_checks import check_config
from roro_ray.config_warnings import warn_settings
from roro_ray.data.files import write_whole
from roro_ray.errors import ConfigError, did_you_mean

_INDEX = re.compile(r"\[(\d+)\]")


def load_config(argv: Sequence[str] = (), file: str | Path | None = None, base: Config | None = None) -> Config:
    """The settings of a run.

    Args:
        argv: overrides such as `router.beta=0`; `pool.models[0].path=world:small` reaches into a list.
        file: YAML with any part of the tree.
        base: settings to start from (a run's saved ones) in place of the defaults.

    Raises:
        ConfigError: an unknown key (with a suggestion), a value of the wrong type or out of range, two settings that
            contradict each other, or a file that cannot be read.
    """
    tree = OmegaConf.structured(base if base is not None else Config())
    explicit: set[str] = set()
    if file is not None:
        explicit |= _merge_file(tree, Path(file))
    for item in argv:
        explicit.add(_apply_override(tree, item))
    settings = _to_config(tree)
    check_config(settings)
    warn_settings(settings, explicit)
    return settings


def save_config(settings: Config, path: str | Path) -> None:
    """Write the resolved settings as YAML, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(settings), resolve=True))


def load_saved_config(path: str | Path) -> Config:
    """The settings that `save_config` wrote.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds keys that this version does not know.
    """
    with warnings.catch_warnings():
        # Every key stands in a saved file; only what the user gave is worth a warning.
        warnings.simplefilter("ignore")
        return load_config(file=path)


def flatten_config(settings: Config) -> dict[str, Any]:
    """Every setting by its dotted key; lists and mappings stay whole."""
    return dict(_leaves(settings))


def changed_keys(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys in which two runs differ, each with its old and its new value."""
    before, after = flatten_config(old), flatten_config(new)
    return {key: (before[key], after[key]) for key in after if before[key] != after[key]}


def describe_settings(names: Iterable[str]) -> str:
    """The settings of some sections (`router`, ..) with default and meaning, one a line, for `--help`."""
    default = Config()
    lines = []
    for name in names:
        docs = _field_docs(type(getattr(default, name)))
        for key, value in _leaves(getattr(default, name), f"{name}."):
            shown = f"[{len(value)} entries]" if isinstance(value, list | dict) and len(value) > 3 else _show(value)
            lines.append(f"  {key}={shown}".ljust(46) + docs.get(key.rpartition(".")[2], ""))
    return "\n".join(lines)


def _merge_file(tree: DictConfig, path: Path) -> set[str]:
    if not path.is_file():
        raise ConfigError(f"Settings file not found: {path}. Give --config an existing YAML file, or leave it out.")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}. Mend the line that it names.") from error
    except OSError as error:  # also what OmegaConf says of a file that holds one number or word
        raise ConfigError(f"{path} cannot be read: {error}. Expected sections such as `router:` with keys.") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, expected sections such as `router:` with keys.")
    content = cast("dict[str, Any]", OmegaConf.to_container(loaded))
    explicit = set()
    for key, value in _file_leaves(content, source=str(path)):
        _set_value(tree, key, value, str(path))
        explicit.add(key)
    return explicit


def _file_leaves(node: Mapping[str, Any], source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    known = _known_keys()
    for name, value in node.items():
        key = f"{prefix}{name}"
        is_section = any(other.startswith(f"{key}.") for other in known)
        if is_section and isinstance(value, Mapping):
            yield from _file_leaves(value, source, f"{key}.")
        elif key in known:
            yield key, value
        elif is_section:
            raise ConfigError(f"{source}: {key} is a section, got {value!r}. Give the keys below it.")
        else:
            raise ConfigError(_unknown(key, source))


def _apply_override(tree: DictConfig, item: str) -> str:
    key, equals, raw = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"Got {item!r}, expected key=value such as router.beta=0{did_you_mean(item, _known_keys())}.")
    plain = _INDEX.sub("", key).replace("pool.models.", "pool.models/")
    name, _, inside = plain.partition("/")
    models = {field.name for field in dataclasses.fields(ModelConfig)}
    if name not in _known_keys():
        if any(other.startswith(f"{key}.") for other in _known_keys()):
            raise ConfigError(f"{key} is a section, expected one of its keys, such as {_keys_below(key)[0]}=...")
        raise ConfigError(_unknown(key, "the command line"))
    if inside and inside not in models:
        raise ConfigError(f"Unknown key {key} of a model{did_you_mean(inside, models)}. A model has: {sorted(models)}.")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key}: {raw!r} is not a YAML value ({error}). Quote it if it has special signs.") from error
    _set_value(tree, key, "" if raw == "" else cast("dict[str, Any]", parsed)["value"], "the command line")
    return name


def _set_value(tree: DictConfig, key: str, value: Any, source: str) -> None:
    if isinstance(value, ListConfig | DictConfig):
        value = OmegaConf.to_container(value)
    index = _INDEX.search(key)
    if index and int(index[1]) >= len(OmegaConf.select(tree, key[: index.start()]) or ()):
        raise ConfigError(f"{key} ({source}): there is no entry {index[1]}. Give the whole list instead.")
    if key == "pool.models" and isinstance(value, list):
        value = [_merge_model(entry, source) for entry in value]
    try:
        OmegaConf.update(tree, key, value, merge=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key} ({source}): got {value!r}, expected {_expected(key)}.") from error


def _merge_model(entry: Any, source: str) -> ModelConfig:
    allowed = {field.name for field in dataclasses.fields(ModelConfig)}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"pool.models ({source}): got {entry!r}, expected a mapping with {sorted(allowed)}.")
    for name in entry:
        if name not in allowed:
            raise ConfigError(f"pool.models ({source}): unknown key {name!r}{did_you_mean(name, allowed)}.")
    missing = {"name", "path"} - set(entry)
    if missing:
        raise ConfigError(f"pool.models ({source}): a model lacks {sorted(missing)}; got {dict(entry)!r}.")
    return ModelConfig(**{str(name): value for name, value in entry.items()})


def _to_config(tree: DictConfig) -> Config:
    try:
        return cast(Config, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        raise ConfigError(f"The settings do not resolve: {error}. Check references such as ${{seed}}.") from error


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


@functools.cache
def _known_keys() -> dict[str, Any]:
    return flatten_config(Config())


def _keys_below(section: str) -> list[str]:
    return [key for key in _known_keys() if key.startswith(f"{section}.")]


def _unknown(key: str, source: str) -> str:
    last = key.rpartition(".")[2]
    same_name = [other for other in _known_keys() if other.rpartition(".")[2] == last]
    hint = f" (did you mean {same_name[0]!r}?)" if same_name else did_you_mean(key, _known_keys())
    return f"Unknown key {key!r} in {source}{hint}. `--help` lists the keys."


def _expected(key: str) -> str:
    section, _, name = _INDEX.sub("", key).rpartition(".")
    owner: Any = Config()
    for part in section.split(".") if section else ():
        owner = ModelConfig() if part == "models" else getattr(owner, part)
    declared = {field.name: str(field.type) for field in dataclasses.fields(owner)}
    return declared.get(name, "another value")


def _field_docs(section: type) -> dict[str, str]:
    source = inspect.getsource(getattr(sections, section.__name__))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, flags=re.MULTILINE))


def _show(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
