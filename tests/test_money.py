"""Money in evaluations: dollars from the ledger to summary, headline, report and table, and silence without prices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jobs._table import format_results
from roro_ray.data.run_dir import RunDir
from roro_ray.engines.protocol import EngineFacts, Prices
from roro_ray.evaluation.evaluate import Inputs, evaluate
from roro_ray.evaluation.headline import make_headline
from roro_ray.evaluation.local_host import LocalHost
from roro_ray.evaluation.report_sections import make_method_table
from roro_ray.evaluation.summary import make_summary
from roro_ray.evaluation.sweeps import QuerySets
from tests.fakes import ScriptedEngine, make_fake_pool
from tests.test_evaluation import make_config, make_queries, overall_entry
from tests.test_oracle import write_as

pytestmark = pytest.mark.timeout(60)


class PricedEngine(ScriptedEngine):
    """A scripted engine whose tokens cost something."""

    prices = Prices()

    async def ready(self) -> EngineFacts:
        return dataclasses.replace(await super().ready(), prices=self.prices)


def run(small: Prices, large: Prices) -> dict:
    engines = PricedEngine("small", write_as(0)), PricedEngine("large", write_as(1), parameters=100)
    engines[0].prices, engines[1].prices = small, large
    config = make_config()
    config.evaluate.thresholds = 1
    queries = QuerySets(make_queries("validation", 1), make_queries("test", 1))
    with LocalHost(config, make_fake_pool(*engines)) as host:
        evaluation = evaluate(Inputs(config, queries, {}), host)
    return make_summary(evaluation, dataclasses.asdict(config), {}, None, 20, 0)


@pytest.fixture(scope="module")
def priced() -> dict:
    return run(Prices(), Prices(read=0.002, cached=0.001, written=0.01))


def test_the_models_alone_cost_what_their_tokens_cost(priced: dict) -> None:
    entries = priced["suites"]["overall"]
    assert entries["small"]["usd"] == 0.0  # free, and known to be
    assert entries["large"]["usd"] > 0.01 and entries["large"]["ci"]["usd"][0] > 0
    assert entries["small"]["vs_large"]["usd_saved"] == pytest.approx(1.0)
    shares = {method: entry for method, entry in entries.items() if method in ("small", "random", "large")}
    assert shares["small"]["usd"] <= shares["random"]["usd"]


def test_money_reaches_the_report_and_the_terminal(priced: dict, tmp_path: Path) -> None:
    entries = priced["suites"]["overall"]
    shown = f"{1000 * entries['large']['usd']:.3f}"
    table = make_method_table(entries, {})
    assert "USD / 1,000 queries" in table and shown in table
    text = format_results(priced, RunDir(tmp_path))
    assert "USD/1000 queries" in text and shown in text


def test_without_prices_nothing_speaks_of_money(tmp_path: Path) -> None:
    summary = run(Prices(), Prices())
    for entry in summary["suites"]["overall"].values():
        assert not [name for name in (*entry, *entry["ci"], *entry.get("vs_large", {})) if name.startswith("usd")]
    assert "USD" not in make_method_table(summary["suites"]["overall"], {})
    assert "USD" not in format_results(summary, RunDir(tmp_path)) and "money" not in summary["headline"]["text"]


def test_the_headline_says_what_the_prices_make_of_it() -> None:
    entry = overall_entry(0.0, [-0.005, 0.01], 0.4)
    entry["roro"]["vs_large"] |= {"usd_saved": 0.25}
    entry["roro"]["vs_large"]["ci"] |= {"usd_saved": [0.2, 0.3]}
    assert "By the pool's prices it saves 25% (20 to 30) of the money." in make_headline(entry, 0.01)["text"]
    entry["roro"]["vs_large"]["usd_saved"] = -0.1
    entry["roro"]["vs_large"]["ci"]["usd_saved"] = [-0.15, -0.05]
    assert "costs 10% (5 to 15) more" in make_headline(entry, 0.01)["text"]
