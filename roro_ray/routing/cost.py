"""Cost accounting: 2 x parameters FLOPs for every token decoded or prefilled, by every model touched.

Each model is taken to keep its KV cache for the whole episode: it prefills only the part of the text that it
has not yet processed. So a switch of the writer charges the new writer for what the other wrote, a discarded
draft charges its decoding, a verifier charges the reading of the draft that it scores, and the router charges
each token of the text once. Every decoded token counts once, whether its forward pass produced the next token
or entered the cache with the next prefill. Decode-only FLOPs (the papers' convention) are kept beside.
"""

from __future__ import annotations

from collections.abc import Sequence

from roro_ray.engines.protocol import Prices, StepResult
from roro_ray.types import Step, Usage


class CostLedger:
    """What each model of one episode has processed, and what the step under way has cost so far.

    Charge while a step is made, then `commit` it: that returns the step's usage and moves on.

    Args:
        flops_per_token: 2 x parameters of each model, cheap to dear.
        prices: of each model's tokens; an endpoint bills the whole prompt with every call, the part that it read
            before at its `cached` price.
        steps: steps already written, where the episode goes on from a prefix; the models that wrote or drafted
            them are taken to have kept their caches, so that going on costs what the whole episode would have
            (a verifier leaves no trace in a step, and is taken to have read nothing).
    """

    def __init__(
        self, flops_per_token: Sequence[float] = (), steps: Sequence[Step] = (), prices: Sequence[Prices] = ()
    ) -> None:
        self._flops = tuple(flops_per_token)
        self._prices = tuple(prices) or (Prices(),) * len(self._flops)
        self._read: dict[int, int] = {}  # tokens processed so far, in the model's own tokens
        self._prefix: dict[int, int] = {}  # length of the current prefix in the tokens of each model that read it
        self._scored: dict[int, int] = {}  # tokens of the draft that a verifier read
        self._behind: dict[int, int] = {}  # tokens of the text after what the model processed before we began
        self._router_read = 0
        self._router_wrote_last = bool(steps) and steps[-1].decision.version >= 0
        self._usage = Usage()
        for step in steps:
            self._behind = {model: tokens + step.tokens for model, tokens in self._behind.items()}
            if step.discarded:
                self._behind[0] = step.tokens
            self._behind[step.model] = 0

    def charge_generation(self, model: int, result: StepResult, kept: int = 0) -> None:
        """Charge a model for reading the prefix and decoding a step (or draft), less `kept` tokens of a peek."""
        if kept:
            # The second call of a peek reads again what the first one read and wrote.
            self._usage += Usage(usd=self._prices[model].cached * (result.prefix_tokens + kept))
        self._prefill(model, result.prefix_tokens)
        self._decode(model, len(result.token_ids) - kept)

    def charge_lost(self, model: int, tokens: int) -> None:
        """Charge a model for `tokens` that it decoded before it was gone; what it prefilled is not known."""
        self._decode(model, tokens)

    def charge_verification(self, model: int, prefix_tokens: int, tokens: int) -> None:
        """Charge a verifier for reading the prefix and the `tokens` of the draft that it scores."""
        self._prefill(model, prefix_tokens)
        self._scored[model] = tokens
        self._usage += Usage(
            tokens_in=tokens, flops=self._flops[model] * tokens, usd=self._prices[model].read * tokens
        )

    def charge_router(self, prefix_tokens: int, last_step_tokens: int, flops_per_token: float) -> None:
        """Charge the router for the part of the text that it has not read, in the router's own tokens."""
        if self._router_wrote_last:
            self._router_read, self._router_wrote_last = prefix_tokens - last_step_tokens, False
        unread = max(prefix_tokens - self._router_read, 0)
        self._router_read = max(prefix_tokens, self._router_read)
        self._usage += Usage(flops=flops_per_token * unread)

    def commit(self, writer: int, tokens: int) -> Usage:
        """Keep the step of `tokens` tokens that `writer` wrote; return what it cost, drafts and router included."""
        for model, prefix_tokens in self._prefix.items():
            kept = tokens if model == writer else self._scored.get(model, 0) if self._is_draft(writer) else 0
            self._read[model] = prefix_tokens + kept
        self._behind = {model: behind + tokens for model, behind in self._behind.items()}
        usage, self._usage = self._usage, Usage()
        self._prefix.clear()
        self._scored.clear()
        return usage

    @staticmethod
    def _is_draft(writer: int) -> bool:
        # Only the cheapest model drafts; a step by any other model means that the scored draft was thrown away.
        return writer == 0

    def _prefill(self, model: int, prefix_tokens: int) -> None:
        if model in self._prefix:
            return  # read already while this step was made
        if model in self._behind:
            self._read[model] = max(prefix_tokens - self._behind.pop(model), 0)
        unread = max(prefix_tokens - self._read.get(model, 0), 0)
        self._prefix[model] = prefix_tokens
        price = self._prices[model]
        usd = price.read * unread + price.cached * (prefix_tokens - unread)
        self._usage += Usage(tokens_in=unread, flops=self._flops[model] * unread, usd=usd)

    def _decode(self, model: int, tokens: int) -> None:
        flops = self._flops[model] * tokens
        self._usage += Usage(
            tokens_out=tokens, flops=flops, flops_decode=flops, usd=self._prices[model].written * tokens
        )
