"""Between stages 2 and 3, for a reward of LoRA adapters: a strong LLM writes rubrics from preference pairs.

What lets it recover its pair is kept, and Rubricor and Judge learn from that by SFT before they are trained in turn.
Interrupted, it goes on where it stopped: nothing that was written is paid for twice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs._cli import make_parser, run_job
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir

KEYS = ("warm", "lora", "reward", "ray", "wandb")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    return run_job(make_parser("warm_start", __doc__ or "", KEYS), _main, argv)


def _main(config: Config, run: RunDir, arguments: argparse.Namespace) -> None:
    from jobs.reward_stages import warm_stage

    warm_stage(config, run)


if __name__ == "__main__":
    sys.exit(main())
