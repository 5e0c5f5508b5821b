"""Policy methods against numbers that were computed apart from them, most by running verl and rlax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import tokens
from esscher.objectives import advantages as adv
from esscher.objectives.policy import group_methods, methods

pytestmark = pytest.mark.usefixtures("x64")

LOGP = [[-0.5, -1, -0.2, -2], [-0.7, -0.1, -1.5, -0.3], [-1.2, -0.4, -0.6, -0.9], [-0.3, -2.2, -0.8, -0.05]]
RATIO = [[0.1, -0.3, 0.4, 0], [0.25, -0.1, 0.05, -0.6], [1.5, -0.2, 0.3, 0.1], [-0.4, 0.2, -0.15, 0.02]]
LENGTHS = [3, 4, 2, 3]
ADVANTAGES = [1.0, -1, -0.5, 2]
REWARDS = [[1.0, 0], [0.5, 0]]
DIGITS = 6e-7  # six decimals are written down


def inputs():
    mask = jnp.arange(4) < jnp.array(LENGTHS)[:, None]
    logp = jnp.where(mask, jnp.asarray(LOGP), jnp.nan)
    return logp, logp - jnp.asarray(RATIO), mask


def divided(fraction):
    return fraction[0] / fraction[1]


def on_golden(method, how, logp, *, old=True, **keywords):
    _, logp_old, mask = inputs()
    arguments = (logp, logp_old, jnp.asarray(ADVANTAGES), mask) if old else (logp, jnp.asarray(ADVANTAGES), mask)
    loss = method(*arguments, **keywords)
    assert loss.dtype == jnp.float64
    length = 4 if how == "constant" else None
    return divided(tokens.aggregate(loss, mask, how, length=length))


DAPO = {"low": 0.2, "high": 0.28}
# method -> (function, keywords, reduction, loss, gradient of the first row where it is known)
POLICY = {
    "verl vanilla": (
        methods.ppo, {**DAPO, "dual": 3.0}, "token-mean", -0.223446, [-0.092098, -0.061735, 0, 0],
    ),
    "verl gspo": (methods.gspo, DAPO, "seq-mean-token-mean", -0.246524, [-0.089078] * 3 + [0]),
    "verl sapo": (methods.sapo, {}, "seq-mean-token-mean", -0.683336, None),
    "verl geo_mean": (methods.gmpo, DAPO, "seq-mean-token-mean", -0.212255, None),
    "verl cispo": (methods.cispo, {}, "token-mean", 0.425396, [-0.092098, -0.066667, -0.106667, 0]),
    "verl gpg": (methods.reinforce, {"old": False}, "token-mean", 0.408333, None),
    "trl grpo": (methods.ppo, {}, "seq-mean-token-mean", -0.125219, None),
    "trl bnpo": (methods.ppo, {}, "token-mean", -0.151475, None),
    "trl dr_grpo": (methods.ppo, {}, "constant", -0.113606, None),
    "trl bnpo, delta": (methods.ppo, {"dual": 2.0}, "token-mean", -0.254879, None),
    "trl cispo": (
        methods.cispo, {"low": 0.0, "high": 5.0}, "token-mean", 0.263471, [-0.092098, -0.061735, -0.124319, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("method", "keywords", "how", "value", "slope"), POLICY.values(), ids=POLICY)
def test_policy_losses(method, keywords, how, value, slope):
    logp, _, mask = inputs()
    loss = jax.value_and_grad(lambda logp: on_golden(method, how, logp, **keywords))
    actual, gradient = jax.jit(loss)(logp)
    np.testing.assert_allclose(actual, value, atol=DIGITS)
    assert not np.asarray(gradient)[~mask].any()
    if slope is not None:
        np.testing.assert_allclose(gradient[0], slope, atol=DIGITS)


def test_gradient_of_the_soft_gate_is_written_for_a_mean_over_tokens():
    """The sheet's row is of the token mean, its loss of the mean of means."""
    gradient = jax.jit(jax.grad(lambda logp: on_golden(methods.sapo, "token-mean", logp)))(inputs()[0])
    np.testing.assert_allclose(gradient[0], [-0.091843, -0.060710, -0.117094, 0], atol=DIGITS)


# --- advantages -------------------------------------------------------------------------------------------------------

SPREAD = {
    "verl grpo": ({}, [0.707106, -0.707106, 0.707105, -0.707105]),
    "trl grpo": ({"eps": 1e-4}, [0.707007, -0.707007, 0.706907, -0.706907]),
    "without a scale": ({"scale": "none"}, [0.5, -0.5, 0.25, -0.25]),
    "rloo": ({"center": "loo", "scale": "none"}, [1, -1, 0.5, -0.5]),
    "opo": ({"center": "length_weighted", "scale": "none"}, [0.571429, -0.428571, 0.3, -0.2]),
    "lite ppo": ({"scale": "batch", "eps": 1e-4}, [1.044248, -1.044248, 0.522124, -0.522124]),
}


@pytest.mark.parametrize(("settings", "expected"), SPREAD.values(), ids=SPREAD)
def test_advantages_of_groups(settings, expected):
    if settings.get("center") == "length_weighted":
        settings = {**settings, "lengths": jnp.array(LENGTHS).reshape(2, 2)}
    actual = adv.group_advantage(jnp.asarray(REWARDS), **settings)
    np.testing.assert_allclose(actual.ravel(), expected, atol=DIGITS)


def test_lite_ppo_over_the_deviation_of_centred_rewards():
    centred = adv.group_advantage(jnp.asarray(REWARDS), scale="none").reshape(1, 4)
    actual = adv.group_advantage(centred, center="none")[0]
    np.testing.assert_allclose(actual, [1.095443, -1.095443, 0.547721, -0.547721], atol=DIGITS)


def advantages_of(method, **keywords):
    """What a method gives each token, by the gradient of its numerator where the policy has not moved."""
    logp, _, mask = inputs()
    old = {} if method in (group_methods.opo, group_methods.gpg, group_methods.remax) else {"logp_old": logp}
    arrays = {"logp": logp, "mask": mask, **old}
    run = lambda logp: method(jnp.asarray(REWARDS), **{**arrays, "logp": logp}, **keywords)[0]  # noqa: E731
    return -jax.jit(jax.grad(run))(logp)


PLUS = [
    [1.247597, 1.469940, 1.716989, 0],
    [-0.753499] * 4,
    [0.358221, 0.481745, 0, 0],
    [-0.753499] * 3 + [0],
]
BASELINE = [1.314056, -1.022044, 0.730031, -0.438019]
# method -> (keywords, the advantage of each row, or of each token)
WHOLE = {
    "gpg": (group_methods.gpg, {}, [1, -1, 0.5, -0.5]),
    "opo": (group_methods.opo, {}, [0.571429, -0.428571, 0.3, -0.2]),
    "dapo": (group_methods.dapo, {}, [0.707106, -0.707106, 0.707105, -0.707105]),
    "lite_ppo": (group_methods.lite_ppo, {}, [1.044248, -1.044248, 0.522124, -0.522124]),
    "dr_grpo": (group_methods.dr_grpo, {"length": 9.0}, [0.5, -0.5, 0.25, -0.25]),
    "reinforce_plus_plus_baseline": (group_methods.reinforce_plus_plus_baseline, {}, BASELINE),
    "reinforce_plus_plus": (group_methods.reinforce_plus_plus, {"gamma": 0.9}, PLUS),
}


@pytest.mark.parametrize(("method", "keywords", "expected"), WHOLE.values(), ids=WHOLE)
def test_advantages_of_whole_methods(method, keywords, expected):
    mask = np.asarray(inputs()[2])
    expected = np.asarray(expected, float)
    expected = expected if expected.ndim == 2 else expected[:, None] * mask
    np.testing.assert_allclose(advantages_of(method, **keywords), expected, atol=DIGITS)


def test_advantages_of_methods_that_average_each_sequence():
    """By the token, A over the length."""
    mask, lengths = np.asarray(inputs()[2]), np.asarray(LENGTHS)[:, None]
    for method, expected in ((group_methods.grpo, SPREAD["verl grpo"][1]), (group_methods.bnpo, None)):
        if expected is None:
            expected = group_methods.beta_normalized_advantage(jnp.asarray(REWARDS)).ravel()
        expected = np.asarray(expected)[:, None] * mask / lengths
        np.testing.assert_allclose(advantages_of(method), expected, atol=DIGITS)
    # One ratio for the sequence: each token moves it by itself, and the mean is of equal numbers.
    expected = np.asarray(SPREAD["rloo"][1])[:, None] * mask
    np.testing.assert_allclose(advantages_of(group_methods.rloo), expected, atol=DIGITS)


def test_denominators_of_whole_methods():
    logp, logp_old, mask = inputs()
    arrays = (jnp.asarray(REWARDS), logp, logp_old, mask)
    same = jnp.array([[0.5, 0.5], [1.0, 0.0]])
    assert group_methods.grpo(*arrays)[1] == 4
    assert group_methods.grpo(*arrays, how="token-mean")[1] == 12
    assert group_methods.grpo(*arrays, how="group-mean-token-mean")[1] == 2
    assert group_methods.dr_grpo(*arrays, length=9.0)[1] == 36
    assert group_methods.dapo(*arrays)[1] == 12
    assert group_methods.dapo(same, *arrays[1:])[1] == 5  # of the second group
    assert group_methods.rloo(*arrays)[1] == group_methods.bnpo(*arrays)[1] == 4
    assert group_methods.remax(arrays[0], jnp.zeros(2), logp, mask)[1] == 4


def test_rewards_that_are_missing_move_nothing():
    logp, _, mask = inputs()
    rewards = jnp.array([[1.0, jnp.nan], [0.5, 0]])
    for method in (group_methods.reinforce_plus_plus, group_methods.reinforce_plus_plus_baseline, group_methods.grpo):
        gradient = jax.grad(lambda logp, method=method: method(rewards, logp, logp, mask)[0])(logp)
        assert np.isfinite(gradient).all()
        assert not gradient[1].any()
        assert gradient[3].any()
    kept = np.asarray(mask) & (np.arange(4) != 1)[:, None]
    gain = np.array([0.0, np.nan, 0.25, -0.25])[:, None] * np.ones(4)
    whitened = (gain - gain[kept].mean()) / np.sqrt(gain[kept].var(ddof=1) + 1e-8)
    actual = jax.grad(lambda x: group_methods.reinforce_plus_plus_baseline(rewards, x, logp, mask)[0])(logp)
    np.testing.assert_allclose(actual, np.where(kept, -whitened, 0), atol=1e-12)


def test_divergences_are_taken_off_rewards_or_added_to_losses():
    logp, logp_old, mask = inputs()
    l, r = jnp.where(mask, jnp.asarray(RATIO), 0), jnp.asarray(REWARDS)  # noqa: E741
    rloo = jax.grad(lambda x, r, **given: group_methods.rloo(r, x, logp, mask, **given)[0])
    with_it, without = rloo(logp, r, logp_ref=logp_old, beta=0.3), rloo(logp, r)
    np.testing.assert_allclose(with_it, rloo(logp, r - 0.3 * l.sum(-1).reshape(2, 2)), atol=1e-14)
    assert abs(with_it - without).max() > 0.01
    for kind, value in (("k2", l**2 / 2), ("k3", jnp.exp(-l) - 1 + l)):
        given = {"logp_ref": logp_old, "beta": 0.3, "kl": kind}
        for method, kept in ((group_methods.grpo, LENGTHS), (group_methods.reinforce_plus_plus_baseline, [1] * 4)):
            gap = method(r, logp, logp, mask, **given)[0] - method(r, logp, logp, mask)[0]
            np.testing.assert_allclose(gap, 0.3 * (value.sum(-1) / jnp.array(kept)).sum(), rtol=1e-12)
    # REINFORCE++ by hand: rewards at the last token less the divergence of each, summed to the end, whitened.
    steps = np.array(-0.3 * l)
    steps[range(4), np.array(LENGTHS) - 1] += np.ravel(REWARDS)
    returns, kept = np.cumsum(steps[:, ::-1], 1)[:, ::-1], np.asarray(mask)
    expected = (returns - returns[kept].mean()) / np.sqrt(returns[kept].var(ddof=1) + 1e-8) * kept
    arrays = {"logp_old": logp, "mask": mask, "logp_ref": logp_old}
    actual = jax.grad(lambda x: group_methods.reinforce_plus_plus(r, x, **arrays, beta=0.3)[0])(logp)
    np.testing.assert_allclose(actual, -expected, atol=1e-12)


# --- along a trajectory -----------------------------------------------------------------------------------------------


def test_returns_of_rlax():
    r, d = jnp.array([[0.0, 0, 1]]), jnp.array([[0.99, 0.99, 0]])
    v, following = jnp.array([[0.1, 0.2, 0.3, 0.4]]), jnp.array([[0.2, 0.3, 0.4]])
    close = lambda actual, expected: np.testing.assert_allclose(actual[0], expected, atol=DIGITS)  # noqa: E731
    close(adv.lambda_returns(r, following, d, 0.95), [0.908407, 0.955350, 1])
    close(adv.gae(r, v, d, 0.95), [0.808407, 0.755350, 0.7])
    out = adv.vtrace(r, v, d, jnp.array([[0.5, 2, 1.2]]), 0.9)
    close(out.targets - v[:, :-1], [0.370072, 0.720700, 0.7])
    close(out.advantages, [0.370072, 0.720700, 0.7])
    q, c = jnp.array([[9.0, 0.25, 0.35]]), jnp.array([[9.0, 0.45, 0.9]])
    close(adv.off_policy_returns(r, q, following, d, c), [0.476950, 0.876150, 1])


def test_holes_are_passed_over_as_in_verl():
    r, d, v = jnp.zeros((1, 4)), jnp.full((1, 4), 0.99), jnp.array([[0.5, jnp.nan, 0.3, 0.2, 0.0]])
    actual = adv.gae(r, v, d, 0.95, mask=jnp.array([[1, 0, 1, 1]]))
    np.testing.assert_allclose(actual, [[-0.475839, 0, -0.2901, -0.2]], atol=DIGITS)


def test_scans_are_loops_backwards():
    rng = np.random.default_rng(0)
    x, f, v, lam = rng.normal(size=(3, 9)), rng.uniform(-1, 1, (3, 9)), rng.normal(size=(3, 10)), rng.uniform(size=3)
    d, mask = np.abs(f), rng.uniform(size=(3, 9)) < 0.6
    plain, masked, following, after = np.zeros((3, 9)), np.zeros((3, 9)), v[:, -1].copy(), np.zeros(3)
    y = np.zeros(3)
    for t in reversed(range(9)):
        y = x[:, t] + f[:, t] * y
        plain[:, t] = y
        step = x[:, t] + d[:, t] * following - v[:, t] + d[:, t] * lam * after
        after = np.where(mask[:, t], step, after)
        following = np.where(mask[:, t], v[:, t], following)
        masked[:, t] = np.where(mask[:, t], after, 0)
    np.testing.assert_allclose(jax.jit(adv.discounted_suffix_sum)(jnp.asarray(x), jnp.asarray(f)), plain, atol=1e-14)
    arrays = map(jnp.asarray, (x, v, d, lam))
    np.testing.assert_allclose(jax.jit(adv.gae)(*arrays, mask=jnp.asarray(mask)), masked, atol=1e-14)


def test_identities_of_returns():
    rng = np.random.default_rng(1)
    r, d, v = (jnp.asarray(x) for x in (rng.normal(size=(3, 6)), rng.uniform(size=(3, 6)), rng.normal(size=(3, 7))))
    lambda_returns, gae = jax.jit(adv.lambda_returns), jax.jit(adv.gae)
    vtrace = jax.jit(lambda lam: adv.vtrace(r, v, d, jnp.ones((3, 6)), lam))
    for lam in (0.0, 0.4, 1.0):
        returns = lambda_returns(r, v[:, 1:], d, lam)
        np.testing.assert_allclose(returns - v[:, :-1], gae(r, v, d, lam), atol=1e-14)
        np.testing.assert_allclose(vtrace(lam).targets, returns, atol=1e-14)
    sampled, y = np.zeros((3, 6)), np.asarray(v[:, -1])
    for t in reversed(range(6)):
        y = np.asarray(r[:, t] + d[:, t] * y)
        sampled[:, t] = y
    np.testing.assert_allclose(vtrace(1.0).targets, sampled, atol=1e-14)
    np.testing.assert_allclose(vtrace(0.0).targets, r + d * v[:, 1:], atol=1e-14)


# --- reductions -------------------------------------------------------------------------------------------------------

REDUCED = {"token-mean": -0.766667, "seq-mean-token-sum": -2.3, "seq-mean-token-mean": -0.779167}


@pytest.mark.parametrize(("how", "expected"), REDUCED.items(), ids=REDUCED)
def test_reductions(how, expected):
    logp, _, mask = inputs()
    np.testing.assert_allclose(divided(tokens.aggregate(logp, mask, how)), expected, atol=DIGITS)


def test_constant_length_is_a_batch_th_of_what_verl_divides_by():
    logp, _, mask = inputs()
    np.testing.assert_allclose(4 * divided(tokens.aggregate(logp, mask, "constant", length=4)), -2.3, atol=DIGITS)
