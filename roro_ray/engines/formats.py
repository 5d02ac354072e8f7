"""How a model wants a query and an unfinished answer written down: its chat template, taken apart once.

A template is a program, and a router needs it hundreds of times an episode, in processes that have no tokenizer. So it
is rendered once round a mark, and what stands before and behind the mark is kept: two strings that travel with the
engine's facts. An unfinished assistant turn is then continued by writing the steps behind them, and a thinking block
that is open stays open instead of being opened again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roro_ray.config import STEP_DELIMITER


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """What stands before the query, between query and first step, and between thinking and final answer.

    `think_close` ends the thinking block (empty: the model has none), `conclusion` follows it before the final answer.
    `special` are the texts of control tokens, which are taken out of queries: a user's text must not end his turn.
    """

    before: str = ""
    after: str = STEP_DELIMITER
    think_close: str = ""
    conclusion: str = STEP_DELIMITER
    special: tuple[str, ...] = ()

    @property
    def thinks(self) -> bool:
        """Whether the answer begins with a thinking block, behind which the final answer stands."""
        return bool(self.think_close)

    def open(self, query: str) -> str:
        """The text up to the first step."""
        for token in self.special:
            query = query.replace(token, "")
        return self.before + query + self.after

    def close(self, thinking: Sequence[str] = ()) -> str:
        """The text that ends the thinking block and opens the final answer."""
        return "".join(thinking) + self.think_close + self.conclusion


PLAIN = PromptFormat()
