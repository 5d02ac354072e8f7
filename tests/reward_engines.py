"""Engines for the reward's tests: scripted ones that write rubrics and verdicts, and serve adapters by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

from roro_ray.engines.formats import PromptFormat
from roro_ray.engines.protocol import ChoiceScores, EngineFacts, Prices, StepRequest, StepResult
from roro_ray.errors import EngineError, EngineUnavailableError

CHAT = PromptFormat("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", special=("<|im_start|>", "<|im_end|>"))
THINKING = PromptFormat(
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "</think>",
    "\n\n",
    ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
)


def make_rubric_json(model: str = "large", count: int = 3, kind: str = "planning") -> str:
    """A faithful free rubric: who writes `kind` steps, and some fillers."""
    texts = [f"steps about {kind} are written by the {model} model"]
    texts += [f"steps of kind {chr(97 + k)} are written by the small model" for k in range(count - 1)]
    return json.dumps([{"criterion": text, "weight": 2} for text in texts])


class RewardEngine:
    """Writes `write(request)`, and gives the first of two choices the probability `prefer(prefix, choices)`.

    One character is one token. `adapters` holds what was loaded; a request for another is an error. `gone` is how often
    the next requests find the model unavailable, `fails` which prefixes raise.
    """

    def __init__(
        self,
        write: Callable[[StepRequest], str] = lambda request: make_rubric_json(),
        prefer: Callable[[str, tuple[str, ...]], float] = lambda prefix, choices: 0.75,
        *,
        form: PromptFormat = CHAT,
        max_context: int | None = None,
        prices: Prices | None = None,
        fails: Callable[[str], bool] = lambda prefix: False,
        finish: str = "stop",
        mass: float = 0.8,
    ) -> None:
        self.name = "scripted"
        self.write = write
        self.prefer = prefer
        self.form = form
        self.max_context = max_context
        self.prices = prices or Prices()
        self.fails = fails
        self.finish = finish
        self.mass = mass
        self.gone = 0
        self.active = self.most_active = 0
        self.adapters: dict[str, tuple[str, int]] = {}
        self.loaded: list[tuple[str, str, int]] = []
        self.requests: list[StepRequest] = []
        self.scored: list[tuple[str, tuple[str, ...], str]] = []

    async def ready(self) -> EngineFacts:
        return EngineFacts(
            self.name, "scripted", "none", 1, 2.0, 0.0, "print", format=self.form, prices=self.prices,
            max_context=self.max_context,
        )  # fmt: skip

    async def load_adapter(self, name: str, path: str, version: int) -> None:
        held = self.adapters.get(name)
        if held is not None and held[1] >= version:
            return  # as engines do
        self.adapters[name] = (path, version)
        self.loaded.append((name, path, version))

    def _check(self, prefix: str, adapter: str) -> None:
        if self.gone:
            self.gone -= 1
            raise EngineUnavailableError("gone for a moment")
        if self.fails(prefix):
            raise EngineError("told to fail")
        if adapter and adapter not in self.adapters:
            raise EngineError(f"no adapter {adapter!r}")

    async def generate_step(self, request: StepRequest) -> StepResult:
        self.requests.append(request)
        self._check(request.prefix, request.adapter)
        text = self.write(request)
        ids = (*map(ord, text), 0)
        logs = (math.log(0.5),) * len(ids)
        read = len(request.prefix)
        return StepResult(text, ids, logs, self.finish, read, 0.5, cached_tokens=read // 2)

    async def score_choices(self, prefix: str, choices: Sequence[str], adapter: str = "") -> ChoiceScores:
        self.scored.append((prefix, tuple(choices), adapter))
        self._check(prefix, adapter)
        first = self.prefer(prefix, tuple(choices))
        logs = tuple(math.log(max(p * self.mass, 1e-30)) for p in (first, 1 - first))
        return ChoiceScores(logs, (1, 1), logs, len(prefix))
