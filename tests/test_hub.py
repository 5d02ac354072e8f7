"""Models by their name on the hub: found in the cache, told honestly where they cannot be had; tokenizer digests."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from tiny_models import FAMILIES
from transformers import AutoTokenizer

from roro_ray.engines.hf import HfEngine
from roro_ray.engines.hub import is_hub_name, resolve_model_path, resolve_tokenizer_path
from roro_ray.engines.loading import load_model, load_tokenizer, tokenizer_digest
from roro_ray.errors import ConfigError, EngineError

ModelMaker = Callable[..., Path]
NAME = "Owner/Tiny-0.1B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: ModelMaker) -> Path:
    """A hub cache that holds one model, on a machine that must stay offline."""
    root = tmp_path / "hub"
    folder = root / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(tiny_model(), folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "refs" / "v1").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder / "snapshots" / COMMIT


def test_a_model_of_the_hub_is_found_in_the_cache(cache: Path) -> None:
    for revision in ("", "main", "v1", COMMIT):
        assert resolve_model_path(NAME, revision) == cache
    assert resolve_tokenizer_path(NAME) == resolve_model_path(NAME, download=False) == cache
    assert load_model(NAME, "cpu", "float32", "v1").parameters > 0
    assert len(load_tokenizer(NAME)) > 600
    engine = HfEngine("tested", NAME, revision="v1")
    assert asyncio.run(engine.ready()).model == f"{NAME}@v1"


@pytest.mark.parametrize(("name", "revision"), [("Owner/Other", ""), (NAME, "v2")])
def test_what_is_not_in_the_cache_is_told_with_the_remedy(cache: Path, name: str, revision: str) -> None:
    with pytest.raises(EngineError) as caught:
        resolve_model_path(name, revision)
    message = str(caught.value)
    at = f"{name} --revision {revision}" if revision else name
    assert "HF_HUB_OFFLINE is set" in message and f"`hf download {at}`" in message and "no directory" in message
    with pytest.raises(EngineError, match="hf download"):
        resolve_tokenizer_path(name, revision)


def test_what_only_the_cache_is_asked_for_blames_no_setting(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(EngineError) as caught:
        resolve_model_path("Owner/Other", download=False)
    assert "does not hold it" in str(caught.value) and "HF_HUB_OFFLINE" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "accept its terms at https://huggingface.co/Owner/Other"),
        (RepositoryNotFoundError, "no such model, or a private one"),
        (RevisionNotFoundError, "no such revision"),
        (OSError, "OSError: disk full"),
    ],
)
def test_the_hubs_refusals_are_told_apart(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        response = (
            {} if error is OSError else {"response": httpx.Response(404, request=httpx.Request("GET", "http://h"))}
        )
        raise error("disk full", **response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(EngineError, match=message):
        resolve_model_path("Owner/Other")


def test_only_what_is_read_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **settings: Any) -> str:
        asked.append(settings)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    resolve_model_path(NAME)
    resolve_tokenizer_path(NAME, "v1")
    files = [
        *("config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "model-00001-of-00002.safetensors"),
        *("pytorch_model.bin", "model.gguf", "original/params.json", "consolidated.safetensors", "evil.py"),
    ]
    kept = [
        list(
            huggingface_hub.utils.filter_repo_objects(
                files, allow_patterns=settings["allow_patterns"], ignore_patterns=settings["ignore_patterns"]
            )
        )
        for settings in asked
    ]
    assert kept == [files[:5], files[:4]]
    assert [settings["revision"] for settings in asked] == [None, "v1"]


def test_directories_come_first_and_have_no_revisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: ModelMaker
) -> None:
    shutil.copytree(tiny_model(), tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("owner/name") == Path("owner/name")
    assert not is_hub_name("owner/name") and is_hub_name("owner/names")
    for path in (
        "/owner/name",
        "./owner/name",
        "../name",
        "a/b/c",
        "~/name",
        "name",
        "world:small",
        "owner/..",
        "a b/c",
    ):
        assert not is_hub_name(path)
    with pytest.raises(ConfigError, match="has revisions"):
        resolve_model_path("owner/name", "v1")


def test_a_download_that_ended_early_is_told(tmp_path: Path, tiny_model: ModelMaker) -> None:
    directory = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EngineError, match="lacks 1 of 2 files of weights"):
        load_model(str(directory), "cpu", "float32")
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(EngineError, match="damaged"):
        load_model(str(directory), "cpu", "float32")


def test_a_tokenizer_is_loaded_without_its_model(tmp_path: Path, tiny_model: ModelMaker) -> None:
    directory = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    (directory / "model.safetensors").unlink()
    assert load_tokenizer(str(directory)).get_vocab() == load_tokenizer(str(tiny_model())).get_vocab()
    (directory / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match="holds no tokenizer"):
        load_tokenizer(str(directory))


def test_models_of_one_tokenizer_have_one_digest_and_families_do_not(tiny_model: ModelMaker) -> None:
    def digest(path: Path | str) -> str:
        return tokenizer_digest(load_tokenizer(str(path)))

    pair = {digest(tiny_model()), digest(tiny_model(seed=1, layers=3, hidden=128))}
    assert len(pair) == 1
    assert digest(tiny_model("qwen3_moe")) in pair
    others = [
        tiny_model("llama"),
        tiny_model("deepseek_qwen"),
        tiny_model(thinking=False),
        "world:small",
        "world:cross",
    ]
    assert len({*pair, *map(digest, others)}) == 1 + len(others)
    assert digest("world:small") == digest("world:large")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_digest_is_of_what_makes_ids(family: str, tmp_path: Path, tiny_model: ModelMaker) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    before = tokenizer_digest(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert tokenizer_digest(tokenizer) == before
    path = Path(shutil.copytree(tiny_model(family), tmp_path / "other"))
    told = json.loads((path / "tokenizer.json").read_text())
    told["model"]["merges"][0], told["model"]["merges"][1] = told["model"]["merges"][1], told["model"]["merges"][0]
    (path / "tokenizer.json").write_text(json.dumps(told))
    assert tokenizer_digest(load_tokenizer(str(path))) != before
    tokenizer.add_tokens(["<more>"])
    assert tokenizer_digest(tokenizer) != before
