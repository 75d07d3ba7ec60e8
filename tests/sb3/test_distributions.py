from typing import Any

import pytest
import torch
from envs import ACTION_SPACES, in_float64, make
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common import distributions as sb3
from torch import Tensor, nn
from torch.distributions import kl_divergence

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.core.vectors import flatten, unflatten
from sb3_trpo_ext.sb3.batch import Batch
from sb3_trpo_ext.sb3.distributions import family_of
from sb3_trpo_ext.sb3.policy_problem import PolicyProblem

GSDE = {"gsde": {}, "gsde-expln": {"use_expln": True}, "gsde-squashed": {"squash_output": True}}
KINDS = [*ACTION_SPACES, *GSDE]


def model_of(kind: str) -> Any:
    """A tiny model in float64 with perturbed parameters, so that nothing is at its special initial value."""
    options: dict[str, Any] = {"policy_kwargs": {"net_arch": [5], **GSDE.get(kind, {})}}
    model = make(TRPO, kind if kind in ACTION_SPACES else "box", use_sde=kind in GSDE, **options)
    in_float64(model)
    with torch.no_grad():
        for param in model.policy.parameters():
            param.add_(0.2 * torch.randn_like(param))
    return model


def batch_of(model: Any, size: int = 9) -> Batch:
    """On-policy samples with random advantages, in float64."""
    observations = torch.randn(size, 5, dtype=torch.float64)
    with torch.no_grad():
        if model.use_sde:
            model.policy.reset_noise(size)
        distribution = model.policy.get_distribution(observations)
        actions = distribution.sample()
        log_prob = distribution.log_prob(actions)
    noise = torch.randn(2, size, dtype=torch.float64)
    weights = torch.full((size,), 1 / size, dtype=torch.float64)
    return Batch(observations, actions, log_prob, noise[0], noise[1], noise[1], weights)


def torch_kl(old: Any, new: Any) -> Tensor:
    """torch's own KL of the same distributions, summed over action dimensions."""
    if isinstance(old, list):
        return sum(kl_divergence(p, q) for p, q in zip(old, new, strict=True))  # type: ignore[return-value]
    kl = kl_divergence(old, new)
    return kl.sum(dim=1) if kl.ndim == 2 else kl


@pytest.mark.parametrize("kind", KINDS)
def test_kl_is_joint_with_the_old_policy_first(kind: str) -> None:
    model = model_of(kind)
    batch = batch_of(model)
    distribution = model.policy.get_distribution(batch.observations)
    family, old_torch = family_of(distribution), distribution.distribution
    old = family.coordinates(distribution).detach()
    with torch.no_grad():
        for param in model.policy.parameters():
            param.add_(0.3 * torch.randn_like(param))
    distribution = model.policy.get_distribution(batch.observations)
    new = family.coordinates(distribution)
    torch.testing.assert_close(family.kl(old, new), torch_kl(old_torch, distribution.distribution))
    assert (family.kl(old, new) > 0).all()
    assert torch.equal(family.kl(old, old), torch.zeros(len(batch), dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_product_is_the_hessian_of_the_kl(kind: str) -> None:
    model = model_of(kind)
    batch = batch_of(model)
    problem = PolicyProblem(model.policy, batch)
    params = list(problem.gradients())
    names = [name for name, param in model.policy.named_parameters() if any(param is p for p in params)]
    distribution = model.policy.get_distribution(batch.observations)
    family = family_of(distribution)
    old = family.coordinates(distribution).detach()

    class Coordinates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = model.policy

        def forward(self, observations: Tensor) -> Tensor:
            return family.coordinates(self.policy.get_distribution(observations))

    def mean_kl(vector: Tensor) -> Tensor:
        values = {f"policy.{name}": value for name, value in zip(names, unflatten(vector, params), strict=True)}
        return family.kl(old, torch.func.functional_call(Coordinates(), values, (batch.observations,))).mean()

    theta = flatten(params).detach()
    dense = torch.autograd.functional.hessian(mean_kl, theta)
    product = problem.fisher(params, damping=0.0)
    matrix = torch.stack([product(row) for row in torch.eye(len(theta), dtype=torch.float64)])
    torch.testing.assert_close(matrix, dense, rtol=1e-6, atol=1e-9)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-9


@pytest.mark.parametrize("kind", ["box", "discrete", "multidiscrete", "multibinary", "gsde", "gsde-squashed"])
def test_kl_agrees_with_monte_carlo(kind: str) -> None:
    samples = 40_000
    model = model_of(kind)
    observation = torch.randn(1, 5, dtype=torch.float64).expand(samples, 5)
    with torch.no_grad():
        distribution = model.policy.get_distribution(observation)
        family, old = family_of(distribution), family_of(distribution).coordinates(distribution)
        if model.use_sde:
            model.policy.reset_noise(samples)
        actions = distribution.sample()
        log_old = distribution.log_prob(actions)
        for param in model.policy.parameters():
            param.add_(0.1 * torch.randn_like(param))
        distribution = model.policy.get_distribution(observation)
        difference = log_old - distribution.log_prob(actions)
        exact = family.kl(old, family.coordinates(distribution))[0]
    standard_error = difference.std() / samples**0.5
    assert abs(difference.mean() - exact) < 4 * standard_error


@given(
    old=st.lists(st.floats(-30, 30), min_size=6, max_size=6), new=st.lists(st.floats(-30, 30), min_size=6, max_size=6)
)
def test_kl_is_never_negative_and_zero_only_for_equals(old: list[float], new: list[float]) -> None:
    z = torch.tensor([old, new], dtype=torch.float64)
    logits = z.view(2, 2, 3).log_softmax(dim=2).view(2, 6)
    cases = {
        sb3.MultiCategoricalDistribution([3, 3]): logits,
        sb3.BernoulliDistribution(6): z,
        sb3.DiagGaussianDistribution(3): z / 10,
    }
    for distribution, points in cases.items():
        family = family_of(distribution)
        assert float(family.kl(points[:1], points[1:])) >= -1e-9
        assert float(family.kl(points[:1], points[:1])) == 0


def test_an_unknown_distribution_is_refused_by_name() -> None:
    class Strange(sb3.Distribution):
        proba_distribution_net = proba_distribution = log_prob = entropy = sample = mode = None
        actions_from_params = log_prob_from_params = None

    with pytest.raises(NotImplementedError, match="Strange"):
        family_of(Strange())  # type: ignore[abstract]
