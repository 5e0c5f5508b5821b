"""The divergence estimates have the expected gradients of `kl`'s table, by summing over all samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from esscher.core.exact import TabularLM
from esscher.objectives.policy import kl, methods

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
THETA, REF, MU = (RNG.normal(size=5) for _ in range(3))
P, LOG_P = scipy.special.softmax(THETA), scipy.special.log_softmax(THETA)
LOG_REF, LOG_MU = scipy.special.log_softmax(REF), scipy.special.log_softmax(MU)
L = LOG_P - LOG_REF


def gradient_of(coefficients):
    """`E[c grad log pi]`, for a softmax."""
    weights = P * coefficients
    return weights - P * weights.sum()


def to_reverse():
    """The gradient of KL(pi || ref), `E[l grad log pi]`."""
    return gradient_of(L)


def to_forward():
    """The gradient of KL(ref || pi): its score is `pi - ref`."""
    return P - np.exp(LOG_REF)


def in_loss(estimate, sampler=LOG_P):
    """Samples are of `sampler`, whose weights are not differentiated; the estimate is."""
    weights = jnp.exp(jnp.asarray(sampler))
    loss = lambda theta: weights @ estimate(jax.nn.log_softmax(theta), jnp.asarray(LOG_REF))  # noqa: E731
    return jax.jit(jax.grad(loss))(jnp.asarray(THETA))


def of(kind):
    return lambda logp, logp_ref: kl.kl_estimate(logp, logp_ref, kind)


def value(kind):
    return np.asarray(kl.kl_estimate(jnp.asarray(LOG_P), jnp.asarray(LOG_REF), kind))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-13)


def test_the_two_directions_are_what_autodiff_says():
    close(in_loss(lambda logp, ref: jnp.exp(logp) / P * (logp - ref)), to_reverse())
    close(in_loss(lambda logp, ref: -jnp.exp(ref) / P * logp), to_forward())
    assert np.abs(to_reverse() - to_forward()).max() > 0.01
    assert np.abs(to_reverse() + to_forward()).max() > 0.01


def test_values():
    exact = P @ L
    close(P @ value("k1"), exact)
    close(P @ value("k3"), exact)
    assert value("k3").min() >= 0
    assert abs(P @ value("k2") - exact) > 0.01
    assert abs(P @ value("abs") - exact) > 0.01
    l = jnp.array([0.1, -0.3, 0.4, 0])  # noqa: E741
    k3, slope = jax.vmap(jax.value_and_grad(lambda x: kl.kl_estimate(x, jnp.zeros(()), "k3")))(l)
    np.testing.assert_allclose(k3, [0.004837, 0.049859, 0.070320, 0], atol=6e-7)
    np.testing.assert_allclose(slope, [0.095163, -0.349859, 0.329680, 0], atol=6e-7)
    np.testing.assert_allclose(kl.kl_estimate(l, jnp.zeros(4), "k2"), [0.005, 0.045, 0.08, 0], atol=1e-15)


IN_LOSS = {
    "k1": lambda: np.zeros(5),
    "abs": lambda: gradient_of(np.sign(L)),
    "k2": to_reverse,
    "k3": to_forward,
}
IN_REWARD = {"k1": to_reverse, "k3": lambda: to_reverse() - to_forward()}


@pytest.mark.parametrize(("kind", "expected"), IN_LOSS.items(), ids=IN_LOSS)
def test_in_the_loss(kind, expected):
    close(in_loss(of(kind)), expected())


@pytest.mark.parametrize(("kind", "expected"), IN_REWARD.items(), ids=IN_REWARD)
def test_in_the_reward(kind, expected):
    zeros = jnp.zeros((1, 5))
    arrays = (jnp.asarray(LOG_P)[None], jnp.asarray(LOG_REF)[None])
    rewards = kl.kl_in_reward(zeros, *arrays, beta=0.7, kind=kind)[0]
    close(gradient_of(np.asarray(rewards)), -0.7 * expected())


def test_k2_in_the_reward_has_another_gradient():
    assert min(np.abs(gradient_of(value("k2")) - g).max() for g in (to_reverse(), to_forward(), 0 * P)) > 0.01


def test_straight_through_has_the_value_of_one_and_the_gradient_of_another():
    both = jnp.asarray(LOG_P), jnp.asarray(LOG_REF)
    close(kl.straight_through_kl(*both), value("k3"))
    close(in_loss(kl.straight_through_kl), to_reverse())
    close(kl.straight_through_kl(*both, value="k2", gradient="k3"), value("k2"))
    close(in_loss(lambda *pair: kl.straight_through_kl(*pair, value="k2", gradient="k3")), to_forward())


@pytest.mark.parametrize("sampler", [LOG_P, LOG_MU], ids=["of the policy", "of another"])
@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_with_the_ratio_in_front_the_gradient_is_exact(kind, sampler):
    ones = jnp.ones((1, 5))

    def penalty(logp, logp_ref):
        given = {"beta": 0.7, "kind": kind, "ratio": jnp.exp(logp - sampler)[None]}
        return methods.kl_penalty(logp[None], logp_ref[None], ones, **given)[0]

    close(in_loss(penalty, sampler), 0.7 * to_reverse())


def test_k2_with_a_constant_ratio_is_exact_too():
    weight = jnp.exp(LOG_P - LOG_MU)[None]
    penalty = lambda *pair: methods.kl_penalty(  # noqa: E731
        *(x[None] for x in pair), jnp.ones((1, 5)), beta=1.0, kind="k2", ratio=weight
    )[0]
    close(in_loss(penalty, LOG_MU), to_reverse())


def test_of_sequences_the_penalty_must_reach_back():
    """k1 in the reward with returns-to-go is exact; k2 in the loss of each token only in the place where it stands."""
    vocabulary, horizon = 2, 3
    table, other = (jnp.asarray(RNG.normal(size=(7, vocabulary))) for _ in range(2))
    strings = np.indices((vocabulary,) * horizon).reshape(horizon, -1).T
    rows = np.stack([2**t - 1 + strings[:, :t] @ 2 ** np.arange(t)[::-1] for t in range(horizon)], -1).astype(int)
    at = lambda table: jax.nn.log_softmax(table)[rows, strings]  # noqa: E731
    reference = TabularLM(jax.nn.log_softmax(other), horizon).sequence_log_probs()

    def divergence(table):
        logp = TabularLM(jax.nn.log_softmax(table), horizon).sequence_log_probs()
        return jnp.exp(logp) @ (logp - reference)

    exact = jax.jit(jax.grad(divergence))(table)
    p, logp_ref = jnp.exp(at(table).sum(-1)), at(other)
    steps = kl.kl_in_reward(jnp.zeros_like(logp_ref), at(table), logp_ref, beta=1.0)
    returns = jnp.cumsum(steps[:, ::-1], -1)[:, ::-1]
    rewarded = jax.jit(jax.grad(lambda x: p @ (returns * at(x)).sum(-1)))(table)
    close(rewarded, -exact)
    lost = jax.jit(jax.grad(lambda x: p @ kl.kl_estimate(at(x), logp_ref, "k2").sum(-1)))(table)
    assert np.abs(lost - exact).max() > 0.01
    whole = jax.jit(jax.grad(lambda x: p @ kl.kl_estimate(at(x).sum(-1), logp_ref.sum(-1), "k2")))(table)
    close(whole, exact)
