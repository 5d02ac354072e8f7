"""An answer that the client has the beginning of: its last message is the assistant's, and is to be gone on with.

So a pool behind this endpoint can itself be a model of a pool. The two fields are vLLM's (and those of Hugging Face
templates), with its meaning: `continue_final_message` goes on with the last message, `add_generation_prompt` begins a
new one, and exactly one of them holds. Where neither is given, an assistant's message at the end is gone on with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from roro_ray.config import STEP_DELIMITER
from roro_ray.engines.pool import EnginePool
from roro_ray.types import Decision, Step, Usage
from serve.fields import Fields
from serve.problems import bad_request

if TYPE_CHECKING:
    from serve.schema import ChatRequest

CONTINUE, BEGIN = "continue_final_message", "add_generation_prompt"
UNKNOWN_WRITER = -1


@dataclass(frozen=True, slots=True)
class Beginning:
    """What of an answer is written: its finished steps, and the beginning of the next one."""

    steps: tuple[Step, ...] = ()
    opening: str = ""


def read_continuation(fields: Fields, last_role: str) -> bool:
    """Whether the last message is the beginning of the answer.

    Raises:
        ApiError: 400; the fields contradict each other, or there is no assistant's message to go on with.
    """
    goes_on, begins = (None if fields.get(name) is None else fields.boolean(name) for name in (CONTINUE, BEGIN))
    if goes_on is not None and goes_on == begins:
        message = (
            f"{CONTINUE} and {BEGIN} are both {str(goes_on).lower()} and contradict each other: an answer is either "
            "gone on with or begun. Send one of them."
        )
        raise bad_request(message, f"{CONTINUE}, {BEGIN}")
    asked = goes_on if goes_on is not None else None if begins is None else not begins
    is_given = last_role == "assistant"
    if asked and not is_given:
        param = CONTINUE if goes_on is not None else BEGIN
        role = f"The last message is the {last_role}'s"
        raise bad_request(f"{param} asks to go on with an answer. {role}: give the assistant's last.", param)
    return is_given if asked is None else asked


def find_beginning(request: ChatRequest) -> Beginning:
    """What of a request's answer is written."""
    return split_beginning(request.messages[-1].content) if request.continues else Beginning()


def split_beginning(text: str) -> Beginning:
    """The steps of an answer that a client gives; the writer is unknown, and empty paragraphs are left out."""
    *finished, opening = text.split(STEP_DELIMITER)
    nobody = Decision(UNKNOWN_WRITER, 0.0, ())
    steps = (
        # As before the first step: nothing is known to have gone wrong.
        Step(UNKNOWN_WRITER, part, 0, 1.0, 1.0, "delimiter", nobody, Usage())
        for part in finished
        if part.strip()
    )
    return Beginning(tuple(steps), opening)


def check_beginning(text: str, param: str, pool: EnginePool) -> None:
    """Refuse what the models of a pool cannot go on with.

    Raises:
        ApiError: 400; they think before they answer, or the text holds one of their control tokens.
    """
    if pool.facts[0].format.thinks:
        raise bad_request(
            "These models think before they answer, and the thoughts behind this beginning of an answer are not known. "
            f"Leave the assistant's last message out, or send {CONTINUE}: false to have a new answer begun.",
            param,
        )
    for token in sorted({token for facts in pool.facts for token in facts.format.special}):
        if token in text:
            message = f"{param} holds {token!r}, a control mark of the models' prompt. Leave it out."
            raise bad_request(message, param, "control_mark")
