from typing import Any

import pytest
import torch
from envs import make, with_rollout

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty, RecurrentPPOClip, RecurrentTRPO

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gauss-newton": (TRPO, {"action": "box", "critic": "gauss_newton"}),
    "adam": (TRPO, {"action": "multidiscrete", "critic": "adam", "batch_size": 16}),
    "dict": (TRPO, {"action": "multibinary", "observation": "dict"}),
    "gsde": (TRPO, {"action": "box", "use_sde": True}),
    "chunks": (TRPO, {"action": "discrete", "fisher_chunk_size": 5, "sub_sampling_factor": 2}),
    "gsde-adam": (TRPO, {"action": "box", "use_sde": True, "critic": "adam", "batch_size": 16}),
    "npg": (NPG, {"action": "box"}),
    "ppo": (PPOClip, {"action": "box", "batch_size": 16}),
    "ppo-penalty": (PPOPenalty, {"action": "multidiscrete", "batch_size": 16}),
    "recurrent": (RecurrentTRPO, {"action": "box", "curvature_samples": 10}),
    "recurrent-ppo": (RecurrentPPOClip, {"action": "box", "batch_size": 16}),
    "maskable": (MaskableTRPO, {"action": "multidiscrete"}),
    "ppo-gsde-dict": (PPOClip, {"action": "box", "observation": "dict", "use_sde": True, "batch_size": 16}),
}


def trained(case: str, seed: int) -> list[torch.Tensor]:
    algorithm, options = CASES[case]
    return list(make(algorithm, **{**options, "seed": seed}).learn(64).policy.parameters())


@pytest.mark.parametrize("case", CASES)
def test_the_seed_determines_the_parameters(case: str) -> None:
    first, again, other = trained(case, 3), trained(case, 3), trained(case, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_an_update_draws_nothing_from_torch(case: str) -> None:
    algorithm, options = CASES[case]
    model = with_rollout(make(algorithm, **options))
    before = torch.get_rng_state()
    model.train()
    assert torch.equal(before, torch.get_rng_state())
