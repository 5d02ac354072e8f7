"""The shapes that ship with the package: what they count, where else a shape is looked for, what stays unknown."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from roro_ray.engines.shapes import SHAPES_DIR, count_shape, read_shape
from roro_ray.errors import DataError

pytestmark = pytest.mark.timeout(60)
SHIPPED = sorted(str(file.parent.relative_to(SHAPES_DIR)) for file in SHAPES_DIR.glob("*/*/config.json"))
# Billions of parameters, in all and active, as the models' cards on the hub state them.
PUBLISHED = {
    "Qwen/Qwen3-0.6B": ("0.6", "0.6"),
    "Qwen/Qwen3-1.7B": ("1.7", "1.7"),
    "Qwen/Qwen3-4B": ("4.0", "4.0"),
    "Qwen/Qwen3-8B": ("8.2", "8.2"),
    "Qwen/Qwen3-14B": ("14.8", "14.8"),
    "Qwen/Qwen3-32B": ("32.8", "32.8"),
    "Qwen/Qwen3-30B-A3B": ("30.5", "3.3"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("1.78", "1.78"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("7.62", "7.62"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": ("14.8", "14.8"),
    "meta-llama/Llama-3.1-8B": ("8.03", "8.03"),
}


def test_every_shipped_shape_has_a_published_total_to_be_held_against() -> None:
    assert set(SHIPPED) == set(PUBLISHED)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_counted_is_what_the_models_card_says(name: str) -> None:
    counted = count_shape(SHAPES_DIR / name)
    assert counted == json.loads((SHAPES_DIR / name / "facts.json").read_text()), "python -m roro_ray.estimate.count"
    for value, published in zip((counted["parameters"], counted["active_parameters"]), PUBLISHED[name], strict=True):
        # Cards round or cut off, so the last digit may differ by one; beyond that, within 1%.
        digit = 10.0 ** -len(published.partition(".")[2])
        assert abs(value / 1e9 - float(published)) < max(digit, 0.01 * float(published))


def test_a_shape_knows_weights_states_and_flops() -> None:
    shape = read_shape("Qwen/Qwen3-14B")
    assert shape is not None and shape.parameters == 14_768_307_200
    assert shape.kv_bytes("bfloat16") == 2 * 40 * 8 * 128 * 2  # keys and values, layers, heads, width, bytes
    assert shape.weight_bytes("bfloat16") == 2 * shape.parameters
    mixture = read_shape("Qwen/Qwen3-30B-A3B")
    assert mixture is not None and mixture.flops_per_token == 2 * mixture.active < 0.25 * mixture.parameters


def test_a_directory_comes_first_then_the_cache_then_what_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    read_shape.cache_clear()
    shipped = read_shape("Qwen/Qwen3-4B")
    assert shipped is not None and shipped.source == "shipped copy"
    commit = "0" * 40
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-4B" / "snapshots" / commit
    shutil.copytree(SHAPES_DIR / "Qwen/Qwen3-8B", snapshot)
    (tmp_path / "hub" / "models--Qwen--Qwen3-4B" / "refs").mkdir()
    (tmp_path / "hub" / "models--Qwen--Qwen3-4B" / "refs" / "main").write_text(commit)
    read_shape.cache_clear()
    cached = read_shape("Qwen/Qwen3-4B")
    assert cached is not None and cached.source == "hub cache" and cached.parameters == 8_190_735_360
    shutil.copytree(SHAPES_DIR / "Qwen/Qwen3-14B", tmp_path / "Qwen" / "Qwen3-4B")
    read_shape.cache_clear()
    local = read_shape("Qwen/Qwen3-4B")
    assert local is not None and local.source == "directory" and local.parameters == 14_768_307_200
    read_shape.cache_clear()


def test_an_embedded_model_has_a_shape_and_a_stranger_has_none() -> None:
    small = read_shape("world:small")
    assert small is not None and small.parameters == 71_824 and small.kv_bytes("float32") == 2 * 2 * 48 * 4
    assert read_shape("nobody/nothing-7B") is None and read_shape("world:nothing") is None


def test_a_config_that_describes_nothing_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match=r"config\.json.*causal language model"):
        read_shape(str(tmp_path))


def test_reading_a_shipped_shape_needs_no_torch() -> None:
    code = (
        "import sys; from roro_ray.engines.shapes import read_shape; assert read_shape('Qwen/Qwen3-14B').layers == 40;"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
