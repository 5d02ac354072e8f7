"""Counts shipped shapes: `python -m roro_ray.estimate.count OWNER/NAME ..` writes facts.json beside config.json."""

from __future__ import annotations

import json
import sys

from roro_ray.data.files import write_whole
from roro_ray.engines.shapes import SHAPES_DIR, count_shape


def main(names: list[str]) -> None:
    """Count the models named, or all that are shipped."""
    shipped = sorted(str(file.parent.relative_to(SHAPES_DIR)) for file in SHAPES_DIR.glob("*/*/config.json"))
    for name in names or shipped:
        with write_whole(SHAPES_DIR / name / "facts.json") as temporary:
            temporary.write_text(json.dumps(count_shape(SHAPES_DIR / name), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
