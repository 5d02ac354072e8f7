"""Print what pyproject.toml asks for, so that an image installs it before the code is there.

python docker/requirements.py [EXTRA ..] [--extras-only]: the dependencies, and those of the extras.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def find_requirements(project: dict[str, object], extras: list[str], extras_only: bool) -> list[str]:
    """Requirements in the order of the file.

    Raises:
        KeyError: an extra that the project does not have.
    """
    found = [] if extras_only else list(project["dependencies"])  # type: ignore[call-overload]
    for extra in extras:
        found += project["optional-dependencies"][extra]  # type: ignore[index]
    return found


def main(arguments: list[str]) -> None:
    with Path("pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = [argument for argument in arguments if argument != "--extras-only"]
    print("\n".join(find_requirements(project, extras, "--extras-only" in arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
