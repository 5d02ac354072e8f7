"""The Rubricor: writes a rubric for a query. It sees the query alone, never a trajectory, an answer or an outcome."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roro_ray.config import STEP_DELIMITER
from roro_ray.learning.sampling import sample_completions
from roro_ray.learning.sequences import Completion
from roro_ray.reward.judge_text import RUBRIC_HEADING, neutralise
from roro_ray.reward.rubric import ReadRubric, read_rubric
from roro_ray.types import Query, Rubric

MAX_RUBRIC_TOKENS = 88
_RETRIES = 3


def make_prompt(query: Query, special: Sequence[str] = ()) -> str:
    """What the Rubricor reads: the query and the heading `Rubric:`."""
    return neutralise(query.text, special) + STEP_DELIMITER + RUBRIC_HEADING


class Rubricor:
    """A causal language model in memory that writes rubrics; `version` counts its weight updates."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        version: int = 0,
        min_criteria: int = 3,
        max_criteria: int = 7,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.version = version
        self.min_criteria = min_criteria
        self.max_criteria = max_criteria
        self._special = tuple(tokenizer.all_special_tokens)
        self._texts: dict[int, str] = {}

    def sample(self, queries: Sequence[Query], n: int, seed: int, temperature: float = 1.0) -> list[Completion]:
        """`n` completions for each query, those of one query together."""
        prompts = [make_prompt(query, self._special) for query in queries]
        return sample_completions(
            self.model, self.tokenizer, prompts, n, MAX_RUBRIC_TOKENS, temperature=temperature, seed=seed
        )

    def find_places(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """For each token of a completion its line, and its part of it: 0 up to the writer, 1 from the weight on.

        A line's end belongs to the next line. The weight follows the last token with an opening bracket.
        """
        places, line, part = [], 0, 0
        for token in ids:
            if token not in self._texts:
                self._texts[token] = str(self.tokenizer.decode([token]))
            breaks = self._texts[token].count("\n")
            line, part = line + breaks, 0 if breaks else part
            places.append((line, part))
            part = 1 if "(" in self._texts[token] else part
        return places

    def read(self, text: str, query: Query) -> ReadRubric:
        """The faithful rubric in a completion's text, or why there is none."""
        return read_rubric(text, query, self.version, self.min_criteria, self.max_criteria)

    def write(self, queries: Sequence[Query], seed: int = 0) -> list[Rubric]:
        """One rubric a query: the likeliest text; where that does not parse, sampled ones, a few times.

        A query for which nothing parses gets a rubric without criteria: the Judge answers it with error
        verdicts, which are dropped and counted.
        """
        rubrics: list[Rubric | None] = [None] * len(queries)
        last: dict[int, str] = {}
        for attempt in range(_RETRIES + 1):
            open_queries = [i for i, rubric in enumerate(rubrics) if rubric is None]
            if not open_queries:
                break
            temperature = 0.0 if attempt == 0 else 0.7
            completions = self.sample([queries[i] for i in open_queries], 1, seed + attempt, temperature)
            for index, completion in zip(open_queries, completions, strict=True):
                last[index] = completion.text
                if completion.finish == "stop":
                    rubrics[index] = self.read(completion.text, queries[index]).rubric
        return [
            rubric or Rubric(query.id, (), last[index], self.version)
            for index, (query, rubric) in enumerate(zip(queries, rubrics, strict=True))
        ]
