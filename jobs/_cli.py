"""The shell that every job shares: arguments, settings, run directory, and how a failure is told.

Nothing heavy is imported here, so `--help` and `--dry-run` answer at once: a job imports torch and Ray inside its main
function. An error of this project ends in one message on stderr and exit code 2; the first failure is also written to
metrics.jsonl. A job that is interrupted goes on where it stopped when the same command runs again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from jobs._wandb import WandbMirror
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir, open_run, saved_config
from roro_ray.errors import RoroError
from roro_ray.plan import describe_plan
from roro_ray.settings import describe_settings, load_config

USER_ERROR = 2
INTERRUPTED = 130
# One thread per process: processes share the cores, and OpenMP's busy waiting makes them 10 to 100 times slower.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "WANDB_SILENT": "true",
}

JobMain = Callable[[Config, RunDir, argparse.Namespace], None]


def make_parser(verb: str, description: str, keys: Sequence[str]) -> argparse.ArgumentParser:
    """The arguments that all jobs take; `keys` are the sections of the settings that matter to this one."""
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{verb}",
        description=description,
        epilog="settings (key=default):\n" + describe_settings(keys),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as seed=1")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; overrides come on top")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    return parser


def run_job(
    parser: argparse.ArgumentParser,
    main: JobMain,
    argv: Sequence[str] | None = None,
    defaults: Callable[[argparse.Namespace], Sequence[str]] | None = None,
) -> int:
    """Read the arguments, open the run and do the job; returns the exit code.

    Args:
        defaults: overrides that the job itself sets beneath the user's, from the parsed arguments.
    """
    arguments = parser.parse_intermixed_args(argv)
    arguments.command = shlex.join(parser.prog.split() + list(sys.argv[1:] if argv is None else argv))
    warnings.showwarning = _show_warning
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    run: RunDir | None = None
    try:
        own = tuple(defaults(arguments)) if defaults else ()
        config = resolve_config([*own, *arguments.overrides], arguments.config)
        if arguments.dry_run:
            print(describe_plan(config))
            return 0
        run = open_run(config)
        with WandbMirror(config, run):
            main(config, run, arguments)
        return 0
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _tell_failure(error, run, parser.prog)


def resolve_config(overrides: Sequence[str], file: str | Path | None) -> Config:
    """The settings; those saved in the run directory, where it holds a run, are the base in place of the defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = load_config(overrides, file)
    return load_config(overrides, file, base=saved_config(first.run_dir))


@contextmanager
def run_stage(run: RunDir, stage: str, title: str) -> Iterator[dict[str, object]]:
    """Announce a stage, time it, and record it as done; the block may fill the dict with facts to record."""
    say(f"{title} ...")
    run.reopen_after(stage)
    began = time.monotonic()
    facts: dict[str, object] = {}
    yield facts
    seconds = round(time.monotonic() - began, 1)
    run.mark_done(stage, seconds=seconds, **facts)
    run.log({"event": "stage", "stage": stage, "seconds": seconds, **facts})
    shown = ", ".join(f"{key} {value}" for key, value in facts.items())
    say(f"{title}: done in {seconds:g} s" + (f" ({shown})" if shown else ""))


def say(text: str) -> None:
    """A line for the person at the terminal; stdout is kept for results."""
    # Above any bar, and whole: stages that run side by side speak at once.
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def _tell_failure(error: Exception, run: RunDir | None, command: str) -> int:
    # Ray hands a remote error on in a wrapper whose text is a traceback; the cause says what matters.
    cause = getattr(error, "cause", None)
    shown = cause if isinstance(cause, RoroError) else error
    expected = isinstance(shown, RoroError)
    if run is not None and run.path.is_dir():
        run.log({"event": "failure", "command": command, "error": type(shown).__name__, "message": str(shown)})
    if not expected:
        traceback.print_exception(error)
        print(f"\n{command} failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{command}: {shown}", file=sys.stderr)
    return USER_ERROR


def _show_warning(message: Warning | str, category: type[Warning], *_rest: object, **_more: object) -> None:
    if issubclass(category, UserWarning) and not issubclass(category, ImportWarning):
        print(f"warning: {message}", file=sys.stderr)
