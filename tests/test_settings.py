"""Settings: sources and their order, clear refusals, warnings, and a fast import."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from roro_ray.config import Config
from roro_ray.errors import ConfigError
from roro_ray.settings import (
    changed_keys,
    describe_settings,
    flatten_config,
    load_config,
    load_saved_config,
    save_config,
)

pytestmark = pytest.mark.timeout(30)
ROOT = Path(__file__).parents[1]


def test_defaults_are_valid() -> None:
    assert load_config() == Config()


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    models = "pool:\n  models:\n  - {name: a, path: p}\n  - {name: b, path: q}\n"
    file.write_text("router: {beta: 0.5, hidden: 8}\n" + models)
    config = load_config(["router.beta=0.25", "pool.models[1].path=world:large", "collect.strategies=[fixed:0]"], file)
    assert (config.router.beta, config.router.hidden, config.router.prior) == (0.25, 8, Config().router.prior)
    assert [(m.name, m.path, m.engine) for m in config.pool.models] == [("a", "p", "hf"), ("b", "world:large", "hf")]
    assert config.collect.strategies == ["fixed:0"]


def test_an_empty_value_is_an_empty_string_and_numbers_convert() -> None:
    config = load_config(["router.encoder=", "router.beta=1", "run_dir=runs/7"])
    assert config.router.encoder == "" and config.router.beta == 1.0 and config.run_dir == "runs/7"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("router.betta=1", ["router.betta", "did you mean 'router.beta'"]),
        ("beta=1", ["did you mean 'router.beta'"]),
        ("router=1", ["router is a section"]),
        ("nonsense", ["expected key=value"]),
        ("router.iterations=many", ["router.iterations", "'many'", "expected int"]),
        ("router.iterations=2.5", ["2.5", "expected int"]),
        ("reward.rounds=null", ["None", "expected int"]),
        ("router.credit=steps", ["'steps'", "trajectory, step"]),
        ("data.suites=[chian]", ["did you mean 'chain'"]),
        ("data.suites=[]", ["data.suites is empty"]),
        ("collect.strategies=[fixed:0,fixed:0]", ["fixed:0 twice"]),
        ("router.prior=1.5", ["router.prior", "between 0 and 1"]),
        ("router.group_size=1", ["router.group_size", "at least 2"]),
        ("episode.temperature=-1", ["episode.temperature", "at least 0"]),
        ("ray.worker_cpus=0", ["ray.worker_cpus", "more than 0"]),
        ("pool.models=[{name: a, path: p}]", ["expected at least 2", "nothing to route"]),
        ("pool.models=[{name: a, pth: p}]", ["'pth'", "did you mean 'path'"]),
        ("pool.models=[3]", ["pool.models", "expected a mapping"]),
        ("pool.models[5].path=x", ["no entry 5"]),
        ("pool.models[0].pth=x", ["did you mean 'path'"]),
        ("reward.kind_weights={outcom: 1}", ["did you mean 'outcome'"]),
        ("wandb.mode=[", ["not a YAML value"]),
        ("run_dir=https://host/x", ["expected a path or the URI", "s3://bucket/run"]),
        ("storage.options={token: [a]}", ["storage.options.token looks like a secret"]),
        ("run_dir=${nothing}", ["do not resolve"]),
    ],
)
def test_a_wrong_setting_is_refused_with_the_way_out(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["router.cost_weight_low=0.9"], ("router.cost_weight_low", "router.cost_weight_high")),
        (["reward.min_criteria=9"], ("reward.min_criteria", "reward.max_criteria")),
        (["episode.max_step_tokens=5000"], ("episode.max_step_tokens", "episode.max_tokens")),
        (["data.router_queries=1", "router.queries=99"], ("router.queries", "data.router_queries")),
    ],
)
def test_contradictory_settings_are_both_named(overrides: list[str], keys: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert all(key in str(caught.value) for key in keys)


@pytest.mark.parametrize(
    "overrides",
    [
        ["router.beta=0", "router.credit=step"],
        ["wandb.project=mine"],
        ["reward.rubric_source=fixed", "reward.rounds=3"],
        ["pairs.process_source=agreement", "pairs.continuations=4"],
        ["episode.temperature=1", "pool.memo_entries=10"],
    ],
)
def test_a_setting_about_to_be_ignored_warns(overrides: list[str]) -> None:
    with pytest.warns(UserWarning, match="will be ignored"):
        load_config(overrides)


def test_defaults_never_warn(recwarn: pytest.WarningsRecorder) -> None:
    load_config(["router.beta=0", "episode.temperature=1", "reward.rubric_source=random"])
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("router: {betta: 1}", "did you mean 'router.beta'"),
        ("router: 3", "router is a section"),
        ("routr: {beta: 1}", "routr"),
        ("- 1", "expected sections"),
        ("a: [", "not valid YAML"),
        ("5", "cannot be read.*Expected sections"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, word: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=word.replace("(", r"\(")):
        load_config(file=file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Settings file not found"):
        load_config(file=tmp_path / "none.yaml")


def test_saving_and_loading_gives_the_same_settings_without_warnings(tmp_path: Path, recwarn) -> None:
    config = load_config(["router.beta=0", "router.head_lr=0.1234567890123", "reward.kind_weights={cost: 2.5}"])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_saved_config(tmp_path / "run" / "config.yaml") == config
    assert not list(recwarn)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_changed_keys_names_old_and_new() -> None:
    assert changed_keys(Config(), load_config(["router.beta=0"])) == {"router.beta": (Config().router.beta, 0.0)}


def test_every_section_is_described_with_its_defaults() -> None:
    text = describe_settings(("router", "data"))
    for key in flatten_config(Config()):
        assert (f"  {key}=" in text) == key.startswith(("router.", "data."))
    assert "weight of the process reward" in text


def test_the_import_is_light() -> None:
    code = "import sys, roro_ray.settings; print('torch' in sys.modules or 'ray' in sys.modules)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
    # Well under a second on an idle core; the limit leaves room for a busy machine.
    assert time.perf_counter() - began < 3


def test_every_shipped_yaml_of_settings_parses() -> None:
    shipped = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
    assert shipped
    for file in shipped:
        assert load_config(file=file) != Config()
