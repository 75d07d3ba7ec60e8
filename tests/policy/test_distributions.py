import importlib.util
import math
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import pytest
import scipy.integrate
import scipy.stats
import torch
from envs import ACTION_SPACES, BetaDistribution, BetaFamily, in_float64, make
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from stable_baselines3.common import distributions as sb3
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.nn import functional as F

from sb3_trpo_ext import TRPO, Family, register_distribution
from sb3_trpo_ext.core.parameters import flatten, unflatten
from sb3_trpo_ext.policy.distributions import (
    BernoulliFamily,
    CategoricalFamily,
    GaussianFamily,
    SampledFamily,
    exp_remainder,
    family_of,
)
from sb3_trpo_ext.policy.problem import PolicyProblem
from sb3_trpo_ext.rollout.batch import Batch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
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
    params = problem.params
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
    product = problem.fisher(damping=0.0)
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


FLOAT32_KINDS = ["gaussian", "categorical", "bernoulli"]


def of_coordinates(kind: str, z: Tensor) -> Any:
    """The torch distribution in float64 whose coordinates are z."""
    z = z.double()
    if kind == "gaussian":
        return torch.distributions.Normal(z[:, :3], z[:, 3:].exp())
    if kind == "categorical":
        return [torch.distributions.Categorical(logits=part) for part in z.split((2, 4), dim=1)]
    return torch.distributions.Bernoulli(logits=z)


def random_pair(kind: str, seed: int, spread: float, radius: float) -> tuple[Family, Tensor, Tensor]:
    """Coordinates in float32 of two distributions whose KL divergence is about ``radius``."""
    generator = torch.Generator().manual_seed(seed)
    start, direction = torch.randn(2, 1, 6, generator=generator, dtype=torch.float64)
    family: Family = {
        "gaussian": GaussianFamily(),
        "categorical": CategoricalFamily((2, 4)),
        "bernoulli": BernoulliFamily(),
    }[kind]

    def at(scale: float) -> Tensor:
        z = spread * start + scale * direction
        if kind == "categorical":
            z = torch.cat([part.log_softmax(dim=1) for part in z.split((2, 4), dim=1)], dim=1)
        return z.float()

    low, high = -20.0, 10.0  # of log scale, to be halved
    for _ in range(60):
        middle = (low + high) / 2
        divergence = float(torch_kl(of_coordinates(kind, at(0.0)), of_coordinates(kind, at(math.exp(middle)))))
        low, high = (middle, high) if divergence < radius else (low, middle)
    return family, at(0.0), at(math.exp(low))


RANDOM_PAIRS = given(
    kind=st.sampled_from(FLOAT32_KINDS),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    log_radius=st.floats(math.log(1e-9), math.log(10)),
)


@settings(max_examples=400)
@RANDOM_PAIRS
def test_kl_is_right_at_every_radius_in_float32(kind: str, seed: int, spread: float, log_radius: float) -> None:
    family, old, new = random_pair(kind, seed, spread, math.exp(log_radius))
    expected = torch_kl(of_coordinates(kind, old), of_coordinates(kind, new))
    assume(1e-9 <= float(expected) <= 10)
    torch.testing.assert_close(family.kl(old, new).double(), expected, rtol=1e-3, atol=0)
    for z in (old, new):
        assert float(family.kl(z, z)) == 0


@settings(max_examples=200)
@RANDOM_PAIRS
def test_kl_has_the_right_gradient_in_float32(kind: str, seed: int, spread: float, log_radius: float) -> None:
    family, old, new = random_pair(kind, seed, spread, math.exp(log_radius))
    exact, point = new.double().requires_grad_(), new.requires_grad_()
    (expected,) = torch.autograd.grad(torch_kl(of_coordinates(kind, old), of_coordinates(kind, exact)), exact)
    (ours,) = torch.autograd.grad(family.kl(old, point), point)
    rounding = torch.finfo(torch.float32).eps  # of the probabilities whose difference the gradient is
    assert float((ours - expected).norm()) <= 1e-3 * float(expected.norm()) + rounding


@settings(max_examples=300)
@given(
    exponent=st.floats(-15, 1.9),
    sign=st.sampled_from([-1.0, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(exponent=-1.765625, sign=-1.0, dtype=torch.float32)  # e^y - 1 less y has too few digits there
def test_the_remainder_of_the_exponential_keeps_its_digits(exponent: float, sign: float, dtype: torch.dtype) -> None:
    y = torch.tensor(sign * 10.0**exponent, dtype=dtype, requires_grad=True)
    with localcontext() as context:
        context.prec = 60
        x = Decimal(y.item())
        exact, slope = float(x.exp() - 1 - x), float(x.exp() - 1)
    precision = 40 * torch.finfo(dtype).eps
    remainder = exp_remainder(y)
    assert remainder.item() == pytest.approx(exact, rel=precision)
    assert torch.autograd.grad(remainder, y)[0].item() == pytest.approx(slope, rel=precision)


def test_the_remainder_of_the_exponential_at_its_ends() -> None:
    assert exp_remainder(torch.tensor([-math.inf, 0.0, math.inf])).tolist() == [math.inf, 0.0, math.inf]
    points = torch.tensor([-2.0, -0.07, -0.01, 0.0, 0.01, 0.07, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(exp_remainder, points)


INFINITE_LOGITS = st.lists(
    st.one_of(st.floats(-30, 30, width=32), st.sampled_from([-math.inf])), min_size=6, max_size=6
)


@settings(max_examples=300)
@given(old=INFINITE_LOGITS, new=INFINITE_LOGITS, data=st.data())
def test_logits_of_minus_infinity_are_options_that_do_not_exist(
    old: list[float], new: list[float], data: st.DataObject
) -> None:
    z = torch.tensor([old, new]).view(2, 2, 3)
    z[:, :, data.draw(st.integers(0, 2))] = 1.0  # one option exists always
    z = z.log_softmax(dim=2)
    family = CategoricalFamily((3, 3))
    point = z[1].reshape(1, 6).clone().requires_grad_()
    kl = family.kl(z[0].reshape(1, 6), point)
    (slope,) = torch.autograd.grad(kl.sum(), point, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), point)
    p, q = z.double().exp()
    expected = torch.where(p > 0, p * (z[0] - z[1]), 0.0).sum()
    torch.testing.assert_close(kl.double().squeeze(), expected.squeeze(), rtol=1e-3, atol=1e-5)
    assert bool(slope.isfinite().all()) and bool(curvature.isfinite().all())
    if bool(kl.isfinite().all()):
        torch.testing.assert_close(slope.double().view(2, 3), q - p, rtol=1e-3, atol=1e-5)
    assert torch.all(slope.view(2, 3)[(p == 0) & (q == 0)] == 0)
    assert bool(family.metric(z[0].reshape(1, 6), torch.randn(1, 6)).isfinite().all())
    assert float(family.kl(point, point).detach()) == 0


@given(
    old=st.floats(-200, 200, width=32) | st.sampled_from([-math.inf, math.inf]),
    new=st.floats(-200, 200, width=32) | st.sampled_from([-math.inf, math.inf]),
)
def test_coins_may_be_certain(old: float, new: float) -> None:
    family, z = BernoulliFamily(), torch.tensor([[old]])
    point = torch.tensor([[new]], requires_grad=True)
    kl = family.kl(z, point)
    (slope,) = torch.autograd.grad(kl.sum(), point)
    assert float(kl.detach()) >= 0
    ruled_out = float(F.logsigmoid(torch.tensor(-math.copysign(1, new) * old)).exp())  # what float32 knows of it
    assert math.isinf(float(kl.detach())) == (math.isinf(new) and ruled_out > 0)
    assert bool(slope.isfinite().all())
    assert bool(family.metric(z, torch.ones(1, 1)).isfinite().all())
    assert float(family.kl(z, z)) == 0


def test_a_narrow_gaussian_that_stays_has_kl_zero() -> None:
    family, z = GaussianFamily(), torch.tensor([[0.5, -100.0]])
    assert float(family.kl(z, z)) == 0
    assert family.metric(z, torch.zeros_like(z)).tolist() == [[0.0, 0.0]]


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
        for dtype in (torch.float64, torch.float32):
            first, second = points.to(dtype).chunk(2)
            assert float(family.kl(first, second)) >= 0
            assert float(family.kl(first, first)) == 0


@pytest.mark.parametrize("kind", FLOAT32_KINDS)
def test_a_metric_by_differentiating_the_kl_is_the_closed_form(kind: str) -> None:
    family, z, v = random_pair(kind, 0, 1.0, 1.0)
    if kind == "categorical":  # log-probabilities move so that p sums to one
        v = torch.cat([u - (w.exp() * u).sum() for w, u in zip(z.split((2, 4), 1), v.split((2, 4), 1), strict=True)], 1)
    torch.testing.assert_close(Family.metric(family, z, v), family.metric(z, v))


def test_a_metric_by_differentiating_the_kl_is_its_hessian() -> None:
    family, z, v = BetaFamily(), 1 + torch.rand(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda new: family.kl(z, new).sum(), z)
    expected = (hessian.view(20, 20) @ v.flatten()).view(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(family.metric(z, v), expected)


def test_the_kl_of_the_example_agrees_with_quadrature() -> None:
    spec = importlib.util.spec_from_file_location("beta_policy", EXAMPLES / "beta_policy.py")
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    distribution = example.BetaDistribution(1)
    outputs = torch.tensor([[-1.0], [0.3]]), torch.tensor([-0.5])
    family = family_of(distribution.proba_distribution(*outputs))
    assert type(family) is example.BetaFamily
    old, new = family.coordinates(distribution).chunk(2)
    (p, q) = (scipy.stats.beta(*z[0].double().numpy()) for z in (old, new))
    expected, _ = scipy.integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), 0, 1)
    assert float(family.kl(old, new)) == pytest.approx(expected, rel=1e-5)
    assert float(family.kl(old, old)) == 0


@pytest.mark.parametrize("off_policy", [False, True])
def test_sampled_kl_and_metric_have_the_right_mean(off_policy: bool) -> None:
    samples = 200_000
    old, new = (torch.distributions.Normal(torch.tensor(m), torch.tensor(s)) for m, s in ((0.0, 1.0), (0.2, 1.1)))
    taken = torch.distributions.Normal(0.1, 1.2) if off_policy else old
    actions = taken.sample((samples,))
    family = SampledFamily(actions, taken.log_prob(actions))
    z_old, z_new = (each.log_prob(actions).unsqueeze(1) for each in (old, new))
    divergence = family.kl(z_old, z_new)
    assert bool((divergence >= 0).all())
    error = float(divergence.std()) / samples**0.5
    assert abs(float(divergence.mean()) - float(kl_divergence(old, new))) < 4 * error
    score = actions.unsqueeze(1)  # of the mean, at σ = 1; its Fisher information is 1
    information = (score * family.metric(z_old, score)).mean()
    assert float(information) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(family.kl(z_old, z_old), torch.zeros(samples))


def test_an_action_of_no_probability_is_no_sample() -> None:
    z = torch.tensor([[-math.inf], [0.0]])
    family = SampledFamily(torch.zeros(2), torch.zeros(2))
    assert family.kl(z, z).tolist() == [0.0, 0.0]
    assert family.metric(z, torch.ones(2, 1)).tolist() == [[0.0], [1.0]]


class Base(BetaDistribution):
    pass


class Derived(Base):
    pass


class Other(Family):
    def coordinates(self, distribution: Any) -> Tensor:
        raise AssertionError

    kl = coordinates  # type: ignore[assignment]


def test_the_nearest_class_that_serves_is_taken() -> None:
    assert family_of(Derived()) is None
    register_distribution(Base, lambda distribution: BetaFamily())
    assert isinstance(family_of(Derived()), BetaFamily)
    register_distribution(Derived, lambda distribution: Other())
    assert isinstance(family_of(Derived()), Other) and isinstance(family_of(Base()), BetaFamily)
    register_distribution(Derived, lambda distribution: None)
    assert isinstance(family_of(Derived()), BetaFamily)
    register_distribution(Base, lambda distribution: None)
    assert family_of(Derived()) is None


def test_subclasses_of_sb3s_distributions_have_their_families() -> None:
    class Mine(sb3.SquashedDiagGaussianDistribution):
        pass

    assert isinstance(family_of(Mine(2)), GaussianFamily)
    assert isinstance(family_of(Mine(2).proba_distribution(torch.zeros(1, 2), torch.zeros(2))), GaussianFamily)


@pytest.mark.parametrize(
    "arguments", [(torch.distributions.Beta, lambda each: BetaFamily()), (Base(), Other), (Base, BetaFamily())]
)
def test_what_cannot_be_registered_is_refused(arguments: Any) -> None:
    with pytest.raises(TypeError, match=r"`(distribution_class|factory)` must"):
        register_distribution(*arguments)


@pytest.mark.parametrize(
    "family", [GaussianFamily(), CategoricalFamily((2, 4)), BernoulliFamily()], ids=lambda family: type(family).__name__
)
def test_a_single_state_needs_no_axis_of_its_own(family: Any) -> None:
    old, new, v = torch.randn(3, 5, 6).unbind()
    if isinstance(family, CategoricalFamily):
        old, new = (torch.cat([z[:, :2].log_softmax(1), z[:, 2:].log_softmax(1)], dim=1) for z in (old, new))
    each = torch.stack([family.kl(*pair) for pair in zip(old, new, strict=True)])
    torch.testing.assert_close(each, family.kl(old, new))
    torch.testing.assert_close(torch.stack(list(map(family.metric, old, v))), family.metric(old, v))
    z = torch.tensor([0.0, -math.inf])
    assert float(CategoricalFamily((2,)).kl(z, z)) == 0
