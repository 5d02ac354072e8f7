"""Recording of served trajectories: what the project's readers get, and what goes wrong without a request noticing."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import ScriptedEngine, make_fake_pool, make_query, run_specs, write_notes

from roro_ray.config import EpisodeConfig, RouterConfig
from roro_ray.data.store import (
    finished_shards,
    iter_queries,
    iter_trajectories,
    load_queries,
    load_trajectories,
    save_queries,
)
from roro_ray.errors import ConfigError, DataError
from roro_ray.routing.episode import EpisodeSpec
from roro_ray.routing.router import RouterNetwork, make_router
from roro_ray.routing.router_batch import encode_trajectories, score_decisions
from roro_ray.routing.router_policy import RouterPolicy
from roro_ray.routing.runner import Runner
from roro_ray.types import Query, Trajectory
from roro_ray.world.corpus import CorpusSpec
from roro_ray.world.models import ModelSpec, make_model
from roro_ray.world.tokenizer import make_tokenizer
from serve import recording
from serve.metrics import MemoryMetrics
from serve.recording import Recorder

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> RouterNetwork:
    """A tiny router whose decisions depend on the text and on the signals."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder")
    tokenizer = make_tokenizer()
    make_model(ModelSpec("qwen3", 16, 2, 2, 32, CorpusSpec(), 0, 0.0), tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return widen(make_router(RouterConfig(encoder=str(path), peek="step"), 2))


def widen(network: RouterNetwork) -> RouterNetwork:
    with torch.no_grad():
        network.head[-1].weight.normal_(std=1.0)
    return network


def make_queries(count: int) -> list[Query]:
    return [replace(make_query(name="q" * (i + 1)), id=f"req-{i}", split="served") for i in range(count)]


def serve_queries(queries: list[Query], network: RouterNetwork) -> list[tuple[Query, Trajectory]]:
    """What a server would hand over: sampled episodes of a router."""
    engines = [
        ScriptedEngine(f"m{i}", write_notes(3 + i), parameters=10 ** (i + 1), confidence=lambda p: len(p) % 7 / 8 + 0.1)
        for i in range(2)
    ]
    runner = Runner(make_fake_pool(*engines), RouterPolicy(network, 5), EpisodeConfig())
    specs = [EpisodeSpec(f"chat-{i}", query, "router", i, 0.1 * i) for i, query in enumerate(queries)]
    return list(zip(queries, run_specs(runner, specs), strict=True))


@pytest.fixture(scope="module")
def served(network: RouterNetwork) -> list[tuple[Query, Trajectory]]:
    return serve_queries(make_queries(12), network)


def record_all(recorder: Recorder, served: list[tuple[Query, Trajectory]]) -> None:
    for query, trajectory in served:
        assert recorder.record(query, trajectory)
    recorder.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_projects_readers_take_what_was_recorded(tmp_path: Path, served: list, network: RouterNetwork) -> None:
    metrics = MemoryMetrics()
    record_all(Recorder(tmp_path, "r1", flush_every=5, flush_s=60, metrics=metrics), served)
    trajectories = load_trajectories(tmp_path / "trajectories")
    queries = load_queries(tmp_path / "queries")
    assert list(iter_trajectories(tmp_path / "trajectories")) == trajectories and len(trajectories) == 12
    assert [query.text for query in queries] == [query.text for query, _ in served]
    assert {query.answer for query in queries} == {""} and {query.split for query in queries} == {"served"}
    assert len({query.id for query in queries}) == len({trajectory.id for trajectory in trajectories}) == 12
    for got, (_, made) in zip(trajectories, served, strict=True):
        assert made.correct is not None and got.correct is None and got.id.endswith(made.id)
        assert (got.steps, got.usage, got.answer, got.seed) == (made.steps, made.usage, made.answer, made.seed)
    assert metrics.total("roro_trajectories_recorded") == 12
    assert sum(finished_shards(tmp_path / "trajectories").values()) == 12
    assert list(finished_shards(tmp_path / "trajectories")) == list(finished_shards(tmp_path / "queries"))


def test_the_router_can_learn_from_what_was_recorded(tmp_path: Path, served: list, network: RouterNetwork) -> None:
    record_all(Recorder(tmp_path), served)
    trajectories = load_trajectories(tmp_path / "trajectories")
    batch = encode_trajectories(network, load_queries(tmp_path / "queries"), trajectories)
    with torch.no_grad():
        taken_BD, _ = score_decisions(network, batch)
    assert torch.allclose(taken_BD, batch.old_log_probs_BD, atol=1e-5)
    assert (batch.versions_BD[batch.decision_mask_BD] == 5).all()
    taken_D = taken_BD[batch.decision_mask_BD]
    assert taken_D.max() - taken_D.min() > 0.3  # else the agreement above would say little


def test_redaction_takes_every_text_and_leaves_what_a_router_without_an_encoder_needs(
    tmp_path: Path, served: list
) -> None:
    bare = widen(make_router(RouterConfig(encoder="", peek="step"), 2))
    pairs = serve_queries([query for query, _ in served], bare)
    secret = replace(pairs[0][0], id="ann@example.org")
    pairs[0] = (secret, replace(pairs[0][1], id="ann@example.org/0"))
    for name in ("a", "b"):
        record_all(Recorder(tmp_path / name, redact=True), pairs)
        trajectories = load_trajectories(tmp_path / name / "trajectories")
        batch = encode_trajectories(bare, load_queries(tmp_path / name / "queries"), trajectories)
        with torch.no_grad():
            taken_BD, _ = score_decisions(bare, batch)
        assert torch.allclose(taken_BD, batch.old_log_probs_BD, atol=1e-5) and batch.decision_mask_BD.sum() > 30
        for got, (_, made) in zip(trajectories, pairs, strict=True):
            assert [replace(s, text="") for s in got.steps] == [replace(s, text="") for s in made.steps]
    stored = repr([load_trajectories(tmp_path / "a" / "trajectories"), load_queries(tmp_path / "a" / "queries")])
    texts = {step.text for _, made in pairs for step in made.steps} | {query.text for query, _ in pairs}
    assert len(texts) > 12 and not [text for text in (*texts, "example.org", "note") if text in stored]
    # Another recorder has another key, so nothing can be compared, and no dictionary of hashes helps.
    hashes = [{q.text for q in load_queries(tmp_path / n / "queries")} for n in ("a", "b")]
    ids = [{q.id for q in load_queries(tmp_path / n / "queries")} for n in ("a", "b")]
    assert len(hashes[0]) == 12 and not hashes[0] & hashes[1] and not ids[0] & ids[1]


def test_one_text_is_one_query_however_often_it_comes(tmp_path: Path, served: list) -> None:
    (query, trajectory), (other, _) = served[:2]
    recorder = Recorder(tmp_path, flush_every=2, flush_s=60)
    record_all(recorder, [(query, trajectory), (replace(query, id="req-x"), trajectory), (other, trajectory)])
    record_all(Recorder(tmp_path), [(query, trajectory)])
    trajectories = load_trajectories(tmp_path / "trajectories")
    assert len(load_queries(tmp_path / "queries")) == 2 and len(trajectories) == 4
    assert len({each.query_id for each in trajectories}) == 2


def test_two_queries_of_one_id_are_refused(tmp_path: Path) -> None:
    query = make_query()
    save_queries(tmp_path / "a.parquet", [query, query])
    assert load_queries(tmp_path) == [query] and list(iter_queries(tmp_path)) == [query, query]
    save_queries(tmp_path / "b.parquet", [replace(query, text="another")])
    with pytest.raises(DataError, match="two different queries have the id test/q"):
        load_queries(tmp_path)
    with pytest.raises(DataError, match="No Query file"):
        load_queries(tmp_path / "nothing")


def test_replicas_do_not_share_names_and_a_restart_goes_on(tmp_path: Path, served: list) -> None:
    same = [Recorder(tmp_path, "a/b c", flush_every=1, flush_s=60) for _ in range(2)]
    other = Recorder(tmp_path, "z")
    for recorder in (*same, other):
        record_all(recorder, served[:1])
    (tmp_path / "trajectories" / ".served-z-000007.parquet.1.tmp").write_bytes(b"half")
    (tmp_path / "trajectories" / ".served-y-000007.parquet.1.tmp").write_bytes(b"a neighbour's, who may be alive")
    record_all(Recorder(tmp_path, "z"), served[1:3])
    names = ["served-a-b-c-000000", "served-a-b-c-2-000000", "served-z-000000", "served-z-000001"]
    assert list(finished_shards(tmp_path / "trajectories")) == names
    assert len(load_trajectories(tmp_path / "trajectories")) == 5
    assert [path.name for path in (tmp_path / "trajectories").glob(".*")] == [".served-y-000007.parquet.1.tmp"]
    assert not list(tmp_path.glob(".*.lock"))


def test_a_small_shard_is_written_after_a_while(tmp_path: Path, served: list) -> None:
    recorder = Recorder(tmp_path, flush_every=1000, flush_s=0.05)
    assert recorder.record(*served[0])
    wait_until(lambda: recorder.facts().recorded == 1)
    assert len(load_trajectories(tmp_path / "trajectories")) == 1
    recorder.close()


def test_a_slow_disk_costs_records_and_never_a_request(
    tmp_path: Path, served: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    save = recording.save_queries

    def slow(path: Path, queries: object) -> None:
        assert go.wait(20)
        save(path, queries)  # type: ignore[arg-type]

    monkeypatch.setattr(recording, "save_queries", slow)
    metrics = MemoryMetrics()
    recorder = Recorder(tmp_path, flush_every=2, flush_s=60, max_queue=4, metrics=metrics)
    assert recorder.record(*served[0]) and recorder.record(*served[1])
    wait_until(lambda: not recorder._waiting)  # the writer has taken them, and hangs
    began = time.perf_counter()
    taken = [recorder.record(*served[i % 12]) for i in range(100)]
    assert time.perf_counter() - began < 1.0
    assert taken == [True] * 4 + [False] * 96 and recorder.facts().dropped == {"queue": 96}
    go.set()
    recorder.close()
    assert recorder.facts().recorded == len(load_trajectories(tmp_path / "trajectories")) == 6
    assert list(finished_shards(tmp_path / "trajectories").values()) == [2, 2, 2]
    assert metrics.total("roro_trajectories_dropped", reason="queue") == 96
    assert not recorder.record(*served[0]) and recorder.facts().dropped["closed"] == 1


def test_a_disk_that_fails_is_counted_and_recording_goes_on(
    tmp_path: Path, served: list, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, flush_every=1, flush_s=60)
    (tmp_path / "trajectories").rmdir()
    (tmp_path / "trajectories").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            recorder.record(*served[0])
            wait_until(lambda number=number: recorder.facts().dropped.get("disk") == number)
    assert len(caplog.records) == 1 and "1 trajectories lost (disk:" in caplog.text  # not one a batch
    (tmp_path / "trajectories").unlink()
    record_all(recorder, served[:3])
    assert len(load_trajectories(tmp_path / "trajectories")) == recorder.facts().recorded == 3


FULL_DISK = """
import resource, signal, sys, time
from pathlib import Path
from serve.recording import Recorder
from tests.test_store import make_trajectory
from roro_ray.types import Query
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = Recorder(sys.argv[1], flush_every=100, flush_s=60)
query = Query("q", "served", "served", "text", "")
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))  # the queries fit, the trajectories do not
for number in range(100):
    recorder.record(query, make_trajectory(number, steps=20))
while not recorder.facts().dropped:
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
recorder.record(query, make_trajectory(100))
recorder.close()
print(recorder.facts())
"""


def test_a_write_that_breaks_off_leaves_nothing_half(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=50)
    assert "recorded=1, dropped={'disk': 100}" in done.stdout, done.stdout + done.stderr[-2000:]
    assert [each.id[-4:] for each in load_trajectories(tmp_path / "trajectories")] == ["t100"]
    assert not list(tmp_path.glob("*/.*"))


def test_a_record_that_cannot_be_stored_does_not_take_others_with_it(tmp_path: Path, served: list) -> None:
    (query, trajectory), *rest = served
    recorder = Recorder(tmp_path, flush_every=1000, flush_s=60)
    bad = [(replace(query, text="\ud800"), trajectory), (query, replace(trajectory, seed=2**70))]
    assert not recorder.record(query, replace(trajectory, steps=()))
    record_all(recorder, [*bad, *rest])
    assert recorder.facts().dropped == {"invalid": 3}
    assert len(load_trajectories(tmp_path / "trajectories")) == recorder.facts().recorded == len(rest)


def test_at_its_limit_recording_stops_with_one_warning(
    tmp_path: Path, served: list, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, flush_every=1, flush_s=60, max_mb=0.02)

    def fill() -> bool:
        recorder.record(*served[0])
        return recorder.facts().full

    with caplog.at_level(logging.WARNING):
        wait_until(fill)
        dropped = recorder.facts().dropped["limit"]
        assert not recorder.record(*served[0]) and recorder.facts().dropped["limit"] == dropped + 1
    recorder.close()
    sizes = [path.stat().st_size for path in tmp_path.glob("*/*.parquet")]
    assert 0.02 * 2**20 <= sum(sizes) < 0.02 * 2**20 + 4 * max(sizes)
    assert len(caplog.records) == 1 and "nothing more is recorded" in caplog.text
    again = Recorder(tmp_path, flush_every=1, flush_s=60, max_mb=0.02)  # the limit is the directory's, not the run's
    again.record(*served[0])
    wait_until(lambda: again.facts().full)
    again.close()
    assert again.facts().recorded == 0


def test_numbers_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    for name in ("flush_every", "flush_s", "max_queue", "max_mb"):
        with pytest.raises(ConfigError, match=rf"recording\.{name} is 0"):
            Recorder(tmp_path, **{name: 0})
