"""A solution under way, as each model of the pool reads it.

Models of one tokenizer and one prompt format read the same token ids: what one of them wrote is handed to the other as
ids, so that nothing is tokenised twice and every prefix cache hits. Across tokenizers the text is handed over, and only
what is new to a model is encoded. A step whose ids do not spell its text to the letter (a token that runs on behind the
blank line) is handed over as text as well: all models continue the same text, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roro_ray.config import STEP_DELIMITER
from roro_ray.engines.formats import PromptFormat
from roro_ray.engines.protocol import EngineFacts, PrefixIds, StepRequest, StepResult
from roro_ray.errors import ConfigError
from roro_ray.types import Query, Step


def make_prefix(query: Query, steps: Sequence[Step]) -> str:
    """Query and steps as router and Judge read them, each ended by the step delimiter."""
    return "".join([query.text, STEP_DELIMITER, *(step.text + STEP_DELIMITER for step in steps)])


@dataclass(slots=True)
class _Thread:
    """The text for one tokenizer and format, with the ids of its beginning as far as they are known."""

    format: PromptFormat
    text: str
    ids: tuple[int, ...] = ()
    characters: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """What a model is asked to go on from: every model's text so far, and where its next piece of text ends."""

    threads: tuple[_Thread, ...]
    closing: bool = False
    min_tokens: int = 0
    opening: str = ""

    def prefix(self, model: int) -> str:
        """The text that the model continues."""
        thread = self.threads[model]
        return thread.text + (thread.format.close() if self.closing else self.opening)

    def ask(self, model: int, max_tokens: int, temperature: float, seed: int, top_p: float) -> StepRequest:
        """The request for a step by this model, or for the final answer where the page is closing."""
        thread = self.threads[model]
        return StepRequest(
            prefix=self.prefix(model),
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            top_p=top_p,
            known=PrefixIds(thread.ids, thread.characters) if thread.ids else None,
            delimiter="" if self.closing else STEP_DELIMITER,
            stops=(thread.format.think_close,) if thread.format.thinks and not self.closing else (),
            min_tokens=0 if self.closing else self.min_tokens,
        )

    def note(self, model: int, result: StepResult) -> None:
        """Keep the ids of the prefix that an engine encoded in order to answer."""
        thread = self.threads[model]
        if result.encoded_ids and not (self.closing or self.opening):
            thread.ids += result.encoded_ids
            thread.characters = len(thread.text)


class Transcript:
    """Query and steps so far.

    Args:
        steps: already written.
        facts: of the pool's models, cheap to dear.
        instruction: follows the query where the format is a chat's.

    Raises:
        ConfigError: some of the models think and others do not.
    """

    def __init__(
        self, query: Query, steps: Sequence[Step], facts: Sequence[EngineFacts], instruction: str = ""
    ) -> None:
        if len({each.format.thinks for each in facts}) > 1:
            told = ", ".join(f"{each.name} {'thinks' if each.format.thinks else 'does not'}" for each in facts)
            raise ConfigError(
                f"models with and without a thinking block in one pool ({told}): a step by the one would close or "
                "open the other's block; set thinking=off (or format=chat) so that all are alike"
            )
        threads: dict[tuple[str, PromptFormat], _Thread] = {}
        self._threads = tuple(
            threads.setdefault((each.tokenizer, each.format), _Thread(each.format, "")) for each in facts
        )
        self._distinct = tuple(threads.values())
        for thread in self._distinct:
            asked = query.text + (f"\n{instruction}" if instruction and thread.format.before else "")
            thread.text = thread.format.open(asked)
        for step in steps:
            self._append(step.text, step.finish)

    @property
    def thinks(self) -> bool:
        """Whether a thinking block is open, behind which a final answer is to follow."""
        return self._distinct[0].format.thinks

    def page(self, closing: bool = False, min_tokens: int = 0, opening: str = "") -> Page:
        """What the next step follows, or, where it is `closing`, what the final answer follows.

        `opening` is the beginning of that step, where it is written already.
        """
        return Page(self._threads, closing, min_tokens, opening)

    def add(self, model: int, text: str, result: StepResult) -> None:
        """Take over a finished step: `text` as it was kept, `result` as the model's engine gave it last."""
        writer = self._threads[model]
        start = len(writer.text)
        known = bool(writer.ids) and writer.characters == start
        self._append(text, result.finish)
        if known and result.exact and result.text == text:
            ends = {"delimiter": STEP_DELIMITER, "marker": writer.format.think_close}
            writer.ids += result.token_ids
            writer.characters = start + len(text) + len(ends.get(result.finish, ""))

    def _append(self, text: str, finish: str) -> None:
        for thread in self._distinct:
            # Behind a marker the thinking block is closed: a blank line would stand between text and marker.
            thread.text += text if finish == "marker" else text + STEP_DELIMITER
