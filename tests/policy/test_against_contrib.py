import copy
from typing import Any

import numpy as np
import pytest
import sb3_contrib
import torch
from envs import in_float64, make, with_rollout
from sb3_contrib.common.utils import conjugate_gradient_solver
from stable_baselines3.common.distributions import kl_divergence
from torch import Tensor

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.core.natural_step import boundary_scale, natural_direction
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import whole_rollout

STEPS = 300


def doubled(batch: Batch) -> Batch:
    return Batch(**batch.rows(lambda column: column.double() if column.is_floating_point() else column))


def our_step(model: Any, batch: Batch) -> Tensor:
    problem = PolicyProblem(model.policy, batch)
    fisher = problem.fisher(model.cg_damping * model._action_dimensions())
    direction = natural_direction(fisher, problem, max_steps=STEPS, residual_tol=1e-14)
    return boundary_scale(direction.curvature, model.trust_region_radius()) * direction.x


def their_step(model: Any, batch: Batch) -> Tensor:
    """The full step of sb3_contrib.TRPO by its own functions."""
    contrib = sb3_contrib.TRPO("MlpPolicy", model.env, device="cpu", n_steps=model.n_steps, _init_setup_model=False)
    contrib.policy = model.policy
    old = copy.copy(model.policy.get_distribution(batch.observations))
    old_torch = old.distribution
    if isinstance(old_torch, list):
        old.distribution = [type(d)(logits=d.logits.detach()) for d in old_torch]
    elif hasattr(old_torch, "logits"):
        old.distribution = type(old_torch)(logits=old_torch.logits.detach())
    else:
        old.distribution = type(old_torch)(old_torch.loc.detach(), old_torch.scale.detach())
    distribution = model.policy.get_distribution(batch.observations)
    objective = (batch.advantages * torch.exp(distribution.log_prob(batch.actions) - batch.old_log_prob)).mean()
    kl = kl_divergence(distribution, old).mean()
    params, g, grad_kl, _ = contrib._compute_actor_grad(kl, objective)

    def product(vector: Tensor) -> Tensor:
        return contrib.hessian_vector_product(params, grad_kl, vector)

    direction = conjugate_gradient_solver(product, g, max_iter=STEPS, residual_tol=1e-26)
    return torch.sqrt(2 * contrib.target_kl / direction.dot(product(direction))) * direction


@pytest.mark.parametrize("action", ["box", "box2d", "discrete", "multidiscrete", "multibinary", "gsde"])
def test_full_step_is_contribs(action: str) -> None:
    model = make(TRPO, action.replace("gsde", "box"), use_sde=action == "gsde", policy_kwargs={"net_arch": [8]})
    with_rollout(model)
    in_float64(model)
    with torch.no_grad():
        for param in model.policy.parameters():
            param.add_(0.1 * torch.randn_like(param))
    batch = doubled(whole_rollout(model.rollout_buffer, model.action_space))
    ours, theirs = our_step(model, batch), their_step(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("action", "dimensions"), [("box", 3), ("box2d", 4), ("multibinary", 3), ("discrete", 1)])
def test_the_papers_reading_is_a_radius_without_dimensions(action: str, dimensions: int) -> None:
    assert make(TRPO, action).trust_region_radius() == pytest.approx(0.01 * dimensions)
    assert make(TRPO, action, kl_per_action_dim=False).trust_region_radius() == pytest.approx(0.01)


@pytest.mark.parametrize("action", ["box", "multidiscrete"])
def test_the_adam_critic_is_contribs(action: str) -> None:
    ours = make(TRPO, action, critic="adam", batch_size=16)
    theirs = sb3_contrib.TRPO("MlpPolicy", ours.env, n_steps=32, batch_size=16, device="cpu", seed=0)
    theirs.policy.load_state_dict(ours.policy.state_dict())
    with_rollout(ours)
    theirs.rollout_buffer = copy.deepcopy(ours.rollout_buffer)
    np.random.seed(3)
    theirs._logger = ours.logger
    theirs.train()
    np.random.seed(3)
    np.random.permutation(ours.n_steps * ours.n_envs)  # theirs shuffles the samples of the policy step too
    ours.train()
    for name in ("mlp_extractor.value_net.0.weight", "mlp_extractor.value_net.2.bias", "value_net.weight"):
        torch.testing.assert_close(ours.policy.state_dict()[name], theirs.policy.state_dict()[name])
