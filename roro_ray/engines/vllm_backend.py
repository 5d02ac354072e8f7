"""What the `vllm` engine asks of vLLM, whichever way it runs: token ids in, tokens with log-probabilities out.

Two back ends do it: `vllm_local` steps the engine in this process (CPUs, tests), `vllm_async` talks to an engine in a
process of its own (GPUs, tensor parallel). Where a step ends is not vLLM's business: a back end hands over every token
as it comes, and whoever takes it says when it is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from roro_ray.engines.vllm_env import import_vllm


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one request are drawn; greedy at temperature 0.

    `top` log-probabilities are told beside each token's own. `allowed` restricts the draw to some tokens, `schema` to
    JSON of that schema; neither changes the log-probabilities.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top: int = 0
    allowed: tuple[int, ...] = ()
    schema: str = ""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of a LoRA adapter as vLLM knows it: `id` is given once and never again."""

    label: str
    id: int
    path: str


@dataclass(slots=True)
class Piece:
    """Tokens that came together (one, but for speculative decoding).

    `log_probs` are theirs at temperature 1, `top_log_probs` the highest of the first one's position, the highest
    first; `cached` tells with the first piece how many tokens of the prompt were not computed anew. `is_last`: vLLM
    ended the request itself.
    """

    token_ids: list[int]
    log_probs: list[float]
    top_log_probs: Sequence[float] = ()
    cached: int = 0
    is_last: bool = False


class Receiver(Protocol):
    """Who takes the tokens of a request, in the back end's thread, one piece at a time."""

    def take(self, piece: Piece) -> bool:
        """Take tokens; True where the request shall end here."""
        ...

    def fail(self, error: Exception) -> None:
        """The request failed: nothing more comes."""
        ...


@dataclass(eq=False, slots=True)
class Generation:
    """One request to vLLM."""

    prompt: list[int]
    sampling: Sampling
    receiver: Receiver
    adapter: Adapter | None = None
    id: str = ""  # the back end's own


class Backend(Protocol):
    """One vLLM engine. `start` loads it; all methods may be called from any thread."""

    @property
    def is_dead(self) -> bool:
        """Whether the engine is gone for good, so that its host should end and be started anew."""
        ...

    def start(self) -> None:
        """Load the model; blocks.

        Raises:
            EngineError: vLLM cannot load the model.
            ConfigError: vLLM does not know one of `engine_args`.
        """
        ...

    def submit(self, generation: Generation) -> None:
        """Begin a request; its receiver hears of it."""
        ...

    def abort(self, generation: Generation) -> None:
        """End a request whose receiver wants no more; nothing happens where it has ended."""
        ...

    def add_adapter(self, adapter: Adapter) -> None:
        """Load an adapter; blocks.

        Raises:
            EngineError: its directory holds none, or one that vLLM cannot serve.
        """
        ...

    def remove_adapter(self, adapter: Adapter) -> None:
        """Forget an adapter that no request uses."""
        ...

    def close(self) -> None:
        """Free the engine; requests under way fail."""
        ...


def make_params(sampling: Sampling, eos_ids: Sequence[int]) -> Any:
    """vLLM's SamplingParams: every token told as it comes, and ended by the model's end of sequence only."""
    vllm = import_vllm("vllm.sampling_params")
    structured = vllm.StructuredOutputsParams(json=sampling.schema) if sampling.schema else None
    return vllm.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed if sampling.temperature > 0 else None,
        logprobs=sampling.top,
        allowed_token_ids=list(sampling.allowed) or None,
        structured_outputs=structured,
        stop_token_ids=list(eos_ids),
        ignore_eos=True,  # all of them are named above
        detokenize=False,
        output_kind=vllm.RequestOutputKind.DELTA,
    )


def make_lora(adapter: Adapter) -> Any:
    """vLLM's name for an adapter."""
    return import_vllm("vllm.lora.request").LoRARequest(adapter.label, adapter.id, adapter.path)


def brief(error: BaseException) -> str:
    """An error in one line: its kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
