"""Finished trajectories as tensors for the router's learner.

Axes: B trajectories, T text tokens, D decisions, F features, N models of the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from roro_ray.config import STEP_DELIMITER
from roro_ray.errors import DataError
from roro_ray.routing.observation import FEATURE_NAMES
from roro_ray.routing.router import PieceTokenizer, RouterNetwork
from roro_ray.types import Query, Trajectory


@dataclass(frozen=True, slots=True)
class RouterBatch:
    """Right-padded texts with the decisions taken in them.

    `boundaries_BD` is the position of the last token before each decision (-1 where a row has fewer);
    `versions_BD` the router version that decided (-1 for another policy: mask it out for on-policy learning).
    """

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    boundaries_BD: torch.Tensor
    features_BDF: torch.Tensor
    actions_BD: torch.Tensor
    old_log_probs_BD: torch.Tensor
    decision_mask_BD: torch.Tensor
    versions_BD: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids_BT)

    def select(self, rows: torch.Tensor | slice) -> RouterBatch:
        """Some of the rows, trimmed to the longest text and the most decisions among them."""
        mask_BT, decision_mask_BD = self.mask_BT[rows], self.decision_mask_BD[rows]
        tokens = max(int(mask_BT.sum(1).max()) if len(mask_BT) else 1, 1)
        decisions = max(int(decision_mask_BD.sum(1).max()) if len(mask_BT) else 1, 1)
        return RouterBatch(
            self.ids_BT[rows, :tokens],
            mask_BT[:, :tokens],
            self.boundaries_BD[rows, :decisions],
            self.features_BDF[rows, :decisions],
            self.actions_BD[rows, :decisions],
            self.old_log_probs_BD[rows, :decisions],
            decision_mask_BD[:, :decisions],
            self.versions_BD[rows, :decisions],
        )

    def to(self, device: torch.device | str) -> RouterBatch:
        """The same batch on another device."""
        return RouterBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def encode_trajectories(
    router: RouterNetwork, queries: Mapping[str, Query] | Sequence[Query], trajectories: Sequence[Trajectory]
) -> RouterBatch:
    """The text and the decisions of finished trajectories; the last step's own text is never read, so left out.

    Args:
        queries: by id, or a sequence that holds every trajectory's query (in any order).

    Raises:
        DataError: a trajectory has no steps, its query is not among `queries`, or its features are not those
            of this version.
    """
    by_id = queries if isinstance(queries, Mapping) else {query.id: query for query in queries}
    for trajectory in trajectories:
        _check(trajectory, by_id)
    rows = [_read_pieces(router.pieces, by_id[t.query_id], t) for t in trajectories]
    batch, tokens = len(rows), max((len(ids) for ids, _ in rows), default=0)
    decisions = max((len(t.steps) for t in trajectories), default=0)
    # A router without an encoder has empty texts; one pad column keeps the shapes alike.
    ids_BT = torch.zeros(batch, max(tokens, 1), dtype=torch.long)
    mask_BT = torch.zeros(batch, max(tokens, 1), dtype=torch.bool)
    boundaries_BD = torch.full((batch, decisions), -1)
    features_BDF = torch.zeros(batch, decisions, len(FEATURE_NAMES))
    actions_BD = torch.zeros(batch, decisions, dtype=torch.long)
    old_log_probs_BD = torch.zeros(batch, decisions)
    decision_mask_BD = torch.zeros(batch, decisions, dtype=torch.bool)
    versions_BD = torch.full((batch, decisions), -1)
    for row, ((ids, boundaries), trajectory) in enumerate(zip(rows, trajectories, strict=True)):
        count = len(trajectory.steps)
        ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask_BT[row, : len(ids)] = True
        boundaries_BD[row, :count] = torch.tensor(boundaries)
        features_BDF[row, :count] = torch.tensor([step.features for step in trajectory.steps])
        actions_BD[row, :count] = torch.tensor([step.decision.model for step in trajectory.steps])
        old_log_probs_BD[row, :count] = torch.tensor([step.decision.log_prob for step in trajectory.steps])
        decision_mask_BD[row, :count] = True
        versions_BD[row, :count] = torch.tensor([step.decision.version for step in trajectory.steps])
    return RouterBatch(
        ids_BT, mask_BT, boundaries_BD, features_BDF, actions_BD, old_log_probs_BD, decision_mask_BD, versions_BD
    )


def _check(trajectory: Trajectory, by_id: Mapping[str, Query]) -> None:
    if trajectory.query_id not in by_id:
        raise DataError(
            f"trajectory {trajectory.id}: its query {trajectory.query_id!r} is not among the {len(by_id)} given; "
            "pass the queries that the trajectories were rolled out on"
        )
    if not trajectory.steps:
        raise DataError(f"trajectory {trajectory.id} has no steps, so no decision to learn from: leave it out")
    for index, step in enumerate(trajectory.steps):
        if len(step.features) != len(FEATURE_NAMES):
            raise DataError(
                f"trajectory {trajectory.id}, step {index}: got {len(step.features)} features, expected the "
                f"{len(FEATURE_NAMES)} of this version ({', '.join(FEATURE_NAMES)}); roll it out again"
            )


def _read_pieces(pieces: PieceTokenizer, query: Query, trajectory: Trajectory) -> tuple[list[int], list[int]]:
    """Token ids up to the last decision, and the position of the last token before each decision."""
    ids = list(pieces.encode(query.text + STEP_DELIMITER))
    boundaries = [len(ids) - 1]
    for step in trajectory.steps[:-1]:
        ids.extend(pieces.encode(step.text + STEP_DELIMITER))
        boundaries.append(len(ids) - 1)
    return ids, boundaries


def score_decisions(router: RouterNetwork, batch: RouterBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every action taken and entropy (nats) of every decision, [B, D] each; 0 where masked."""
    logits_BDN = router(batch.ids_BT, batch.mask_BT, batch.boundaries_BD, batch.features_BDF)
    log_probs_BDN = torch.log_softmax(logits_BDN.float(), dim=-1)
    log_probs_BD = log_probs_BDN.gather(-1, batch.actions_BD.unsqueeze(-1)).squeeze(-1)
    entropy_BD = -(log_probs_BDN.exp() * log_probs_BDN).sum(-1)
    zeros_BD = torch.zeros_like(entropy_BD)
    return (
        torch.where(batch.decision_mask_BD, log_probs_BD, zeros_BD),
        torch.where(batch.decision_mask_BD, entropy_BD, zeros_BD),
    )
