"""Batches of a recurrent policy: samples in sequences, padded for the policy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor

from sb3_trpo_ext.rollout.batch import Batch

PADDED = 2
"""Most places of a forward pass, in multiples of its samples.

Where sequences of every length are padded to the longest, their number says nothing of what a pass costs: 256 episodes
of one step beside one of 256 are 512 samples at 65 792 places. Passes over sequences of similar length keep to this.
"""


@dataclass(frozen=True)
class Grid:
    """Where S sequences, padded to the longest of L steps, find their samples.

    Attributes:
        firsts: The sample that each sequence begins with, ``(S,)``.
        rows: The sample at each place, sequence after sequence, ``(S · L,)``; behind the end of a sequence its last
            sample is repeated, so that the policy sees nothing that it could not meet.
        kept: The places of the samples, ``(N,)``; None if there is no padding.
    """

    firsts: Tensor
    rows: Tensor
    kept: Tensor | None


@dataclass(frozen=True, kw_only=True)
class SequenceBatch(Batch):
    """N samples in sequences that the policy runs through, each from the hidden state that the rollout had there.

    Whatever a mean, a KL divergence, a product or a statistic sees are the N samples: padding is added to what the
    policy is given, and dropped from what it returns. `split` bounds it, also where no size is asked for; `inputs`,
    `padded`, `unpadded` and `distribution` are those of a single forward pass over the whole batch.

    Attributes:
        starts: Whether a sequence begins at a sample, ``(N,)``.
        resets: Whether an episode begins there (1) or not (0), ``(N,)``; a sequence begins there too.
        states: Hidden and cell states of the actor's and of the critic's LSTM before the sample, ``(N, layers, H)``
            each.
    """

    starts: Tensor
    resets: Tensor
    states: tuple[Tensor, ...]

    is_drawn_evenly: ClassVar[bool] = False

    def __getitem__(self, index: slice | Tensor) -> SequenceBatch:
        """A part of the batch; a sequence that it cuts goes on in the part from the hidden state of the rollout."""
        positions = torch.arange(len(self), device=self.starts.device)[index]
        follows = torch.zeros_like(positions, dtype=torch.bool)
        follows[1:] = positions[1:] == positions[:-1] + 1
        part: Any = super().__getitem__(index)
        return replace(part, starts=part.starts | ~follows)

    @cached_property
    def _firsts(self) -> Tensor:
        """The sample that each sequence begins with, ``(S,)``."""
        return torch.nonzero(self.starts).flatten()

    @cached_property
    def _lengths(self) -> Tensor:
        """The samples of each sequence, ``(S,)``."""
        return torch.diff(self._firsts, append=self._firsts.new_tensor([len(self)]))

    @cached_property
    def places(self) -> int:
        """S · L: what a forward pass over the whole batch goes through."""
        return len(self._lengths) * int(self._lengths.max())

    @cached_property
    def _grid(self) -> Grid:
        firsts, lengths = self._firsts, self._lengths
        steps = torch.arange(int(lengths.max()), device=firsts.device)
        rows = (firsts[:, None] + torch.minimum(steps, lengths[:, None] - 1)).flatten()
        kept = torch.nonzero((steps < lengths[:, None]).flatten()).flatten()
        return Grid(firsts, rows, kept if len(kept) < len(rows) else None)

    @property
    def inputs(self) -> PyTorchObs:
        """The padded observations, ``(S · L, ...)``, on the policy's device."""
        rows, device = self._grid.rows, self.weights.device
        if isinstance(self.observations, dict):
            return {key: value[rows.to(value.device)].to(device) for key, value in self.observations.items()}
        return self.observations[rows.to(self.observations.device)].to(device)

    def padded(self, rows: Tensor) -> Tensor:
        """Samples ``(N, ...)`` -> ``(S · L, ...)``."""
        return rows[self._grid.rows]

    def unpadded(self, rows: Tensor) -> Tensor:
        """What the policy returned, ``(S · L, ...)`` -> the rows of the samples, ``(N, ...)``."""
        return rows if self._grid.kept is None else rows[self._grid.kept]

    def distribution(self, policy: ActorCriticPolicy) -> Distribution:
        """π(·|s) after what came before in the sequence; see `Batch.distribution`."""
        states, episode_starts = self._initial(policy)
        result: Any = policy.get_distribution(self.inputs, states.pi, episode_starts)  # type: ignore[call-arg]
        return result[0]

    def values(self, policy: ActorCriticPolicy) -> Tensor:
        """V(s), ``(N,)``; as many forward passes as `split` makes parts."""
        return self.in_order([part._values(policy) for part in self.split(None)])

    def _values(self, policy: ActorCriticPolicy) -> Tensor:
        """V(s) in one forward pass."""
        states, episode_starts = self._initial(policy)
        values = policy.predict_values(self.inputs, states.vf, episode_starts)  # type: ignore[call-arg]
        return self.unpadded(values.flatten())

    def evaluate_actions(self, policy: ActorCriticPolicy) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Batch.evaluate_actions`; as many forward passes as `split` makes parts."""
        answers = [part._evaluate_actions(policy) for part in self.split(None)]
        values, log_probs, entropies = zip(*answers, strict=True)
        known = [entropy for entropy in entropies if entropy is not None]
        return self.in_order(values), self.in_order(log_probs), self.in_order(known) if known else None

    def _evaluate_actions(self, policy: ActorCriticPolicy) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same in one forward pass."""
        states, episode_starts = self._initial(policy)
        values, log_prob, entropy = policy.evaluate_actions(
            self.inputs,
            self.padded(self.actions),
            states,  # type: ignore[call-arg]
            episode_starts,
        )
        return (
            self.unpadded(values.flatten()),
            self.unpadded(log_prob),
            None if entropy is None else self.unpadded(entropy),
        )

    def _initial(self, policy: ActorCriticPolicy) -> tuple[RNNStates, Tensor]:
        """The states that the sequences begin with, ``(layers, S, H)``, and episode starts ``(S · L,)``.

        States are zero already where an episode begins. As that can only be at the first step of a sequence,
        sb3-contrib's LSTM need not be told: it would go through the sequence step by step.
        """
        firsts, rows = self._grid.firsts, self._grid.rows
        begins = self.resets[firsts].bool()[:, None, None]
        hidden_pi, cell_pi, hidden_vf, cell_vf = (
            torch.where(begins, 0.0, state[firsts]).transpose(0, 1).contiguous() for state in self.states
        )
        known = getattr(policy, "_process_sequence", None) is RecurrentActorCriticPolicy._process_sequence
        episode_starts = torch.zeros_like(self.resets[rows]) if known else self.resets[rows]
        return RNNStates((hidden_pi, cell_pi), (hidden_vf, cell_vf)), episode_starts

    def split(self, size: int | None) -> list[SequenceBatch]:
        """Parts of whole sequences of similar length, in no order of samples: see `in_order`.

        A part has at most ``size`` places with its padding, and at most `PADDED` times as many as samples; one
        sequence is a part at any length.
        """
        if self._fits(len(self._lengths), int(self._lengths.max()), len(self), size):
            return [self]
        return [self[rows] for rows in self._parts(size)]

    @staticmethod
    def _fits(sequences: int, longest: int, samples: int, size: int | None) -> bool:
        places = sequences * longest
        return places <= PADDED * samples and (size is None or places <= size)

    def _parts(self, size: int | None) -> list[Tensor]:
        """The samples of each part, in the order of the batch.

        From the longest sequence to the shortest, each joins the last part as long as that stays within its bounds.
        """
        lengths: NDArray[np.int64] = self._lengths.cpu().numpy()
        part_of = np.zeros(len(lengths), dtype=np.int64)
        part, sequences, longest, samples = -1, 0, 0, 0
        for sequence in np.argsort(-lengths, kind="stable").tolist():
            length = int(lengths[sequence])
            if part < 0 or not self._fits(sequences + 1, longest, samples + length, size):
                part, sequences, longest, samples = part + 1, 0, length, 0
            part_of[sequence] = part
            sequences, samples = sequences + 1, samples + length
        part_of_samples = part_of.repeat(lengths)
        order = torch.from_numpy(np.argsort(part_of_samples, kind="stable")).to(self.starts.device)
        return list(order.split(np.bincount(part_of_samples).tolist()))

    def in_order(self, rows: Sequence[Tensor], size: int | None = None) -> Tensor:
        """Rows of the parts of ``split(size)`` -> rows of the batch, ``(N, ...)``."""
        if len(rows) == 1:
            return rows[0]
        order = torch.cat(self._parts(size))
        return torch.cat(list(rows))[torch.argsort(order)]

    def _drawn(self, size: int) -> Batch:
        """Whole sequences, drawn without replacement until they have ``size`` samples."""
        sequences = self._sequences()
        order = np.random.permutation(len(sequences))
        enough = int(np.searchsorted(np.cumsum([len(sequences[i]) for i in order]), size)) + 1
        return self[torch.cat([sequences[i] for i in np.sort(order[:enough])])]

    def _sequences(self) -> list[Tensor]:
        """The samples of each sequence."""
        cuts = self._firsts[1:].tolist()
        return list(torch.arange(len(self), device=self.starts.device).tensor_split(cuts))
