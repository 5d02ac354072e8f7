"""Time and memory of the whole demo: seconds of each stage, and the peak over all its processes.

Memory is the proportional set size (shared pages counted once) of the job and everything that it starts, Ray included,
sampled every two seconds. `python -m bench.demo [arguments of jobs.demo]`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from roro_ray.data.run_dir import read_metrics

_EVERY_S = 2.0
_GIB = 2**30


def measure_memory(root: psutil.Process) -> dict[str, float]:
    """GiB of each kind of process in the tree, by the first words of its title."""
    found: dict[str, float] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            name = process.cmdline()[0].rsplit("/", 1)[-1] if process.cmdline() else process.name()
            found[name] = found.get(name, 0.0) + process.memory_full_info().pss / _GIB
        except (psutil.Error, FileNotFoundError):
            continue
    return found


def main() -> None:
    """Run the demo and print what it took."""
    with tempfile.TemporaryDirectory(prefix="roro-bench-") as folder:
        run_dir = Path(folder) / "run"
        began = time.monotonic()
        command = [sys.executable, "-m", "jobs.demo", *sys.argv[1:], f"run_dir={run_dir}"]
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak: dict[str, float] = {}
        while job.poll() is None:
            now = measure_memory(psutil.Process(job.pid))
            if sum(now.values()) > sum(peak.values()):
                peak = now
            time.sleep(_EVERY_S)
        seconds = time.monotonic() - began
        stages = [record for record in read_metrics(run_dir / "metrics.jsonl") if record.get("event") == "stage"]
    print(f"exit code {job.returncode}, {seconds:.0f} s in all, peak memory {sum(peak.values()):.2f} GiB")
    for record in stages:
        print(f"  {record['stage']:<28} {record['seconds']:7.1f} s")
    for name, size in sorted(peak.items(), key=lambda item: -item[1])[:8]:
        print(f"  {name:<28} {size:7.2f} GiB at the peak")
    sys.exit(job.returncode)


if __name__ == "__main__":
    main()
