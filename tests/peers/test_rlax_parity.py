"""RLax's own returns, advantages and policy losses, on random inputs, are ours, and so are their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.objectives import advantages
from esscher.objectives.policy import links, losses, regression

rlax = pytest.importorskip("rlax", reason="needs the extra `peers`: pip install 'esscher[peers]'")

pytestmark = pytest.mark.usefixtures("x64")

B, T, N = 3, 6, 5
RNG = np.random.default_rng(0)
REWARDS, ACTION_VALUES, LOG_RATIO = RNG.normal(size=(3, B, T))
VALUES, NEXT = RNG.normal(size=(2, B, T + 1))
DISCOUNTS = RNG.uniform(0.5, 1, size=(B, T)) * (RNG.uniform(size=(B, T)) < 0.9)
RATIOS = np.exp(LOG_RATIO)
LOGP, Q = -np.exp(RNG.normal(size=(B, N))), RNG.normal(size=(B, N))
RLAX_EPSILON = 1e-9  # it adds 1e-10 to the sums of V-MPO's weights


def agree(ours, theirs, *arguments, rtol=1e-10):
    """Values, and gradients of a random projection of them, in all arguments."""

    def project(function, *arguments):
        value = function(*arguments)
        return sum(jnp.vdot(np.random.default_rng(1).normal(size=x.shape), x) for x in jax.tree.leaves(value)), value

    every = tuple(range(1, len(arguments) + 1))
    (a, a_slope), (b, b_slope) = (
        jax.jit(lambda *x, f=f: (f(*x), jax.grad(project, every, has_aux=True)(f, *x)[0]))(*arguments)
        for f in (ours, theirs)
    )
    for x, y in zip(jax.tree.leaves((a, a_slope)), jax.tree.leaves((b, b_slope)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)
    assert any(np.abs(x).max() > 0.01 for x in a_slope)


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_gae(lam):
    theirs = jax.vmap(lambda r, d, v: rlax.truncated_generalized_advantage_estimation(r, d, lam, v))
    agree(lambda r, d, v: advantages.gae(r, v, d, lam), theirs, REWARDS, DISCOUNTS, VALUES)


def test_lambda_returns():
    theirs = jax.vmap(lambda r, d, v: rlax.lambda_returns(r, d, v, 0.8))
    agree(lambda r, d, v: advantages.lambda_returns(r, v, d, 0.8), theirs, REWARDS, DISCOUNTS, NEXT[:, 1:])


@pytest.mark.parametrize("lam", [0.7, 1.0])
def test_vtrace(lam):
    limits = {"clip_rho_threshold": 1.3, "clip_pg_rho_threshold": 0.9, "stop_target_gradients": False}

    def theirs(r, v, d, ratios):
        out = jax.vmap(lambda r, v, d, rho: rlax.vtrace_td_error_and_advantage(v[:-1], v[1:], r, d, rho, lam, **limits))
        out = out(r, v, d, ratios)
        return out.errors + v[:, :-1], out.pg_advantage

    def ours(r, v, d, ratios):
        return tuple(advantages.vtrace(r, v, d, ratios, lam, rho_max=1.3, policy_rho_max=0.9))

    agree(ours, theirs, REWARDS, VALUES, DISCOUNTS, RATIOS)


@pytest.mark.parametrize("method", ["retrace", "importance", "q_lambda"])
def test_off_policy_returns(method):
    traces = {"retrace": 0.9 * np.minimum(1, RATIOS), "importance": RATIOS, "q_lambda": np.full((B, T), 0.9)}[method]

    def theirs(r, q, v, d, c):
        return jax.vmap(rlax.general_off_policy_returns_from_q_and_v)(q[:, 1:], v, r, d, c[:, 1:])

    agree(advantages.off_policy_returns, theirs, REWARDS, ACTION_VALUES, NEXT[:, 1:], DISCOUNTS, traces)


def test_clipped_surrogate():
    a = RNG.normal(size=(B, T))

    def ours(log_ratio):
        ones = jnp.ones((B, T))
        return losses.policy_gradient(log_ratio, 0 * log_ratio, a, ones, link=links.ppo_link(0.3, 0.3)).mean(-1)

    def theirs(log_ratio):
        return jax.vmap(lambda ratio, a: rlax.clipped_surrogate_pg_loss(ratio, a, 0.3))(jnp.exp(log_ratio), a)

    agree(ours, theirs, LOG_RATIO)


def test_mpo_with_its_constraint():
    kl = np.abs(RNG.normal(size=B))

    def theirs(logp, temperature, alpha, kl):
        constraint = rlax.LagrangePenalty(temperature, 0.1)
        return rlax.mpo_loss(logp, Q, constraint, [(kl, rlax.LagrangePenalty(alpha, 0.05))], sample_axis=1)[0]

    def ours(logp, temperature, alpha, kl):
        constraint = regression.kl_constraint_loss(kl, alpha, epsilon=0.05)
        return regression.mpo_loss(logp, Q, temperature, epsilon=0.1) + constraint

    agree(ours, theirs, LOGP, jnp.asarray(0.7), jnp.asarray(0.4), kl)


@pytest.mark.parametrize("fraction", [0.5, 0.3, 1.0])
def test_vmpo(fraction):
    def theirs(logp, temperature):
        penalty = rlax.LagrangePenalty(temperature, 0.1)
        out = rlax.vmpo_loss(logp, Q, penalty, [(0 * Q, penalty)], top_k_fraction=fraction)[1]
        return out.policy_loss, out.temperature_loss

    def ours(logp, temperature):
        return tuple(regression.vmpo(logp, Q, jnp.ones((B, N)), temperature, epsilon=0.1, fraction=fraction))

    agree(ours, theirs, LOGP, jnp.asarray(0.7), rtol=RLAX_EPSILON)


def test_vmpo_passes_over_starts_of_episodes():
    kept = np.ones((B, N))
    kept[0, 2] = kept[2, 4] = 0

    def theirs(logp):
        penalty = rlax.LagrangePenalty(jnp.asarray(0.7), 0.1)
        settings = {"restarting_weights": jnp.asarray(kept), "top_k_fraction": 1.0}
        out = rlax.vmpo_loss(logp, Q, penalty, [(0 * Q, penalty)], **settings)[1]
        return out.policy_loss.sum() / (B * N), out.temperature_loss

    def ours(logp):
        out = regression.vmpo(logp, Q, kept, 0.7, epsilon=0.1, fraction=1.0)
        return out.policy_loss.sum() / kept.sum(), out.temperature_loss

    agree(ours, theirs, LOGP, rtol=RLAX_EPSILON)
