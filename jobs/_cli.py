"""The shell that every job shares: arguments, settings, run directory, and how a failure is told.

Nothing heavy is imported here, so `--help` and `--dry-run` answer at once: a job imports torch and Ray inside its main
function. An error of this project ends in one message on stderr and exit code 2, any other in a traceback and 1; Ctrl-C
gives 130 and SIGTERM 143. Whatever ends a job is also the last line of metrics.jsonl. A job that is interrupted goes on
where it stopped when the same command runs again.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from jobs._stopping import StopSignal
from jobs._terminal import say, take_over_warnings
from jobs._wandb import WandbMirror
from roro_ray.config import Config
from roro_ray.data.run_dir import RunDir, open_run, saved_config
from roro_ray.data.stores import check_shared, is_remote, local_path
from roro_ray.errors import ConfigError, RoroError
from roro_ray.plan import describe_plan
from roro_ray.settings import describe_settings, load_config

OUR_ERROR = 1
USER_ERROR = 2
# One thread per process: processes share the cores, and OpenMP's busy waiting makes them 10 to 100 times slower.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "WANDB_SILENT": "true",
    # Else a thread of a stage that was given up would join or start another Ray by its next call.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}

_COPIES = "working_dir_files"  # the folder below which Ray unpacks working directories
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
        argv: the arguments; None takes those of the process, which ends here where the job failed or was stopped.
        defaults: overrides that the job itself sets beneath the user's, from the parsed arguments.
    """
    arguments = parser.parse_intermixed_args(argv)
    arguments.command = shlex.join(parser.prog.split() + list(sys.argv[1:] if argv is None else argv))
    take_over_warnings()
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    with StopSignal() as stop:
        code = _run(parser, main, arguments, defaults, stop)
    if code and argv is None:
        _end_at_once(code)
    return code


def _run(
    parser: argparse.ArgumentParser,
    main: JobMain,
    arguments: argparse.Namespace,
    defaults: Callable[[argparse.Namespace], Sequence[str]] | None,
    stop: StopSignal,
) -> int:
    try:
        own = tuple(defaults(arguments)) if defaults else ()
        config = resolve_config([*own, *arguments.overrides], arguments.config)
        if arguments.dry_run:
            print(describe_plan(config))
            return 0
        _check_place(config)
        with _opened_run(config, arguments.command, stop) as run:
            say(f"{parser.prog} in {run.place} ({_format_versions()})")
            began = time.monotonic()
            main(config, run, arguments)
        say(f"{parser.prog}: finished in {time.monotonic() - began:.1f} s, all of it in {run.place}")
        return 0
    except BaseException as error:
        if stop.explains(error):
            say(f"Stopped by {stop.name}. The same command goes on from here.")
            return stop.exit_code
        if not isinstance(error, Exception):
            raise
        return _tell_failure(error, parser.prog)


@contextmanager
def _opened_run(config: Config, command: str, stop: StopSignal) -> Iterator[RunDir]:
    """The run of a job: however the job ends, its end is the last record, and only then is the run closed, here."""
    run = open_run(config)
    with ExitStack() as stack:
        stack.push(partial(_close_run, run))
        try:
            stack.enter_context(WandbMirror(config, run))
            yield run
        except BaseException as error:
            with suppress(OSError):  # a full disk is perhaps what the error tells of
                run.log(_describe_end(error, command, stop))
            raise


def _close_run(run: RunDir, _kind: object, error: BaseException | None, _trace: object) -> None:
    """Upload the rest of a remote run; where the job failed anyway, that is the error that counts."""
    try:
        run.close()
    except RoroError as unsaved:
        if error is None:
            raise
        say(f"Not everything was uploaded: {unsaved}")


def _describe_end(error: BaseException, command: str, stop: StopSignal) -> dict[str, object]:
    """The record of a job that did not finish."""
    if stop.explains(error):
        return {"event": "stopped", "command": command, "signal": stop.name}
    cause = _find_cause(error)
    return {"event": "failure", "command": command, "error": type(cause).__name__, "message": str(cause)}


def _format_versions() -> str:
    shown = [f"Python {platform.python_version()}"]
    for name in ("roro_ray", "ray", "torch"):
        with suppress(metadata.PackageNotFoundError):  # the code may have come as a working directory
            shown.append(f"{name} {metadata.version(name)}")
    return ", ".join(shown)


def _end_at_once(code: int) -> NoReturn:
    """End the process without waiting for threads: those of stages may still compute, and Python's own way out would
    cut them off inside native code, which can abort the process with another exit code."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_place(config: Config) -> None:
    """Refuse to write results where nobody else sees them, or where Ray deletes them: a submitted job runs in an
    unpacked copy of its upload."""
    check_shared(config.run_dir)
    if _COPIES not in Path.cwd().parts or is_remote(config.run_dir):
        return
    if not local_path(config.run_dir).is_absolute():
        raise ConfigError(
            f"run_dir={config.run_dir} is relative, and this job runs in a copy of the working directory that Ray "
            "deletes afterwards. Give an absolute path that every node sees, such as run_dir=/shared/runs/one, or a "
            "URI such as run_dir=s3://bucket/runs/one."
        )


def resolve_config(overrides: Sequence[str], file: str | Path | None) -> Config:
    """The settings; those saved in the run directory, where it holds a run, are the base in place of the defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = load_config(overrides, file)
    return load_config(overrides, file, base=saved_config(first.run_dir, first.storage))


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


def _find_cause(error: BaseException) -> BaseException:
    # Ray hands a remote error on in a wrapper whose text is a traceback; the cause says what matters.
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, RoroError) else error


def _tell_failure(error: Exception, command: str) -> int:
    shown = _find_cause(error)
    if isinstance(shown, RoroError):
        say(f"{command}: {shown}")
        return USER_ERROR
    traceback.print_exception(error)
    say(f"{command} failed: {type(error).__name__}: {error}")
    return OUR_ERROR
