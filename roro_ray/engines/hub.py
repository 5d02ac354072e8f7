"""Where a model lies: shipped with the package, in a directory, or on the Hugging Face Hub.

Of the hub's files only configuration, tokenizer and safetensors are fetched. What cannot be fetched is told with its
cause and the command that mends it: machines with GPUs are often not on the internet.
"""

from __future__ import annotations

import re
from pathlib import Path

from roro_ray.errors import ConfigError, EngineError, did_you_mean
from roro_ray.world.models import WEIGHTS_DIR

WORLD_PREFIX = "world:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_TOKENIZER = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHTS = [*_TOKENIZER, "*.safetensors"]
_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights


def resolve_model_path(path: str, revision: str = "", download: bool = True) -> Path:
    """The directory of a model: `world:NAME` is a shipped one, then a directory, then `OWNER/NAME` of the hub.

    `revision` is a branch, tag or commit of the hub (empty: its main branch); `download=False` looks only at what is
    on this machine already. A directory is given back as it is, there or not.

    Raises:
        ConfigError: no shipped model has that name; a revision of what is not on the hub.
        EngineError: the model of the hub does not exist, may not be read, or cannot be fetched.
    """
    if path.startswith(WORLD_PREFIX):
        return _find_shipped(path)
    directory = Path(path).expanduser()
    if is_hub_name(path):
        return _fetch(path, revision, _WEIGHTS, download)
    if revision:
        raise ConfigError(
            f"revision={revision!r} of {path!r}: only a model of the hub (OWNER/NAME) has revisions; leave it empty "
            "for a directory"
        )
    return directory


def resolve_tokenizer_path(path: str, revision: str = "") -> Path:
    """Like `resolve_model_path`, but of the hub's files without the weights.

    Raises:
        ConfigError: as there.
        EngineError: as there.
    """
    return _fetch(path, revision, _TOKENIZER, True) if is_hub_name(path) else resolve_model_path(path, revision)


def is_hub_name(path: str) -> bool:
    """Whether a path can only mean a model of the hub: `OWNER/NAME` where no such directory is."""
    return _HUB_NAME.fullmatch(path) is not None and not Path(path).exists()


def _find_shipped(path: str) -> Path:
    name = path.removeprefix(WORLD_PREFIX)
    names = sorted(entry.parent.name for entry in WEIGHTS_DIR.glob("*/config.json"))
    if name not in names:
        raise ConfigError(
            f"no shipped model {path!r}: expected one of {', '.join(WORLD_PREFIX + n for n in names) or '(none)'}"
            f"{did_you_mean(path, [WORLD_PREFIX + n for n in names])}, or a directory in Hugging Face format; "
            "`python -m roro_ray.world.train` makes the shipped ones again"
        )
    return WEIGHTS_DIR / name


def _fetch(name: str, revision: str, patterns: list[str], download: bool) -> Path:
    # Imported here: most models are directories, and the library takes its time.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{name}@{revision}" if revision else name
    try:
        found = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=_IGNORED,
            local_files_only=not download,
        )
        return Path(found)
    except GatedRepoError as error:  # a kind of the next one
        raise EngineError(
            f"model {at} of the hub is gated: accept its terms at https://huggingface.co/{name}, then `hf auth login` "
            "(or HF_TOKEN) on this machine"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        lacks = "no such revision" if isinstance(error, RevisionNotFoundError) else "no such model, or a private one"
        raise EngineError(
            f"{at}: there is no directory of that name here, and the hub has {lacks}: check the name, or log in with "
            "`hf auth login` for a private model"
        ) from error
    except LocalEntryNotFoundError as error:
        raise EngineError(f"{at}: {_explain_absence(download)}; {_tell_remedy(name, revision)}") from error
    except Exception as error:  # border: whatever network and disk do
        cause = str(error).splitlines()[0] if str(error) else "no message"
        raise EngineError(
            f"{at} cannot be fetched ({type(error).__name__}: {cause}); {_tell_remedy(name, revision)}"
        ) from error


def _explain_absence(download: bool) -> str:
    from huggingface_hub import constants

    here = "there is no directory of that name here, the hub's cache on this machine does not hold it"
    if constants.is_offline_mode():
        return f"{here}, and HF_HUB_OFFLINE is set, which forbids to fetch it: unset it"
    return f"{here}, and the hub cannot be reached" if download else here


def _tell_remedy(name: str, revision: str) -> str:
    at = f"{name} --revision {revision}" if revision else name
    return (
        f"where the hub can be reached, `hf download {at}` fills the cache (HF_HOME), and with `--local-dir DIR` a "
        "directory, which may be copied here and named as the model's path"
    )
