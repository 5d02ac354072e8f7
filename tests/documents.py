"""The code in the documents: shell commands one by one, and blocks of other languages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def find_blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order; a path relative to the project."""
    fence = re.compile(rf"^ *```{language}\n(.*?)^ *```", flags=re.MULTILINE | re.DOTALL)
    return fence.findall((ROOT / document).read_text("utf-8"))


def find_commands(document: str) -> list[str]:
    """Every command of the shell blocks; one that spans lines (inside quotes) in one piece."""
    commands: list[str] = []
    for block in find_blocks(document, "bash"):
        begun = ""
        for line in block.splitlines():
            begun = f"{begun}\n{line}" if begun else line
            try:
                words = shlex.split(begun, comments=True)
            except ValueError:  # a quote is still open
                continue
            if words:
                commands.append(begun.strip())
            begun = ""
        assert not begun, f"{document}: a quote is never closed: {begun!r}"
    return commands
