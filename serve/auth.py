"""API keys: made here, kept only as SHA-256, compared in constant time.

A key is 256 random bits, so a plain hash cannot be guessed backwards and needs no salt or slow function; whoever reads
the key file or the configuration learns no key. `python -m serve.auth [name]` makes one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from roro_ray.errors import ConfigError
from serve.problems import unauthorised

ANONYMOUS = "anonymous"
_PREFIX = "roro-"
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[\w.@+-]{1,64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that opens the server: SHA-256 in hexadecimal, and whose it is, for the access log."""

    digest: str
    name: str


def make_key() -> tuple[str, str]:
    """A new key and its SHA-256 in hexadecimal."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, hash_key(key)


def hash_key(key: str) -> str:
    """SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def load_keys(path: str | Path) -> tuple[ApiKey, ...]:
    """Read a key file: `HASH [name]` on each line; `#` begins a comment.

    Raises:
        ConfigError: the file is missing, malformed or holds no key: that would leave the server open.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key file {path}: {type(error).__name__}; expected a text file") from error
    keys = parse_keys(text.splitlines(), str(path))
    if not keys:
        raise ConfigError(f"the key file {path} holds no key; add a line from `python -m serve.auth NAME`")
    return keys


def parse_keys(lines: Iterable[str], source: str = "the key list") -> tuple[ApiKey, ...]:
    """Keys from `HASH [name]` lines; a key without a name gets the first eight digits of its hash.

    Raises:
        ConfigError: a line is no hash, or two lines have the same hash or name. The line itself is not shown, since
            a key may have been put where its hash belongs.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"line {number} of {source}"
        digest, name = words[0].lower(), words[1] if len(words) > 1 else words[0][:8].lower()
        if not _HASH.fullmatch(digest):
            raise ConfigError(f"{where} must begin with the SHA-256 of a key (64 hexadecimal digits), not a key itself")
        if len(words) > 2 or not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: expected `HASH name`, the name one word of letters, digits and . @ + - _")
        if any(digest == key.digest or name == key.name for key in keys):
            raise ConfigError(f"{where} repeats a hash or a name; give each key once, under a name of its own")
        keys.append(ApiKey(digest, name))
    return tuple(keys)


def authenticate(header: str | None, keys: Sequence[ApiKey]) -> str:
    """Whose key an Authorization header holds; `anonymous` where no keys are set up.

    Every key is compared, each in constant time, so that the time taken tells nothing of how near a guess was.

    Raises:
        ApiError: 401 for a missing or wrong key.
    """
    if not keys:
        return ANONYMOUS
    scheme, _, key = (header or "").strip().partition(" ")
    digest = hash_key(key.strip())
    name = None
    for known in keys:
        if hmac.compare_digest(digest, known.digest):
            name = known.name
    if name is None or scheme.lower() != "bearer":
        raise unauthorised()
    return name


def main(arguments: Sequence[str]) -> None:
    """Print a new key, for the client, and the line for the server."""
    if len(arguments) > 1 or (arguments and not _NAME.fullmatch(arguments[0])):
        raise SystemExit("usage: python -m serve.auth [name]   (one word of letters, digits and . @ + - _)")
    key, digest = make_key()
    print(f"key, shown only now, for the client:  {key}")
    print(f"line for the key file:                {' '.join([digest, *arguments])}")


if __name__ == "__main__":
    main(sys.argv[1:])
