"""The router network: text so far and scalar signals in, logits over the pool out.

A causal language model (tiny by default, or none) reads the query and the steps; its state at the last token
before each step, joined with that step's scalar signals, goes through a small MLP. Because the encoder is
causal, one forward pass over a finished trajectory gives every decision's logits, equal to those computed
step by step: training costs the trajectory's length, not its square. There is no dropout, and the weights are
float32, so that learner and rollout workers compute the same probabilities.

A large encoder can stay as it is, in 16 bits, and be trained as a LoRA adapter (peft): then adapter and head, in
float32, are all that is published, checkpointed and saved.

Axes: B trajectories, T text tokens, D decisions, F features, C encoder width, N models of the pool.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roro_ray.config import RouterConfig
from roro_ray.errors import CheckpointError, ConfigError, EngineError, did_you_mean
from roro_ray.routing.observation import FEATURE_NAMES
from roro_ray.types import Peek

_PIECES_KEPT = 200_000
_ROWS_PER_PASS = 32


@dataclass(frozen=True, slots=True)
class EncoderBase:
    """Where an encoder's weights come from, their dtype, and the rank of the adapter that is trained on them."""

    path: str
    revision: str
    dtype: str
    rank: int


class PieceTokenizer:
    """Token ids of a text made piece by piece, so that ids of a prefix are a prefix of the ids of the whole.

    Tokenising the whole text anew at each decision could merge tokens across a boundary, and costs more: most
    pieces (a query, a greedy step) come again and again, and are remembered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, tuple[int, ...]] = {}

    def encode(self, piece: str) -> tuple[int, ...]:
        """The ids of one piece; none at all for a router without an encoder."""
        if self._tokenizer is None:
            return ()
        ids = self._ids.get(piece)
        if ids is None:
            if len(self._ids) >= _PIECES_KEPT:
                self._ids.clear()
            ids = self._ids[piece] = tuple(self._tokenizer(piece, add_special_tokens=False)["input_ids"])
        return ids


class RouterNetwork(torch.nn.Module):
    """Encoder and decision head.

    Args:
        body: a causal LM without its output layer, or None for scalar signals only.
        tokenizer: of the body.
        prior: probability of a dearer model before training; the last layer starts near zero, so that every
            text starts with it.
        peek: what the policy made of this network looks at.
        base: where the body's frozen weights come from, if it is trained as an adapter; None where all of it is.
    """

    def __init__(
        self,
        body: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        pool_size: int,
        hidden: int,
        prior: float,
        peek: Peek = Peek.NONE,
        base: EncoderBase | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.body = body
        self.tokenizer = tokenizer
        self.pieces = PieceTokenizer(tokenizer)
        self.pool_size = pool_size
        self.hidden = hidden
        self.prior = prior
        self.peek = peek
        self.version = 0
        self.width = 0 if body is None else int(body.config.hidden_size)
        self.head = torch.nn.Sequential(
            torch.nn.Linear(self.width + len(FEATURE_NAMES), hidden),
            torch.nn.GELU(),
            torch.nn.Linear(hidden, pool_size),
        )
        last = cast(torch.nn.Linear, self.head[-1])
        torch.nn.init.normal_(last.weight, std=0.01)
        with torch.no_grad():
            last.bias.fill_(math.log(prior / (pool_size - 1)))
            last.bias[0] = math.log(1 - prior)

    @property
    def flops_per_token(self) -> float:
        """2 x the encoder's parameters; the head runs once a decision and is not counted."""
        return 0.0 if self.body is None else 2.0 * sum(parameter.numel() for parameter in self.body.parameters())

    def learned_state(self) -> dict[str, torch.Tensor]:
        """The weights that training changes: all, or adapter and head where the encoder's own stay frozen."""
        state: dict[str, torch.Tensor] = self.state_dict()
        if self.base is None:
            return state
        return {name: tensor for name, tensor in state.items() if name.startswith("head.") or ".lora_" in name}

    def checkpoint_activations(self) -> None:
        """Keep no activations inside the encoder's layers for the backward pass; they are computed again there."""
        if self.body is not None:
            self.body.gradient_checkpointing_enable({"use_reentrant": False})
            self.train()  # the library does so in training mode alone; there is no dropout

    def encode(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, C] of right-padded texts.

        Attention is causal and padding comes last, so no real position sees it and no mask is needed.
        """
        assert self.body is not None, "a router without an encoder has no states"
        states: torch.Tensor = self.body(input_ids=ids_BT, use_cache=False).last_hidden_state
        return states

    def decide(self, states_C: torch.Tensor | None, features_F: torch.Tensor) -> torch.Tensor:
        """Logits [.., N] from boundary states [.., C] (None without encoder) and features [.., F]."""
        if states_C is None:
            return cast(torch.Tensor, self.head(features_F))
        # Without its scale the state would drown the features, which lie in [0, 1].
        normed_C = F.layer_norm(states_C.float(), (self.width,))
        return cast(torch.Tensor, self.head(torch.cat([normed_C, features_F], dim=-1)))

    def forward(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, boundary_BD: torch.Tensor, features_BDF: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, D, N] of every decision of every trajectory, in one pass.

        Args:
            mask_BT: True at real tokens; padding must be on the right (then attention needs no mask).
            boundary_BD: position of the last token before each decision, -1 where a row has fewer decisions
                (the logits there mean nothing).
        """
        if self.body is None:
            return self.decide(None, features_BDF)
        return self.decide(self._read_boundaries(ids_BT, mask_BT, boundary_BD.clamp(min=0)), features_BDF)

    def _read_boundaries(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, boundary_BD: torch.Tensor) -> torch.Tensor:
        """States [B, D, C], read in passes of texts of like length: padding costs as much as text."""
        if not len(ids_BT):  # a learner's rank may be left without trajectories
            return torch.zeros(*boundary_BD.shape, self.width, device=ids_BT.device)
        assert bool(mask_BT[:, 0].all()), "texts must be padded on the right"
        lengths_B = mask_BT.sum(1)
        order_B = lengths_B.argsort(stable=True)
        parts = []
        for rows in order_B.split(_ROWS_PER_PASS):
            states_BTC = self.encode(ids_BT[rows, : int(lengths_B[rows[-1]])])
            places_B1 = torch.arange(len(rows), device=ids_BT.device).unsqueeze(1)
            parts.append(states_BTC[places_B1, boundary_BD[rows]])
        return torch.cat(parts)[order_B.argsort()]


def make_router(config: RouterConfig, pool_size: int) -> RouterNetwork:
    """An untrained router for a pool (seed torch before the call: the head is drawn at random).

    Raises:
        ConfigError: a pool of fewer than two models, a bad prior, width or peek, or no encoder at the path.
    """
    if pool_size < 2:
        raise ConfigError(f"a router needs a pool of at least 2 models, got {pool_size}: add one under pool.models")
    if not 0 < config.prior < 1:
        raise ConfigError(f"router.prior is {config.prior}: expected a probability strictly between 0 and 1")
    if config.hidden < 1:
        raise ConfigError(f"router.hidden is {config.hidden}: expected at least 1")
    peeks = [peek.value for peek in Peek]
    if config.peek not in peeks:
        hint = did_you_mean(config.peek, peeks)
        raise ConfigError(f"router.peek is {config.peek!r}: expected one of {', '.join(peeks)}{hint}")
    base = EncoderBase(config.encoder, config.encoder_revision, config.encoder_dtype, config.encoder_rank)
    body, tokenizer = load_encoder(base) if config.encoder else (None, None)
    kept = base if config.encoder and config.encoder_rank else None
    return RouterNetwork(body, tokenizer, pool_size, config.hidden, config.prior, Peek(config.peek), kept)


def load_encoder(base: EncoderBase) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder without its output layer (an adapter on frozen weights where `base` has a rank), and its tokenizer.

    Raises:
        ConfigError: there is no such model.
    """
    from roro_ray.engines.loading import load_model

    try:
        loaded = load_model(base.path, "cpu", base.dtype, base.revision)
    except EngineError as error:
        raise ConfigError(
            f"router.encoder is {base.path!r}: {error}. Expected a causal LM with its tokenizer in Hugging Face "
            "format, world:NAME for a shipped one, or nothing for scalar signals only"
        ) from error
    body = cast(PreTrainedModel, loaded.model.base_model)
    if not base.rank:
        return body.requires_grad_(True), loaded.tokenizer  # engines only infer, and freeze what they load
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=base.rank, lora_alpha=2 * base.rank, lora_dropout=0.0, target_modules="all-linear")
    inject_adapter_in_model(settings, body)
    for name, parameter in body.named_parameters():
        is_adapter = ".lora_" in name
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            parameter.data = parameter.data.float()
    return body, loaded.tokenizer




def copy_router(router: RouterNetwork) -> RouterNetwork:
    """Another router with the same weights; those that are frozen, and the tokenizer, it shares with the first."""
    shared = [parameter for parameter in router.parameters() if not parameter.requires_grad]
    return copy.deepcopy(router, {id(each): each for each in (*shared, router.tokenizer, router.pieces)})


def fill_router(router: RouterNetwork, state_dict: dict[str, torch.Tensor], source: str = "the given weights") -> None:
    """Copy weights into a router.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape; the router is left as it was.
    """
    own = router.learned_state()
    wrong = [f"{name} is missing" for name in own if name not in state_dict]
    wrong += [f"{name} is unknown" for name in state_dict if name not in own]
    wrong += [
        f"{name} is {list(tensor.shape)}, expected {list(own[name].shape)}"
        for name, tensor in state_dict.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{source} do not fit this router: {'; '.join(wrong[:3])}{' ..' if len(wrong) > 3 else ''}. "
            "Check pool.models, router.encoder and router.hidden against the run that saved them"
        )
    router.load_state_dict(state_dict, strict=False)  # frozen weights are not among them
