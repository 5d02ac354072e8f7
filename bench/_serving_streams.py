"""Streams by the hundred: whether all of them arrive whole, how long they take, and what happens beyond the limit."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from bench._serving_client import Client, Reply, run_lanes
from bench._serving_host import ProcessorClock
from bench._serving_overhead import Recorded

_QUEUE_FILLED_S = 1.0  # by when requests that were sent before the first stream began are in the queue


async def measure_streams(client: Client, recorded: Sequence[Recorded], lanes: int, least: int) -> dict[str, Any]:
    """So many streams at a time, at least `least` and all lanes once: rates, percentiles and damage.

    Raises:
        AssertionError: a stream was refused, broken, or told another text than the plain answer to its query.
    """
    count = max(lanes, least)
    items = [recorded[i % len(recorded)] for i in range(count)]
    spent: dict[str, float] = {}
    clock = ProcessorClock()
    with clock.spent(spent):
        wall, replies = await run_lanes(items, lanes, lambda item: client.stream(item.text))
    refused = [reply for reply in replies if reply.status != 200]
    dropped = [reply.problem for reply in replies if reply.problem is not None]
    garbled = [
        (reply.text, item.answer)
        for item, reply in zip(items, replies, strict=True)
        if reply.status == 200 and reply.problem is None and reply.text != item.answer
    ]
    assert not refused, f"{len(refused)} of {count} streams were refused: {refused[0].status} {refused[0].body}"
    assert not dropped, f"{len(dropped)} of {count} streams are broken: {dropped[0]}"
    assert not garbled, f"{len(garbled)} of {count} streams differ from the plain answer: {garbled[0]}"
    return {
        "concurrency": lanes,
        "streams": count,
        "refused": 0,
        "dropped": 0,
        "garbled": 0,
        "streams_per_s": round(count / wall, 2),
        "tokens_per_s": round(sum(item.tokens for item in items) / wall, 1),
        "ttft_ms": percentiles([1e3 * reply.ttft_s for reply in replies if reply.ttft_s is not None]),
        "total_ms": percentiles([1e3 * reply.seconds for reply in replies]),
        "cpu_ms_per_request": {role: round(1e3 * seconds / count, 2) for role, seconds in spent.items()},
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile, and the greatest."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 1)

    return {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": at(1.0)}


async def overload(
    client: Client, recorded: Sequence[Recorded], slots: int, queue: int, extra: int
) -> dict[str, Any]:
    """Fill a server of so many slots and places in the queue, then ask for `extra` more (half of them as streams).

    Raises:
        AssertionError: one of the extra was not refused at once with 429 and Retry-After, one of the first was not
            answered, or the server does not recover.
    """
    started = asyncio.Semaphore(0)
    items = [recorded[i % len(recorded)] for i in range(slots + queue)]
    fill = [asyncio.create_task(client.stream(item.text, on_start=started.release)) for item in items]
    for _ in range(slots):
        await started.acquire()
    await asyncio.sleep(_QUEUE_FILLED_S)
    assert not any(task.done() for task in fill), "the first answers ended too early to tell: slow the models more"
    ask: list[Callable[[str], Awaitable[Reply]]] = [client.ask, client.stream]
    refusals = await asyncio.gather(*(ask[i % 2](recorded[i % len(recorded)].text) for i in range(extra)))
    answers = await asyncio.gather(*fill)
    first_end, last_refusal = min(a.ended_at for a in answers), max(r.ended_at for r in refusals)
    assert last_refusal < first_end, (
        f"the first answer ended {last_refusal - first_end:.2f} s before the last refusal, so that a slot was free: "
        "slow the models more"
    )
    wrong = [reply for reply in refusals if reply.status != 429 or not (reply.retry_after or "").isdigit()]
    assert not wrong, f"{len(wrong)} of {extra} beyond the limit were not refused: {wrong[0]}"
    lost = [a for a, item in zip(answers, items, strict=True) if a.problem is not None or a.text != item.answer]
    assert not lost, f"{len(lost)} of {len(answers)} within the limit are broken: {lost[0]}"
    after = await client.ask(recorded[0].text)
    assert after.status == 200, f"the server did not recover: {after}"
    return {
        "slots": slots,
        "queue": queue,
        "answered": len(answers),
        "sent_beyond": extra,
        "refused_429": len(refusals),
        "retry_after_s": sorted({int(reply.retry_after or 0) for reply in refusals}),
        "refusal_ms": percentiles([1e3 * reply.seconds for reply in refusals]),
        "answer_ms": percentiles([1e3 * reply.seconds for reply in answers]),
    }


async def compare_ttft(
    client: Client,
    recorded: Sequence[Recorded],
    small: str,
    rounds: int,
    decide: Callable[[Recorded], Awaitable[None]],
    most: int,
) -> dict[str, Any]:
    """Time to the first text of model=auto against the small model by name, in turns, on the same queries.

    Only queries (at most `most`) whose first step the router gives to the small model, so that both write the same;
    `decide` asks the router for that first decision.
    """
    items = [each for each in recorded if each.steps[0][0] == small][:most]
    found: dict[str, list[float]] = {"auto": [], small: []}
    decisions, differences = [], []
    for turn in range(rounds):
        for place, item in enumerate(items):
            names = ["auto", small] if (turn + place) % 2 else [small, "auto"]
            now = {}
            for name in names:
                reply = await client.stream(item.text, name, max_completion_tokens=8)
                assert reply.ttft_s is not None, f"{name}: no text came: {reply}"
                now[name] = 1e3 * reply.ttft_s
                found[name].append(now[name])
            differences.append(now["auto"] - now[small])
            began = time.perf_counter()
            await decide(item)
            decisions.append(1e3 * (time.perf_counter() - began))
    if not items:
        return {"queries": 0}
    difference, decision = statistics.median(differences), statistics.median(decisions)
    return {
        "queries": len(items),
        "rounds": rounds,
        "ttft_ms": {name: round(statistics.median(values), 2) for name, values in found.items()},
        "difference_ms": round(difference, 2),
        "decision_ms": round(decision, 2),
        "difference/decision": round(difference / decision, 2),
    }
