"""Which replica gets a request: the one that knows it, evenly, away from slow ones and back; how many are wanted."""

from __future__ import annotations

import random
from collections import Counter

from roro_ray.engines.balance import Balance, State
from roro_ray.engines.scaling import Scaler


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_balance(count: int) -> tuple[Balance, Clock]:
    clock = Clock()
    balance = Balance(clock)
    balance.set_members([f"r{i}" for i in range(count)])
    return balance, clock


def serve(balance: Balance, clock: Clock, prefix: str, seconds: dict[str, float]) -> str:
    """One request from beginning to end, of ten tokens; `seconds` a token by replica."""
    key = balance.pick(prefix)
    assert key is not None
    balance.take(key)
    call = balance.begin(key)
    clock.now += 10 * seconds.get(key, 0.01)
    balance.finish(key, call, "step", 10)
    balance.give_back(key)
    return key


def test_a_trajectory_stays_where_its_prefix_is_known() -> None:
    balance, clock = make_balance(5)
    text, homes = "Question\n\n", set()
    for step in range(20):
        homes.add(serve(balance, clock, text, {}))
        text += f"Step {step}\n\n" + f"Another model's step {step}\n\n"  # which this model never saw
    assert len(homes) == 1 and balance.moved == 0


def test_a_new_query_goes_where_every_worker_sends_it() -> None:
    (first, _), (second, _) = make_balance(5), make_balance(5)
    picks = [first.pick(f"Question {i}\n\n") for i in range(50)]
    assert picks == [second.pick(f"Question {i}\n\n") for i in range(50)]
    assert len(set(picks)) == 5
    first.set_members([f"r{i}" for i in range(6)])  # one more: only what it gets has moved
    fresh, _ = make_balance(6)
    moved = [(old, fresh.pick(f"Question {i}\n\n")) for i, old in enumerate(picks)]
    assert {new for old, new in moved if new != old} == {"r5"}
    # A remembered home outlives the change.
    assert [first.pick(f"Question {i}\n\nA step\n\n") for i in range(50)] == picks


def test_loads_are_bounded_even_if_all_ask_the_same() -> None:
    balance, _ = make_balance(4)
    for _ in range(200):
        key = balance.pick("The one question\n\n")
        assert key is not None
        balance.take(key)
    loads = [balance.in_hand(key) for key in balance.up]
    assert sum(loads) == 200 and max(loads) <= 1.25 * 200 / 4 + 1 and min(loads) >= 1
    assert balance.moved > 0


def test_a_slow_replica_loses_work_and_gets_it_back() -> None:
    balance, clock = make_balance(3)
    draw = random.Random(0)

    def run(count: int, slow: float) -> Counter[str]:
        seconds = {"r0": slow, "r1": 0.01, "r2": 0.01}
        return Counter(serve(balance, clock, f"Question {draw.random()}\n\n", seconds) for _ in range(count))

    assert min(run(300, 0.01).values()) > 50
    run(100, 0.2)  # it becomes 20 times slower, which takes a few requests to be seen
    slowed = run(2000, 0.2)
    assert 1 <= slowed["r0"] <= 20 and balance.share("r0") < 0.1  # probes alone
    run(2000, 0.01)
    assert balance.share("r0") == 1.0
    assert min(run(300, 0.01).values()) > 50


def test_a_replica_that_has_stopped_answering_counts_as_slow_before_it_does() -> None:
    balance, clock = make_balance(3)
    for i in range(30):
        serve(balance, clock, f"Question {i}\n\n", {})
    balance.take("r0")
    balance.begin("r0")
    clock.now += 100
    picks = Counter(serve(balance, clock, f"Another {i}\n\n", {}) for i in range(100))
    assert picks["r0"] == 0 and picks["r1"] + picks["r2"] == 100


def test_kinds_of_work_are_compared_with_their_own() -> None:
    balance, clock = make_balance(2)
    for _ in range(20):  # scoring takes a hundred times as long as a token, on both
        for key, kind, seconds in (("r0", "score", 1.0), ("r1", "step", 0.01), ("r1", "score", 1.0)):
            call = balance.begin(key)
            clock.now += seconds
            balance.finish(key, call, kind, 1)
    balance.pick("Question\n\n")
    assert balance.share("r0") == balance.share("r1") == 1.0


def test_states() -> None:
    balance, _ = make_balance(2)
    home = balance.pick("Question\n\n")
    assert home is not None
    balance.set_state(home, State.SUSPECT)
    other = balance.pick("Question\n\nA step\n\n")
    assert other is not None and other != home
    balance.set_state(other, State.DOWN)
    assert balance.pick("Question\n\n") is None and balance.up == ()
    balance.set_state(home, State.UP)
    assert balance.pick("Question\n\n") == home
    balance.set_members([])
    assert balance.pick("Question\n\n") is None and balance.state(home) is None
    balance.give_back(home)  # of one that was released: nothing to do


def test_scaling_up_at_once_and_down_after_a_time() -> None:
    scaler = Scaler(0, 4, target=32, idle_s=10)
    assert scaler.decide(0, 0) == 0
    assert scaler.decide(1, 1) == 1
    assert scaler.decide(2, 100) == 4
    assert scaler.decide(3, 1000) == 4
    assert scaler.decide(4, 33) == 4  # four were wanted a second ago
    assert scaler.decide(12.5, 33) == 4
    assert scaler.decide(13.5, 1) == 2  # within the last ten seconds two were wanted
    assert scaler.decide(20, 0) == 2
    assert scaler.decide(23, 0) == 1
    assert scaler.decide(30, 0) == 0
    assert Scaler(2, 3, 32, 0).decide(0, 0) == 2
