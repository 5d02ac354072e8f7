"""What tokens and problems cost by each model of a pool: parameters, FLOPs, memory a token, prices. Loads nothing."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from jobs._cli import make_parser, resolve_config
from roro_ray.errors import RoroError
from roro_ray.estimate.costs import make_cost_table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; 2 where the settings cannot be read."""
    parser = make_parser("costs", __doc__ or "", ("pool", "estimate"))
    arguments: Namespace = parser.parse_intermixed_args(argv)
    try:
        config = resolve_config(arguments.overrides, arguments.config)
    except RoroError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(make_cost_table(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
