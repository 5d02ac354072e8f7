"""What RLlib's PPO trains: the router network itself, with a critic beside it, and the learner's optimizer.

The module wraps `routing.router.RouterNetwork`, so a trained policy is a router like any other. While episodes run,
texts are read with the cached reader that every router has. In the learner each row of a batch is one decision with all
the text before it; rows whose text another row continues are read in that row's pass (the encoder is causal), so that a
batch costs about the text of its episodes, not its square.

Axes: B rows (decisions), R texts, D decisions in a text, T tokens, C encoder width, F signals, N models of the pool.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.utils.numpy import convert_to_numpy
from ray.rllib.utils.torch_utils import convert_to_torch_tensor

from roro_ray.config import Config
from roro_ray.routing.draws import mix_seed
from roro_ray.routing.observation import FEATURE_NAMES
from roro_ray.routing.reader import TextReader
from roro_ray.routing.router import make_router

Batch = Mapping[str, Any]
_ROWS_PER_PASS = 32


class RouterModule(TorchRLModule, ValueFunctionAPI):
    """A router network and a critic; `model_config` holds the run's `config`.

    The first weights are those that GRPO begins with under the same seed. The critic shares the encoder with the policy
    and shapes it too: whether a query is going to be answered is what both must read from its text.
    """

    model_config: dict[str, Any]
    action_space: Discrete[Any]

    def setup(self) -> None:
        config: Config = self.model_config["config"]
        torch.manual_seed(mix_seed(config.seed, "router weights"))
        self.network = make_router(config.router, int(self.action_space.n))
        if config.router.gradient_checkpointing:
            self.network.checkpoint_activations()
        inputs = self.network.width + len(FEATURE_NAMES)
        hidden = config.router.hidden
        self.critic = torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, 1))
        self._cache_mb = config.router.cache_mb
        self._reader: TextReader | None = None
        self._written = -1

    def _forward(self, batch: Batch, **_: Any) -> dict[str, Any]:
        """Logits (B, N) while episodes run."""
        obs = batch[Columns.OBS]
        states_BC = None if self.network.body is None else self._recall(obs)
        return {Columns.ACTION_DIST_INPUTS: self.network.decide(states_BC, obs["signals"])}

    def _forward_train(self, batch: Batch, **_: Any) -> dict[str, Any]:
        obs = batch[Columns.OBS]
        states_BC = self._read(obs)
        logits_BN = self.network.decide(states_BC, obs["signals"])
        return {Columns.ACTION_DIST_INPUTS: logits_BN, Columns.EMBEDDINGS: self._join(states_BC, obs["signals"])}

    def compute_values(self, batch: Batch, embeddings: Any = None) -> torch.Tensor:
        """The critic's values (B)."""
        if embeddings is None:
            with torch.no_grad():
                obs = batch[Columns.OBS]
                embeddings = self._join(self._read(obs), obs["signals"])
        values_B: torch.Tensor = self.critic(embeddings).squeeze(-1)
        return values_B

    def _join(self, states_BC: torch.Tensor | None, signals_BF: torch.Tensor) -> torch.Tensor:
        if states_BC is None:
            return signals_BF
        normed_BC = F.layer_norm(states_BC.float(), (self.network.width,))
        return torch.cat([normed_BC, signals_BF], dim=-1)

    def _recall(self, obs: Batch) -> torch.Tensor:
        """States (B, C) through the reader, which knows the texts that these continue."""
        assert self.network.body is not None
        if self._reader is None:
            self._reader = TextReader(self.network.body, self._cache_mb)
        # torch counts writes to each tensor: new weights show here.
        written = sum(parameter._version for parameter in self.network.parameters())
        if written != self._written:
            self._reader.forget()
            self._written = written
        ids_BT, lengths_B = obs["text"].cpu().numpy(), obs["length"].cpu().numpy()[:, 0]
        texts = [tuple(row[:count].tolist()) for row, count in zip(ids_BT, lengths_B, strict=True)]
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        states_RC = self._reader.read(list(distinct))
        return states_RC[[distinct[text] for text in texts]]

    def _read(self, obs: Batch) -> torch.Tensor | None:
        """States (B, C) with their gradient, each text read once with all that it continues."""
        if self.network.body is None:
            return None
        ids_BT, lengths_B = obs["text"].cpu().numpy().astype(np.int32), obs["length"].cpu().numpy()[:, 0]
        home_B = find_homes(ids_BT, lengths_B)
        homes_R = np.unique(home_B)
        homes_R = homes_R[np.argsort(lengths_B[homes_R], kind="stable")]  # padding costs as much as text
        device = obs["signals"].device
        rows, found = [], []
        for part_R in np.split(homes_R, range(_ROWS_PER_PASS, len(homes_R), _ROWS_PER_PASS)):
            width = int(lengths_B[part_R].max())
            states_RTC = self.network.encode(torch.from_numpy(ids_BT[part_R, :width].astype(np.int64)).to(device))
            place = {int(home): index for index, home in enumerate(part_R)}
            mine = np.flatnonzero(np.isin(home_B, part_R))
            found.append(states_RTC[[place[int(home_B[row])] for row in mine], lengths_B[mine] - 1])
            rows.append(mine)
        order_B = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable")).to(device)
        return torch.cat(found)[order_B]

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        inference_only: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        """The learned weights: where the encoder's own stay frozen they do not travel."""
        state = {f"network.{name}": tensor for name, tensor in self.network.learned_state().items()}
        state |= {f"critic.{name}": tensor for name, tensor in self.critic.state_dict().items()}
        return dict(convert_to_numpy(state))

    def set_state(self, state: dict[str, Any]) -> None:
        self.load_state_dict(convert_to_torch_tensor(state), strict=False)


def find_homes(ids_BT: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
    """For each row the row whose text is, or continues, its own; the longest that there is (B)."""
    texts = [row[:count].tobytes() for row, count in zip(ids_BT, lengths_B, strict=True)]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    home_B = np.arange(len(texts))
    # Sorted, whatever continues a text comes right behind it.
    for row, after in zip(reversed(order[:-1]), reversed(order[1:]), strict=True):
        if texts[after].startswith(texts[row]):
            home_B[row] = home_B[after]
    return home_B


class RouterLearner(PPOTorchLearner):
    """PPO's learner with the router's two learning rates, which fall linearly over the training."""

    progress = 0.0

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        modules: Any = self._module
        module: RouterModule = modules[module_id].unwrapped()
        own: Config = module.model_config["config"]
        heads = [*module.network.head.parameters(), *module.critic.parameters()]
        groups: list[dict[str, Any]] = [{"params": heads, "lr": own.ppo.head_lr}]
        if module.network.body is not None:
            learned = [parameter for parameter in module.network.body.parameters() if parameter.requires_grad]
            groups.append({"params": learned, "lr": own.ppo.encoder_lr})
        self._first_rates = [float(group["lr"]) for group in groups]
        self._final = own.router.final_lr
        parameters = [parameter for group in groups for parameter in group["params"]]
        self.register_optimizer(module_id=module_id, optimizer=torch.optim.Adam(groups), params=parameters)

    def before_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        super().before_gradient_based_update(timesteps=timesteps)
        factor = 1 - (1 - self._final) * min(self.progress, 1.0)
        for optimizer in self._named_optimizers.values():
            for group, rate in zip(optimizer.param_groups, self._first_rates, strict=True):
                group["lr"] = rate * factor


class EpisodeSums(RLlibCallback):
    """Adds up what the episodes that ended came to, for the iteration's metrics."""

    def on_episode_end(self, *, episode: Any, metrics_logger: Any = None, **_: Any) -> None:
        # Out of the info: the learner has no use for it, and it would travel there.
        info = episode.get_infos(-1)
        trajectory = info.pop("trajectory", None)
        found = {"episodes": 1.0, "failed": float("failure" in info)}
        if not found["failed"]:
            found |= {"reward": float(episode.get_return()), "outcome": float(trajectory.correct)}
            found |= {"large_share": trajectory.large_share, "steps": float(len(trajectory.steps))}
        for name, value in found.items():
            metrics_logger.log_value(("routing", name), value, reduce="sum")
