"""The query-level router: before the first step, send the whole query to the small or to the large model.

The classic baseline (RouteLLM's kind): a predictor of whether the small model alone will fail, here logistic
regression on what the router's own encoder says of the query, trained on the collected trajectories in which
the small model worked alone. It sees the query and nothing of the solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from roro_ray.engines.loading import load_model
from roro_ray.errors import DataError
from roro_ray.evaluation.bootstrap import Floats

_RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_FOLDS = 4
_NEWTON_STEPS = 30


@dataclass(frozen=True, slots=True)
class EncodedQueries:
    """States of queries under an encoder, shape (queries, features), and what reading each query costs in FLOPs."""

    states_QF: Floats
    flops_Q: Floats


class QueryEncoder:
    """A frozen causal language model that turns a query into numbers: its last state beside its mean state.

    Raises:
        EngineError: there is no model at the path.
    """

    def __init__(self, path: str, dtype: str = "float32") -> None:
        loaded = load_model(path, "cpu", dtype)
        self._tokenizer, self._model = loaded.tokenizer, loaded.model.base_model
        self._flops_per_token = 2.0 * sum(p.numel() for p in self._model.parameters())

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 128) -> EncodedQueries:
        """Encode texts; the state of a text does not depend on the others in its batch."""
        states, tokens = [], []
        for start in range(0, len(texts), batch_size):
            rows = [self._tokenizer(text)["input_ids"] for text in texts[start : start + batch_size]]
            longest = max(len(row) for row in rows)
            # Padded on the right: under causal attention no real token ever sees the padding.
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            hidden = self._model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
            length = mask.sum(1)
            last = hidden[torch.arange(len(rows)), length - 1]
            mean = (hidden * mask[..., None]).sum(1) / length[:, None]
            states.append(torch.cat([last, mean], dim=1).double().numpy())
            tokens.extend(length.tolist())
        return EncodedQueries(np.concatenate(states), self._flops_per_token * np.asarray(tokens, dtype=float))


@dataclass(frozen=True, slots=True)
class FailurePredictor:
    """Logistic regression on standardised states: P(the small model alone fails)."""

    mean_F: Floats
    scale_F: Floats
    weights_F: Floats
    bias: float

    def predict(self, states_QF: Floats) -> Floats:
        """P(fail) of each query."""
        return _sigmoid((states_QF - self.mean_F) / self.scale_F @ self.weights_F + self.bias)


def train_predictor(states_QF: Floats, failed_Q: Sequence[bool]) -> FailurePredictor:
    """Fit the predictor; the ridge is chosen by cross-validated log-likelihood, folds by row.

    Raises:
        DataError: there is no row, or the numbers of states and of labels differ.
    """
    y_Q = np.asarray(failed_Q, dtype=float)
    if len(y_Q) == 0 or len(y_Q) != len(states_QF):
        raise DataError(
            f"cannot train the query-level router: got {len(states_QF)} queries and {len(y_Q)} outcomes of the small "
            "model alone; expected one outcome per query and at least one. Collect with the strategy fixed:0"
        )
    mean_F, scale_F = states_QF.mean(0), np.maximum(states_QF.std(0), 1e-6)
    x_QF = (states_QF - mean_F) / scale_F
    fold_Q = np.arange(len(y_Q)) % _FOLDS
    losses = []
    for ridge in _RIDGES if len(y_Q) >= 2 * _FOLDS else ():
        loss = 0.0
        for fold in range(_FOLDS):
            kept, held = fold_Q != fold, fold_Q == fold
            weights_F, bias = fit_logistic(x_QF[kept], y_Q[kept], ridge)
            p = np.clip(_sigmoid(x_QF[held] @ weights_F + bias), 1e-9, 1 - 1e-9)
            loss -= float(np.sum(y_Q[held] * np.log(p) + (1 - y_Q[held]) * np.log(1 - p)))
        losses.append(loss)
    ridge = _RIDGES[int(np.argmin(losses))] if losses else _RIDGES[-1]
    weights_F, bias = fit_logistic(x_QF, y_Q, ridge)
    return FailurePredictor(mean_F, scale_F, weights_F, bias)


def fit_logistic(x_QF: Floats, y_Q: Floats, ridge: float) -> tuple[Floats, float]:
    """Maximise the log-likelihood minus ridge/2 |weights|^2 by Newton's method; the bias is (almost) not shrunk."""
    features = np.concatenate([x_QF, np.ones((len(x_QF), 1))], axis=1)
    # The bias gets a trace of ridge too, so that data of one class have a finite optimum.
    penalty = np.full(features.shape[1], ridge)
    penalty[-1] = 1e-3
    theta = np.zeros(features.shape[1])
    for _ in range(_NEWTON_STEPS):
        p = _sigmoid(features @ theta)
        gradient = features.T @ (p - y_Q) + penalty * theta
        hessian = (features * (p * (1 - p))[:, None]).T @ features + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        theta -= step * min(1.0, 5.0 / max(float(np.abs(step).max()), 1e-12))
        if float(np.abs(step).max()) < 1e-8:
            break
    return theta[:-1], float(theta[-1])


def _sigmoid(x: Floats) -> Floats:
    value: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return value
