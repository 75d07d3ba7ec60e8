import math
from typing import Any

import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, OBSERVATION_SPACES, AttentionExtractor, NoisyExtractor, in_float64, make, with_rollout
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from test_distributions import GSDE, batch_of, model_of, torch_kl
from torch import Tensor

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.core.conjugate_gradient import conjugate_gradient
from sb3_trpo_ext.core.parameters import assign, flatten
from sb3_trpo_ext.policy.evaluation import consistent_evaluation
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.rollout.batch import Batch
from sb3_trpo_ext.rollout.buffers import whole_rollout


def problem_of(model: Any, **kwargs: Any) -> tuple[PolicyProblem, Batch]:
    batch = whole_rollout(model.rollout_buffer, model.action_space).with_normalized_advantages()
    return PolicyProblem(model.policy, batch, **kwargs), batch


@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_chunks_change_nothing_and_the_start_has_kl_zero(action: str, observation: str) -> None:
    model = with_rollout(make(TRPO, action, observation))
    batch = whole_rollout(model.rollout_buffer, model.action_space)
    with consistent_evaluation(model.policy):
        results = []
        for chunk_size in (None, 7):
            problem = PolicyProblem(model.policy, batch, ent_coef=0.1, chunk_size=chunk_size)
            params, g = problem.params, problem.gradient
            assert problem.start.divergence == problem.start.kl_max == 0
            product = problem.fisher(0.1)(torch.ones_like(g))
            theta = flatten(params).detach()
            # Through hundreds of convolutions 0.1 leads to logits of hundreds, of which float32 rounds everything away.
            assign(params, theta + (0.01 if observation in ("image", "dict") else 0.1))
            moved = problem.evaluate()
            assign(params, theta)
            results.append((g, product, torch.tensor([moved.objective, moved.divergence, moved.kl_max, moved.entropy])))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("extractor", [NoisyExtractor, AttentionExtractor])
def test_one_consistent_mode_keeps_the_start_at_kl_zero(extractor: type[BaseFeaturesExtractor]) -> None:
    model = with_rollout(make(TRPO, "box", policy_kwargs={"features_extractor_class": extractor}))
    buffers = [buffer.clone() for buffer in model.policy.buffers()]
    model.policy.set_training_mode(True)
    with consistent_evaluation(model.policy):
        problem, _ = problem_of(model)
        again = problem.evaluate()
    assert problem.start.divergence == problem.start.kl_max == 0
    assert again.divergence == again.kl_max == 0
    before = flatten(list(model.policy.parameters())).detach().clone()
    model.train()
    assert not torch.equal(before, flatten(list(model.policy.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.policy.buffers(), strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_policy_takes_the_same_step(backend: str) -> None:
    plain, compiled = (with_rollout(make(TRPO, "box", fast_updates=False)) for _ in range(2))
    compiled.policy.mlp_extractor = torch.compile(compiled.policy.mlp_extractor, backend=backend)
    for model in (plain, compiled):
        np.random.seed(0)
        model.train()
    for ours, theirs in zip(compiled.policy.parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_operation_without_double_backward_is_explained() -> None:
    model = with_rollout(make(TRPO, "box"))
    before = flatten(list(model.policy.parameters())).detach().clone()
    model.policy.action_net.register_forward_hook(
        lambda module, inputs, output: torch.cdist(output, torch.eye(3), p=1.0)
    )
    with pytest.raises(RuntimeError, match="PPOClip"):
        model.train()
    assert torch.equal(before, flatten(list(model.policy.parameters())))


@pytest.mark.parametrize("kind", [*ACTION_SPACES, *GSDE])
def test_the_surrogate_starts_with_the_policy_gradient(kind: str) -> None:
    model = model_of(kind)
    batch = batch_of(model)
    gradients = PolicyProblem(model.policy, batch).gradients
    log_prob = model.policy.get_distribution(batch.observations).log_prob(batch.actions)
    expected = torch.autograd.grad((batch.advantages * log_prob).mean(), list(gradients))
    for ours, theirs in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sub_sampling_thins_the_curvature_alone() -> None:
    model = with_rollout(make(TRPO, "box", "dict"))
    with consistent_evaluation(model.policy):
        problem, batch = problem_of(model)
        g = problem.gradient
        full = problem.fisher(0.0)
        np.random.seed(1)
        thinned = PolicyProblem(model.policy, batch, curvature_samples=len(batch) // 4).fisher(0.0)
        assert torch.equal(thinned(g), thinned(g))
        assert not torch.allclose(thinned(g), full(g), rtol=1e-3)
        np.random.seed(1)
        subset = batch.subset(len(batch) // 4)
        assert len(subset) == len(batch) // 4
        assert float(subset.weights.sum()) == pytest.approx(1.0)
        by_hand = PolicyProblem(model.policy, subset)
        torch.testing.assert_close(by_hand.fisher(0.0)(g), thinned(g))


def test_entropy_counts_in_gradient_and_objective() -> None:
    model = model_of("multidiscrete")
    batch = batch_of(model)
    plain, bonus = PolicyProblem(model.policy, batch), PolicyProblem(model.policy, batch, ent_coef=0.5)
    start = plain.start
    assert bonus.start.objective == pytest.approx(start.objective + 0.5 * start.entropy)
    entropy = model.policy.get_distribution(batch.observations).entropy().mean()
    expected = torch.autograd.grad(entropy, plain.params)
    for param, derivative in zip(plain.gradients, expected, strict=True):
        torch.testing.assert_close(bonus.gradients[param], plain.gradients[param] + 0.5 * derivative)


def test_the_sampled_entropy_of_squashed_actions_has_the_right_gradient() -> None:
    model = model_of("gsde-squashed")
    batch = batch_of(model, size=20_000)
    batch = Batch(**{**vars(batch), "advantages": torch.zeros(len(batch), dtype=torch.float64)})
    log_std = model.policy.log_std
    sampled = PolicyProblem(model.policy, batch, ent_coef=1.0).gradients[log_std]

    def entropy() -> Tensor:
        """H = E[-log π(a|s)] by reparametrised samples, pathwise differentiable."""
        distribution = model.policy.get_distribution(batch.observations)
        normal = distribution.distribution
        noise = torch.randn(normal.loc.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return -distribution.log_prob(torch.tanh(normal.loc + normal.scale * noise)).mean()

    (pathwise,) = torch.autograd.grad(entropy(), log_std)
    cosine = torch.nn.functional.cosine_similarity(sampled.flatten(), pathwise.flatten(), dim=0)
    assert cosine > 0.9
    assert float(sampled.norm() / pathwise.norm()) == pytest.approx(1.0, rel=0.3)


def test_a_tabular_update_is_the_exact_natural_gradient_step() -> None:
    model = make(TRPO, "discrete", "discrete", policy_kwargs={"net_arch": []})
    in_float64(model)
    states = torch.arange(6).repeat_interleave(8)
    actions = torch.randint(4, (48,))
    with torch.no_grad():
        log_prob = model.policy.get_distribution(states).log_prob(actions)
    weights = torch.full((48,), 1 / 48, dtype=torch.float64)
    advantages = torch.randn(48, dtype=torch.float64)
    problem = PolicyProblem(model.policy, Batch(states, actions, log_prob, advantages, advantages, advantages, weights))
    params, g = problem.params, problem.gradient
    solution = conjugate_gradient(problem.fisher(1e-3), g, max_steps=200, residual_tol=1e-12).solution

    # The Fisher matrix from its definition, E[∇log π ∇log πᵀ] over states and exact action probabilities.
    fisher = 1e-3 * torch.eye(len(g), dtype=torch.float64)
    for state in range(6):
        distribution = model.policy.get_distribution(torch.tensor([state]))
        for action in range(4):
            log_pi = distribution.log_prob(torch.tensor([action]))
            score = flatten(torch.autograd.grad(log_pi.sum(), params, retain_graph=True))
            fisher += torch.exp(log_pi.detach()) / 6 * torch.outer(score, score)
    torch.testing.assert_close(solution, torch.linalg.solve(fisher, g), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("radius", [1e-9, 1e-6, 1e-3, 1.0, 10.0])
@pytest.mark.parametrize("action", [*ACTION_SPACES, "narrow"])
def test_the_divergence_of_a_batch_is_right_at_every_radius_in_float32(action: str, radius: float) -> None:
    options = {"policy_kwargs": {"log_std_init": -2.0}} if action == "narrow" else {}
    model = with_rollout(make(TRPO, "box" if action == "narrow" else action, **options))
    with consistent_evaluation(model.policy):
        problem, batch = problem_of(model)
        params = problem.params
        theta, direction = flatten(params).detach(), torch.randn(sum(param.numel() for param in params))

        def exact() -> Any:
            """The distribution as it acts, in float64."""
            with torch.no_grad():
                return in_double(batch.distribution(model.policy).distribution)

        old, low, high = exact(), -20.0, 5.0
        for _ in range(40):
            middle = (low + high) / 2
            assign(params, theta + math.exp(middle) * direction)
            low, high = (middle, high) if float(torch_kl(old, exact()).mean()) < radius else (low, middle)
        expected = float(torch_kl(old, exact()).mean())
        assert expected == pytest.approx(radius, rel=0.2)
        assert problem.evaluate().divergence == pytest.approx(expected, rel=1e-3)


def in_double(distribution: Any) -> Any:
    if isinstance(distribution, list):
        return [in_double(each) for each in distribution]
    if isinstance(distribution, torch.distributions.Normal):
        return torch.distributions.Normal(distribution.loc.double(), distribution.scale.double())
    return type(distribution)(logits=distribution.logits.double())
