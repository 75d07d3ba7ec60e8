"""Networks, distributions and whole updates by hand give what autograd gives."""

import itertools
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import ACTION_SPACES, RandomEnv, in_float64, make, with_rollout
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib.common.wrappers import ActionMasker
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence
from torch.nn import functional as F

from sb3_trpo_ext import NPG, TRPO, MaskableTRPO, PPOClip, PPOPenalty
from sb3_trpo_ext.core.parameters import flatten
from sb3_trpo_ext.core.reduction import ALONE
from sb3_trpo_ext.maskable import MaskableRollouts
from sb3_trpo_ext.policy.perceptron import ACTIVATIONS, Perceptron, parameters_of
from sb3_trpo_ext.rollout.forward import NotCoveredError
from sb3_trpo_ext.training.minibatch_kernel import BernoulliHead, CategoricalHead, GaussianHead, Head

# Networks

DOUBLE = torch.float64
WIDTHS = st.integers(1, 40)


def activation(kind: Any, constant: float) -> nn.Module:
    return kind(constant) if kind in (nn.LeakyReLU, nn.ELU) else kind()


@st.composite
def architectures(draw: Any) -> list[nn.Module]:
    """Linear layers, each with any number of activations behind it, in one or several sequences."""
    constants = st.sampled_from([0.01, 0.3, 1.0, 1.7])
    kinds = st.lists(st.tuples(st.sampled_from(list(ACTIVATIONS)), constants), max_size=3)
    sizes, modules = draw(st.lists(WIDTHS, min_size=2, max_size=5)), []
    for n_in, n_out in itertools.pairwise(sizes):
        after = [activation(*each) for each in draw(kinds)]
        layer = nn.Linear(n_in, n_out, bias=draw(st.booleans()), dtype=DOUBLE)
        modules.append(nn.Sequential(layer, *after) if draw(st.booleans()) else [layer, *after])
    return [each for part in modules for each in (part if isinstance(part, list) else [part])]


@settings(max_examples=200, derandomize=True)
@given(architectures(), st.integers(1, 70), st.integers(0, 99))
def test_a_network_and_its_derivatives_are_autograds(modules: list[nn.Module], rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(*modules)
    params = parameters_of(modules)
    assert params == list(net.parameters())
    names = [name for name, _ in net.named_parameters()]
    network = Perceptron(modules, torch.empty(rows, params[0].shape[1], dtype=DOUBLE))
    for _ in range(2):
        network.x.normal_()
        with torch.no_grad():
            for param in params:
                param.normal_(std=param.shape[-1] ** -0.5)
        x, u = network.x.clone(), torch.randn_like(network.y)
        tangent = {param: torch.randn_like(param) for param in params}

        def output(*values: Tensor, x: Tensor = x) -> Tensor:
            return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))

        values = tuple(param.detach() for param in params)
        expected, image, *_ = torch.func.jvp(output, values, tuple(tangent.values()))
        slopes = torch.autograd.grad((net(x) * u).sum(), params)
        close(network.forward(), expected)
        close(network.pushforward(tangent), image)
        for _ in range(2):
            network.u.copy_(u)
            network.pullback()
            for param, slope in zip(params, slopes, strict=True):
                close(network.gradient[param], slope)
        close(network.pushforward(tangent), image)
        close(network.y, expected)
        close(network.x, x)


def close(mine: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    """Close, in proportion to the largest number."""
    mine, theirs = torch.as_tensor(mine), torch.as_tensor(theirs)
    assert mine.shape == theirs.shape
    scale = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_far_from_zero(kind: Any) -> None:
    linear, function = nn.Linear(1, 1, bias=False, dtype=DOUBLE), kind()
    nn.init.ones_(linear.weight)
    x = torch.tensor([[-1e4], [-800.0], [-40.0], [0.0], [40.0], [800.0], [1e4]], dtype=DOUBLE)
    network = Perceptron([linear, function], x.clone())
    close(network.forward(), function(x), 1e-15)
    tangent = {linear.weight: torch.ones(1, 1, dtype=DOUBLE)}
    _, image, *_ = torch.func.jvp(
        lambda w: function(x * w), (torch.ones(1, 1, dtype=DOUBLE),), (tangent[linear.weight],)
    )
    close(network.pushforward(tangent), image, 1e-15)


@pytest.mark.parametrize(
    "modules", [[nn.Linear(2, 2), nn.Softplus()], [nn.Tanh(), nn.Linear(2, 2)], [nn.Linear(2, 2), nn.LayerNorm(2)]]
)
def test_other_layers_are_refused(modules: list[nn.Module]) -> None:
    with pytest.raises(NotCoveredError, match=r"layer (Softplus|Tanh|LayerNorm)"):
        Perceptron(modules, torch.zeros(1, 2))


def test_a_layer_in_two_places_is_refused() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(NotCoveredError, match="two places"):
        Perceptron([layer, nn.Tanh(), layer], torch.zeros(1, 2))


# Distributions

SIZES = [(2,), (5,), (3, 2, 4), (1, 3)]
KINDS = ["gaussian", "bernoulli", *SIZES]


class Case:
    """States of one kind of distribution: outputs y (and log σ), of π_old too, and actions.

    Args:
        kind: "gaussian", "bernoulli", or the sizes of choices.
        scale: Of the outputs.
        distance: From π_old to π.
    """

    def __init__(
        self, kind: Any, scale: float = 1.0, distance: float = 0.5, rows: int = 7, dtype: Any = DOUBLE
    ) -> None:
        self.kind, columns = kind, 3 if isinstance(kind, str) else sum(kind)
        self.old_y = scale * torch.randn(rows, columns, dtype=dtype)
        self.y = self.old_y + distance * torch.randn(rows, columns, dtype=dtype)
        self.old_log_std = 0.5 * torch.randn(columns, dtype=dtype)
        self.log_std = self.old_log_std + distance * torch.randn(columns, dtype=dtype)
        self.log_std_gradient = torch.full_like(self.log_std, math.nan)
        if kind == "gaussian":
            self.actions = self.y + torch.randn_like(self.y)
        elif kind == "bernoulli":
            self.actions = torch.randint(2, self.y.shape).to(dtype)
        else:
            self.actions = torch.stack([torch.randint(size, (rows,)) for size in kind], dim=1).to(dtype)

    def head(self) -> Head:
        if self.kind == "gaussian":
            return GaussianHead((self.log_std.numpy(), self.log_std_gradient.numpy()), ())
        return BernoulliHead(None, ()) if self.kind == "bernoulli" else CategoricalHead(None, self.kind)

    def old_z(self) -> np.ndarray:
        """As `policy.distributions` has it."""
        if self.kind == "gaussian":
            return torch.cat([self.old_y, self.old_log_std.expand_as(self.old_y)], dim=1).numpy()
        if self.kind == "bernoulli":
            return self.old_y.numpy()
        return torch.cat([part.log_softmax(dim=1) for part in self.old_y.split(self.kind, dim=1)], dim=1).numpy()

    def torchs(self, y: Tensor, log_std: Tensor) -> list[Any]:
        if self.kind == "gaussian":
            return [Independent(Normal(y, log_std.exp()), 1)]
        if self.kind == "bernoulli":
            return [Independent(Bernoulli(logits=y), 1)]
        return [Categorical(logits=part) for part in y.split(self.kind, dim=1)]

    def expected(self, y: Tensor, log_std: Tensor) -> tuple[Any, Any, Any]:
        """Log π, H and D, by torch."""
        new, old = self.torchs(y, log_std), self.torchs(self.old_y.to(y), self.old_log_std.to(y))
        parts = [self.actions] if isinstance(self.kind, str) else list(self.actions.T)
        log_prob = sum(each.log_prob(part) for each, part in zip(new, parts, strict=True))
        entropy = sum(each.entropy() for each in new)
        return log_prob, entropy, sum(self.divergence(p, q) for p, q in zip(old, new, strict=True))

    def divergence(self, p: Any, q: Any) -> Tensor:
        """KL(p‖q), finite where torch's calls it infinite."""
        if isinstance(p, Categorical):
            return (p.probs * (p.logits - q.logits)).sum(dim=1)
        if self.kind == "gaussian":
            return kl_divergence(p, q)
        old, new = p.base_dist.logits, q.base_dist.logits
        heads = old.sigmoid() * (F.logsigmoid(old) - F.logsigmoid(new))
        return (heads + (-old).sigmoid() * (F.logsigmoid(-old) - F.logsigmoid(-new))).sum(dim=1)


weights = st.sampled_from([0.0, 1e-3, 0.7, 3.0])


@settings(max_examples=150, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([1.0, 30.0, 1e3]),
    st.sampled_from([0.1, 3.0]),
    weights,
    weights,
    st.booleans(),
    st.integers(1, 9),
    st.integers(0, 999),
)
def test_a_distribution_and_its_gradients_are_autograds(
    kind: Any,
    scale: float,
    distance: float,
    entropy_weight: float,
    kl_weight: float,
    compares: bool,
    rows: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    case = Case(kind, scale, distance, rows)
    c, u = torch.randn(rows, dtype=DOUBLE), torch.full_like(case.y, math.nan)
    y, log_std = case.y.clone().requires_grad_(), case.log_std.clone().requires_grad_()
    log_prob, entropy, divergence = case.expected(y, log_std)
    kl_weight = kl_weight if compares else 0.0
    objective = (c * log_prob + kl_weight * divergence - entropy_weight * entropy).sum()
    slopes = torch.autograd.grad(objective, [y, log_std], allow_unused=True)

    head = case.head()
    with np.errstate(all="ignore"):
        found_log_prob, found_entropy = head.read(case.y.numpy(), case.actions.numpy())
        found_divergence = head.divergence(case.old_z())
        head.pullback(c.numpy(), entropy_weight, kl_weight, case.old_z() if compares else None, u.numpy())
    close(found_log_prob, log_prob.detach(), 1e-9)
    close(np.broadcast_to(found_entropy, rows).copy(), entropy.detach(), 1e-9)
    close(found_divergence, divergence.detach(), 1e-9)
    assert (found_divergence >= 0).all()
    close(u, slopes[0], 1e-9)
    if kind == "gaussian":
        close(case.log_std_gradient, slopes[1], 1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_and_means_may_be_extreme(kind: Any) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        case = Case(kind, rows=9)
        case.y = 1e3 * torch.randint(-1, 2, case.y.shape).double()
        case.old_y = case.y.flip(0)
        c, u = torch.randn(9, dtype=DOUBLE), torch.full_like(case.y, math.nan)
        y, log_std = case.y.clone().requires_grad_(), case.log_std.clone().requires_grad_()
        log_prob, entropy, divergence = case.expected(y, log_std)
        (slope,) = torch.autograd.grad((c * log_prob + divergence - entropy).sum(), [y])
        head = case.head()
        with np.errstate(all="ignore"):
            found = head.read(case.y.numpy(), case.actions.numpy())
            close(head.divergence(case.old_z()), divergence.detach())
            head.pullback(c.numpy(), 1.0, 1.0, case.old_z(), u.numpy())
        close(found[0], log_prob.detach())
        close(np.broadcast_to(found[1], 9).copy(), entropy.detach())
        close(u, slope)


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_divergence_is_exact_in_single_precision(kind: Any, distance: float) -> None:
    torch.manual_seed(0)
    case = Case(kind, distance=distance, rows=512, dtype=torch.float32)
    head = case.head()
    head.read(case.y.numpy(), case.actions.numpy())
    found = head.divergence(case.old_z())
    _, _, expected = case.expected(case.y.double(), case.log_std.double())
    assert found.dtype == np.float32
    assert (found >= 0).all()
    assert found.mean(dtype=np.float64) == pytest.approx(float(expected.mean()), rel=1e-3)
    if distance >= 1e-2:
        torch.testing.assert_close(torch.as_tensor(found).double(), expected, rtol=1e-3, atol=1e-3 * distance**2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_did_not_move_has_no_divergence(kind: Any) -> None:
    case = Case(kind, distance=0.0, rows=64, dtype=torch.float32)
    head = case.head()
    head.read(case.y.numpy(), case.actions.numpy())
    np.testing.assert_allclose(head.divergence(case.old_z()), 0, atol=1e-12)


@given(st.integers(1, 6), st.integers(2, 30), st.integers(0, 99))
def test_rows_are_standardised_as_each_would_be(parts: int, size: int, seed: int) -> None:
    values = torch.randn(parts, size, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) * 5 + 3
    close(ALONE.standardized_rows(values), torch.stack([ALONE.standardized(row) for row in values]), 1e-12)


# Whole updates

OBSERVATIONS: dict[str, spaces.Space] = {
    "vector": spaces.Box(-1, 1, (5,)),
    "matrix": spaces.Box(-2, 2, (2, 3)),
    "one-hot": spaces.Discrete(6),
    "dict": spaces.Dict({"b": spaces.Box(-1, 1, (4,)), "a": spaces.Box(-1, 1, (1, 2)), "c": spaces.Discrete(3)}),
}
layers = st.lists(st.integers(1, 20), max_size=3)
LAYERS = st.one_of(layers, st.fixed_dictionaries({"pi": layers, "vf": layers}))
FIRST_ORDER = {
    "batch_size": st.sampled_from([7, 16, 31, 32, 64]),
    "n_epochs": st.integers(1, 3),
    "clip_range_vf": st.sampled_from([None, 1e-3, 0.01, 10.0]),
    "vf_coef": st.sampled_from([0.0, 0.5, 2.0]),
    "max_grad_norm": st.sampled_from([0.1, 0.5, 10.0]),
}
NATURAL = {
    "cg_max_steps": st.integers(1, 3),
    "critic": st.just("adam"),
    "batch_size": st.sampled_from([7, 16, 31, 32]),
    "n_critic_updates": st.integers(1, 4),
}
ALGORITHMS: dict[Any, dict[str, Any]] = {
    PPOClip: {
        **FIRST_ORDER,
        "clip_range": st.sampled_from([1e-3, 0.02, 0.2]),
        "target_kl": st.sampled_from([None, 1e-4, 0.1]),
        "max_kl": st.sampled_from([None, None, 1e-3]),
    },
    PPOPenalty: {
        **FIRST_ORDER,
        "kl_coef": st.sampled_from([0.0, 1.0, 50.0]),
        "adaptive": st.just(False),
        "target_kl": st.sampled_from([1e-4, 0.01]),
    },
    TRPO: {**NATURAL, "sub_sampling_factor": st.sampled_from([1, 2])},
    NPG: NATURAL,
}


@st.composite
def settings_of(draw: Any, algorithm: Any) -> tuple[Any, dict[str, Any], gym.Env]:
    """An algorithm, arguments for it and an environment."""
    options = draw(st.fixed_dictionaries(ALGORITHMS[algorithm]))
    options["normalize_advantage"] = draw(st.booleans())
    options["ent_coef"] = draw(st.sampled_from([0.0, 0.01, 1.0]))
    observation = draw(st.sampled_from(list(OBSERVATIONS)))
    policy_kwargs = {
        "net_arch": draw(LAYERS),
        "activation_fn": draw(st.sampled_from(list(ACTIVATIONS))),
        "share_features_extractor": draw(st.booleans()),
        "ortho_init": draw(st.booleans()),
    }
    options |= {"policy_kwargs": policy_kwargs, "seed": draw(st.integers(0, 99)), "n_steps": 32, "device": "cpu"}
    policy = "MultiInputPolicy" if observation == "dict" else "MlpPolicy"
    env = RandomEnv(OBSERVATIONS[observation], ACTION_SPACES[draw(st.sampled_from(list(ACTION_SPACES)))])
    return algorithm, {"policy": policy, **options}, env


def updated(algorithm: Any, options: dict[str, Any], env: gym.Env, updates: int, fast: bool) -> tuple[Any, Any]:
    """A model after some updates, and where the generators of random numbers are then."""
    model = algorithm(env=env, fast_updates=fast, **options)
    for _ in range(updates):
        with_rollout(model)
        model.train()
    return model, (np.random.get_state(legacy=False), torch.get_rng_state().tolist())


def logged(model: Any) -> dict[str, float]:
    return {key: float(v) for key, v in model.logger.name_to_value.items() if key.startswith("train/")}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=32, derandomize=True, deadline=None)
@given(st.data(), st.integers(1, 2))
def test_an_update_by_hand_is_the_one_by_autograd(algorithm: Any, data: st.DataObject, updates: int) -> None:
    found = data.draw(settings_of(algorithm))
    (ours, our_random), (theirs, their_random) = (updated(*found, updates, fast) for fast in (True, False))
    assert (ours.update_path, theirs.update_path) == ("fast", "autograd: fast_updates=False")
    check_alike(ours, theirs, natural=algorithm in (TRPO, NPG))
    np.testing.assert_equal(our_random, their_random)


@pytest.mark.parametrize("bound", [1e-3, 0.01, 0.05])
@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty])
def test_values_beyond_their_clipped_range_have_no_gradient(algorithm: Any, bound: float) -> None:
    models = []
    for fast in (True, False):
        model = make(algorithm, "box", batch_size=16, n_epochs=3, clip_range_vf=bound, fast_updates=fast)
        for _ in range(2):
            with_rollout(model).train()
        models.append(model)
    check_alike(*models, natural=False)


def check_alike(ours: Any, theirs: Any, *, natural: bool) -> None:
    """Parameters, gradients, the optimiser's state and what is logged."""
    tolerance = 1e-5 if natural else 1e-6  # conjugate gradients enlarge what is rounded
    for (name, mine), peer in zip(ours.policy.named_parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, peer, rtol=tolerance, atol=tolerance)
        assert (mine.grad is None) == (peer.grad is None), name
        if mine.grad is not None:
            close(mine.grad, peer.grad, 1e-4)
    mine_state, peer_state = (each.policy.optimizer.state_dict() for each in (ours, theirs))
    assert mine_state["param_groups"] == peer_state["param_groups"]
    assert mine_state["state"].keys() == peer_state["state"].keys()
    for index, state in mine_state["state"].items():
        peers = peer_state["state"][index]
        assert state.keys() == peers.keys() and float(state["step"]) == float(peers["step"])
        close(state["exp_avg"], peers["exp_avg"], 1e-4)
        close(state["exp_avg_sq"], peers["exp_avg_sq"], 1e-4)
    assert logged(ours).keys() == logged(theirs).keys()
    loose = {"rel": 1e-2, "abs": 1e-4} if natural else {"rel": 1e-3, "abs": 2e-6}
    assert logged(ours) == pytest.approx(logged(theirs), nan_ok=True, **loose)
    assert ours._n_updates == theirs._n_updates
    assert ours._reported_rejections == theirs._reported_rejections


# What is not finite


def huge_returns(model: Any) -> None:
    model.rollout_buffer.returns[:] = 1e30


def one_huge_return(model: Any) -> None:
    model.rollout_buffer.returns[3] = 1e30


def nan_in_the_actor(model: Any) -> None:
    model.policy.action_net.weight.data[0, 0] = math.nan


def nan_in_the_critic(model: Any) -> None:
    model.policy.value_net.weight.data[0, 0] = math.nan


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # SB3's explained variance overflows
@pytest.mark.parametrize(
    "fault",
    [
        huge_returns,
        one_huge_return,
        nan_in_the_actor,
        nan_in_the_critic,
    ],
)
@pytest.mark.parametrize("action", ["box", "discrete", "multibinary"])
@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty])
def test_what_is_not_finite_undoes_the_update_for_the_same_reason(algorithm: Any, action: str, fault: Any) -> None:
    check_undone(algorithm, action, fault)


@pytest.mark.parametrize(
    ("algorithm", "log_std"),
    [
        (PPOClip, -200.0),
        (PPOPenalty, -200.0),
        (PPOClip, 200.0),
        (PPOPenalty, 200.0),
    ],
)
def test_a_deviation_of_zero_or_infinity_undoes_the_update(algorithm: Any, log_std: float) -> None:
    check_undone(algorithm, "box", lambda model: model.policy.log_std.data.fill_(log_std))


def check_undone(algorithm: Any, action: str, fault: Any) -> None:
    """One update undoes itself, by hand and by autograd for the same reason."""
    reasons, logs = [], []
    for fast in (True, False):
        model = make(algorithm, action, batch_size=8, n_epochs=2, fast_updates=fast).learn(32)
        with_rollout(model)
        fault(model)
        before = {name: value.clone() for name, value in model.policy.state_dict().items()}
        moments = [value.clone() for state in model.policy.optimizer.state.values() for value in state.values()]
        model.train()
        assert model.update_path == ("fast" if fast else "autograd: fast_updates=False")
        torch.testing.assert_close(dict(model.policy.state_dict()), before, rtol=0, atol=0, equal_nan=True)
        after = [value for state in model.policy.optimizer.state.values() for value in state.values()]
        assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
        reasons.append(model._reported_rejections)
        logs.append({key for key in model.logger.name_to_value if key.startswith("train/")})
    assert reasons[0] == reasons[1] != []
    assert logs[0] == logs[1]


@pytest.mark.parametrize("fast", [True, False])
def test_a_parameter_that_a_callback_breaks_is_named(fast: bool) -> None:
    model = make(PPOClip, "box", batch_size=8, fast_updates=fast)

    def breaking(scope: Any, _: Any) -> bool:
        if model.num_timesteps == 40:
            model.policy.value_net.bias.data[0] = math.nan
        return True

    with pytest.raises(ValueError, match=r"value_net\.bias"):
        model.learn(64, callback=breaking)
    assert model._n_updates == 10
    assert bool(model.policy.value_net.bias.isnan().all())
    model.policy.value_net.bias.data[0] = 0.0
    assert model.learn(32)._n_updates == 20


def test_rows_are_standardised_whose_squares_overflow() -> None:
    values = torch.tensor([[1e20, -1e20, 3e20]])
    torch.testing.assert_close(ALONE.standardized_rows(values)[0], ALONE.standardized(values[0]))


# From one update to the next


def another_policy(model: Any, other: Any) -> None:
    model.policy = other.policy


def loaded_state(model: Any, other: Any) -> None:
    model.policy.load_state_dict(other.policy.state_dict())


def other_memory(model: Any, other: Any) -> None:
    for param in model.policy.parameters():
        param.data = 1.1 * param.data


def another_layer(model: Any, other: Any) -> None:
    model.policy.value_net = other.policy.value_net
    model.policy.optimizer = torch.optim.Adam(model.policy.parameters(), lr=3e-4, eps=1e-5)


def another_parameter(model: Any, other: Any) -> None:
    model.policy.action_net.bias = other.policy.action_net.bias
    model.policy.optimizer = torch.optim.Adam(model.policy.parameters(), lr=3e-4, eps=1e-5)


def another_activation(model: Any, other: Any) -> None:
    model.policy.mlp_extractor.policy_net[1] = nn.ReLU()


def another_optimizer(model: Any, other: Any) -> None:
    model.policy.optimizer = torch.optim.AdamW(model.policy.parameters(), lr=3e-4, weight_decay=0.1)


def other_options(model: Any, other: Any) -> None:
    model.batch_size, model.vf_coef, model.ent_coef, model.max_grad_norm = 8, 0.0, 0.1, 0.05
    model.policy.optimizer.param_groups[0].update(betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1)


def written_in_place(model: Any, other: Any) -> None:
    with torch.no_grad():
        model.policy.log_std.fill_(-1.0)
        model.policy.action_net.weight.mul_(3.0)


CHANGES = [
    another_policy,
    loaded_state,
    other_memory,
    another_layer,
    another_parameter,
    another_activation,
    another_optimizer,
    other_options,
    written_in_place,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty, TRPO])
def test_what_changes_between_updates_is_followed(algorithm: Any, change: Any) -> None:
    options: dict[str, Any] = {"critic": "adam", "cg_max_steps": 2} if algorithm is TRPO else {"n_epochs": 2}
    if change is other_options and algorithm is TRPO:
        pytest.skip("options of minibatches")
    models = []
    for fast in (True, False):
        model, other = (
            make(algorithm, "box", batch_size=16, seed=seed, fast_updates=fast, **options) for seed in (0, 1)
        )
        model.set_random_seed(3)
        with_rollout(model).train()
        change(model, other)
        for _ in range(2):
            with_rollout(model).train()
            assert model.update_path == ("fast" if fast else "autograd: fast_updates=False")
        models.append(model)
    check_alike(*models, natural=algorithm is TRPO)


@pytest.mark.parametrize("algorithm", [PPOClip, PPOPenalty, TRPO])
def test_a_policy_in_double_precision_goes_by_autograd_until_it_is_back(algorithm: Any) -> None:
    model = make(algorithm, "discrete").learn(32)
    assert model.update_path == "fast"
    in_float64(model)
    cast_moments(model, DOUBLE)
    model.learn(32)
    assert model.update_path.startswith("autograd: ")
    model.policy.features_extractor._forward_pre_hooks.clear()
    model.policy.float()
    cast_moments(model, torch.float32)
    before = torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()
    model.learn(32)
    assert model.update_path == "fast"
    assert not torch.equal(before, torch.nn.utils.parameters_to_vector(model.policy.parameters()))


def cast_moments(model: Any, dtype: torch.dtype) -> None:
    for state in model.policy.optimizer.state.values():
        state.update({key: value.to(dtype) for key, value in state.items() if key != "step"})


class OwnSequential(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_own_sequential(model: Any) -> None:
    model.policy.mlp_extractor.policy_net = OwnSequential(*model.policy.mlp_extractor.policy_net)


def with_one_deviation_for_all(model: Any) -> None:
    model.policy.log_std = nn.Parameter(torch.zeros(1))
    model.policy.optimizer = torch.optim.Adam(model.policy.parameters(), lr=1e-3)


def with_memory_in_two_places(model: Any) -> None:
    first, second = model.policy.mlp_extractor.policy_net[0], model.policy.mlp_extractor.value_net[0]
    second.weight.data = first.weight.data


def with_transposed_weights(model: Any) -> None:
    weight = model.policy.mlp_extractor.policy_net[-2].weight
    weight.data = weight.data.t()


def with_another_class(model: Any) -> None:
    kind = type(model.policy)

    def doubled(self: Any, latent: Tensor) -> Any:
        return kind._get_action_dist_from_latent(self, 2 * latent)

    model.policy.__class__ = type("Own", (kind,), {"_get_action_dist_from_latent": doubled})


CHANGES = [
    with_own_sequential,
    with_one_deviation_for_all,
    with_memory_in_two_places,
    with_transposed_weights,
    with_another_class,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("algorithm", [PPOClip, TRPO])
def test_what_looks_plain_and_is_not_goes_by_autograd(algorithm: Any, change: Any) -> None:
    ends = []
    for fast in (True, False):
        model = with_rollout(
            make(algorithm, "box", batch_size=8, policy_kwargs={"net_arch": [4, 4]}, fast_updates=fast)
        )
        model.train()
        change(model)
        np.random.seed(0)
        with_rollout(model)
        model.train()
        assert model.update_path.startswith("autograd: ")
        ends.append(flatten(list(model.policy.parameters())).detach())
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)


def test_masked_minibatches_go_by_autograd() -> None:
    class MaskablePPOClip(PPOClip, MaskableRollouts):  # type: ignore[misc]
        policy_aliases = MaskableTRPO.policy_aliases

    env = ActionMasker(RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Discrete(3)), lambda _: np.ones(3, dtype=bool))
    model = MaskablePPOClip("MlpPolicy", env, n_steps=16, batch_size=8, device="cpu")
    PPOClip.learn(model, 16, use_masking=True)
    assert model.update_path == "autograd: rollout buffer MaskableRolloutBuffer"


def test_chunks_that_are_run_in_turn_leave_few_networks() -> None:
    model = with_rollout(make(TRPO, "box", fisher_chunk_size=2, curvature_samples=None))
    model.train()
    assert model.update_path == "fast"
    returned = model._last_stand_in._returned.values()
    assert 0 < sum(map(len, returned)) <= 8  # two at a time of actor and critic, of whole chunks and of the last
