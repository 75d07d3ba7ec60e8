import math
from typing import Any

import pytest
import torch
from envs import ACTION_SPACES, MASKABLE, OBSERVATION_SPACES, AttentionExtractor, NoisyExtractor, make
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_trpo_ext import (
    NPG,
    TRPO,
    MaskableTRPO,
    PPOClip,
    PPOPenalty,
    RecurrentNPG,
    RecurrentPPOClip,
    RecurrentTRPO,
)

ARMS = {
    "trpo": (TRPO, {"critic": "gauss_newton"}),
    "trpo-adam-chunks": (TRPO, {"critic": "adam", "fisher_chunk_size": 10, "batch_size": 16, "sub_sampling_factor": 3}),
    "trpo-max": (TRPO, {"trust_region": "max"}),
    "npg": (NPG, {"target_kl": 1e-3}),
    "ppo": (PPOClip, {"batch_size": 16, "n_epochs": 2, "max_kl": 1.0}),
    "ppo-penalty": (PPOPenalty, {"batch_size": 16, "n_epochs": 2, "target_kl": 1.0}),
    "recurrent": (RecurrentTRPO, {}),
    "recurrent-adam-chunks": (
        RecurrentTRPO,
        {"critic": "adam", "batch_size": 16, "fisher_chunk_size": 12, "curvature_samples": 15},
    ),
    "recurrent-npg": (RecurrentNPG, {"target_kl": 1e-3}),
    "recurrent-ppo": (RecurrentPPOClip, {"batch_size": 16, "n_epochs": 2, "max_kl": 1.0}),
    "maskable": (MaskableTRPO, {}),
    "maskable-adam-chunks": (MaskableTRPO, {"critic": "adam", "batch_size": 16, "fisher_chunk_size": 10}),
}


def check_learns(model: Any) -> None:
    """Two updates: everything finite, something moved, KL inside the region."""
    before = [param.detach().clone() for param in model.policy.parameters()]
    model.learn(64)
    after = list(model.policy.parameters())
    assert all(param.isfinite().all() for param in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    log = model.logger.name_to_value
    assert all(math.isfinite(value) for key, value in log.items() if key != "train/explained_variance")
    radius = log.get("train/target_kl", 1.0) * (2 if isinstance(model, NPG) else 1)  # NPG trusts its quadratic model
    assert 0 <= log["train/kl_divergence_loss"] <= radius
    assert log["train/kl_max"] >= log["train/kl_divergence_loss"]
    if getattr(model, "trust_region", "") == "max":
        assert log["train/kl_max"] <= radius


ACTIONS = sorted(ACTION_SPACES, key=lambda action: action not in MASKABLE)
ALL = {  # masks are for actions that can be counted
    (arm, action, observation): (i + j + k) % 3 == 0
    for i, arm in enumerate(ARMS)
    for j, action in enumerate(ACTIONS)
    for k, observation in enumerate(OBSERVATION_SPACES)
    if action in MASKABLE or "maskable" not in arm
}
"""Every combination, and whether it is one of the third that is run always."""


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2)], ids=["arm-action", "arm-observation", "action-observation"])
def test_every_pair_is_in_the_third_that_is_run_always(axes: tuple[int, int]) -> None:
    pairs = {tuple(each[axis] for axis in axes) for each in ALL}
    assert {tuple(each[axis] for axis in axes) for each, always in ALL.items() if always} == pairs
    assert sum(ALL.values()) == len(ALL) // 3


@pytest.mark.parametrize(
    ("arm", "action", "observation"),
    [pytest.param(*each, marks=[] if always else pytest.mark.slow) for each, always in ALL.items()],
)
def test_every_space(arm: str, action: str, observation: str) -> None:
    algorithm, options = ARMS[arm]
    try:
        model = make(algorithm, action, observation, **options)
    except ValueError as refusal:  # newer versions of torch cannot build sb3-contrib's LSTM for this space
        assert "recurrent" in arm
        assert observation == "multidiscrete"
        assert "FlattenObservation" in str(refusal)
        return
    check_learns(model)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if "maskable" not in arm])
@pytest.mark.parametrize("options", [{}, {"squash_output": True}, {"use_expln": True}, {"full_std": False}], ids=str)
def test_gsde(arm: str, options: dict[str, Any]) -> None:
    algorithm, arguments = ARMS[arm]
    check_learns(
        make(algorithm, "box", use_sde=True, sde_sample_freq=4, policy_kwargs=options, ent_coef=0.01, **arguments)
    )


@pytest.mark.parametrize("arm", [arm for arm in ARMS if "maskable" not in arm])
@pytest.mark.parametrize("extractor", [NoisyExtractor, AttentionExtractor])
@pytest.mark.parametrize("shared", [True, False])
def test_custom_extractors(arm: str, extractor: type, shared: bool) -> None:
    algorithm, arguments = ARMS[arm]
    options = {"features_extractor_class": extractor, "share_features_extractor": shared}
    check_learns(make(algorithm, "box", policy_kwargs=options, **arguments))


@pytest.mark.parametrize("arm", ["trpo", "trpo-adam-chunks", "npg", "ppo"])
def test_a_custom_rollout_buffer(arm: str) -> None:
    class Recording(RolloutBuffer):
        def __init__(self, *args: Any, note: str, **kwargs: Any) -> None:
            self.note, self.added = note, 0
            super().__init__(*args, **kwargs)

        def add(self, *args: Any, **kwargs: Any) -> None:
            self.added += 1
            super().add(*args, **kwargs)

    algorithm, arguments = ARMS[arm]
    model = make(algorithm, rollout_buffer_class=Recording, rollout_buffer_kwargs={"note": "x"}, **arguments)
    check_learns(model)
    assert (model.rollout_buffer.note, model.rollout_buffer.added) == ("x", 64)


def test_the_sub_sampled_update_with_dict_observations_improves() -> None:
    model = make(TRPO, "box", "dict", sub_sampling_factor=5)
    model.learn(32)
    assert model.logger.name_to_value["train/improvement"] > 0
