"""Simulated rollouts and their preference pairs on disk, as the stages before leave them, and a strong LLM."""

from __future__ import annotations

import json
import re
from pathlib import Path

from simulated import SimulatedRunner

from roro_ray.config import PairsConfig
from roro_ray.data.store import save_pairs, save_trajectories
from roro_ray.engines.protocol import StepRequest
from roro_ray.reward.pair_store import StoredPairs, index_pairs
from roro_ray.reward.pairs import make_pairs

_STEP = re.compile(r"([A-Z]): (.+?)(?=(?:[;.]? *[A-Z]: )|[;.]? *$)", re.MULTILINE)


def make_stored(directory: Path, count: int = 8, suites: tuple[str, ...] = ("chain", "word")) -> list[StoredPairs]:
    """Queries with outcome and cost pairs, one shard a suite."""
    for suite in suites:
        runner = SimulatedRunner((suite,), count)
        trajectories = runner.collect()
        save_trajectories(directory / "trajectories" / f"{suite}-00000.parquet", trajectories)
        pairs = make_pairs(runner.queries, trajectories, PairsConfig())
        save_pairs(directory / "pairs" / f"{suite}-00000.parquet", pairs)
    queries = [query for suite in suites for query in SimulatedRunner((suite,), count).queries]
    return index_pairs(queries, directory / "trajectories", directory / "pairs")


class StrongWriter:
    """Reads the prompts as a good LLM would: criteria from where two solutions part, verdicts from who wrote what.

    `turned` makes it ask for the wrong writer everywhere, `biased` always choose the solution shown first.
    """

    def __init__(self, turned: bool = False, biased: bool = False) -> None:
        self.turned = turned
        self.biased = biased

    def write(self, request: StepRequest) -> str:
        """The criteria, as JSON: the preferred solution's writer wherever the two part."""
        prompt = request.prefix
        better, worse = self._solutions(prompt)
        if "Solution B is preferred" in prompt:
            better, worse = worse, better
        quotes = dict(_STEP.findall(prompt.partition("\n\nSolution A:")[0]))
        labels = [label for label in better if label in quotes]
        parting = [label for label in labels if better[label] != worse.get(label)]
        chosen = (parting + [label for label in labels if label not in parting])[: max(3, min(len(parting), 7))]
        texts = [f"{x}: {quotes[x]} written by the {self._turn(better[x])} model" for x in sorted(chosen)]
        weights = [5 if label in parting else 1 for label in sorted(chosen)]
        return json.dumps([{"criterion": t, "weight": w} for t, w in zip(texts, weights, strict=True)])

    def prefer(self, prefix: str, choices: tuple[str, ...]) -> float:
        """The probability of the first choice: yes, or A."""
        if choices == ("yes", "no"):
            question = prefix.rpartition("Rubric:\n")[2]
            return 0.95 if self._meets(question, self._marks(prefix)) else 0.05
        if self.biased:
            return 0.9
        criteria = re.findall(r"^- (.+) \((\d)\)$", prefix, re.MULTILINE)
        sides = self._solutions(prefix)
        scores = [sum(int(weight) * self._meets(text, marks) for text, weight in criteria) for marks in sides]
        return 0.9 if scores[0] > scores[1] else 0.1 if scores[0] < scores[1] else 0.5

    def _turn(self, model: str) -> str:
        return model if not self.turned else "large" if model == "small" else "small"

    @staticmethod
    def _marks(text: str) -> dict[str, str]:
        found = re.findall(r"^\[([SL])\] ([A-Z]): ", text, re.MULTILINE)
        return {label: "small" if mark == "S" else "large" for mark, label in found}

    def _solutions(self, prompt: str) -> tuple[dict[str, str], dict[str, str]]:
        first, _, second = prompt.partition("\n\nSolution B:\n\n")
        return self._marks(first), self._marks(second)

    @staticmethod
    def _meets(text: str, marks: dict[str, str]) -> bool:
        return f"written by the {marks.get(text[:1])} model" in text


