"""Self-play: gradients by enumeration; what policies step to is in `test_preference_nash`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.objectives.preference import selfplay

pytestmark = pytest.mark.usefixtures("x64")

REF = np.log([0.4, 0.15, 0.25, 0.2])
FIRST, SECOND = (x.ravel() for x in np.meshgrid(np.arange(4), np.arange(4), indexing="ij"))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def value(theta, payoff, beta):
    """`E payoff - beta KL(pi || ref)`."""
    log_pi = jax.nn.log_softmax(theta)
    return jnp.exp(log_pi) @ (payoff - beta * (log_pi - REF))


# --- Nash-MD ----------------------------------------------------------------------------------------------------------


def test_nash_md_penalises_each_token_for_itself():
    logp, ref, mask = normal(3, 2, 3), normal(4, 2, 3), jnp.array([[1, 1, 0], [1, 1, 1]])
    preference = jnp.array([0.9, 0.3])
    gradient = jax.grad(lambda x: selfplay.nash_md(x, ref, mask, preference, beta=0.2).sum())(logp)
    np.testing.assert_allclose(gradient, mask * (0.2 * (logp - ref) - (preference - 0.5)[:, None]), atol=1e-15)


def test_mixing_tilts_tilts_by_the_mixed_reward():
    base, first, second = normal(5, 3, 6)
    mixed = selfplay.geometric_mixture(base + first / 0.4, base + second / 0.4, mixture=0.3)
    np.testing.assert_allclose(mixed, jax.nn.log_softmax(base + (0.7 * first + 0.3 * second) / 0.4), rtol=1e-12)
    same = selfplay.geometric_mixture(base, base + 2, mixture=0.3)
    np.testing.assert_allclose(same, jax.nn.log_softmax(base), rtol=1e-12)


@pytest.mark.parametrize(("mixture", "allowed"), [(0.0, [0, 2]), (1.0, [0, 1]), (0.5, [0])])
def test_mixture_of_laws_with_forbidden_tokens(mixture, allowed):
    policy, reference = jnp.array([1.0, -jnp.inf, 2.0]), jnp.array([0.5, 1.0, -jnp.inf])
    mixed = selfplay.geometric_mixture(policy, reference, mixture=mixture)
    np.testing.assert_array_equal(np.isfinite(mixed), np.isin(np.arange(3), allowed))
    np.testing.assert_allclose(np.exp(mixed).sum(), 1, rtol=1e-12)


# --- P3O --------------------------------------------------------------------------------------------------------------

WIDE = {"clip_ratio": 1e3, "clip_range": 10.0}


def p3o_of(first, second, old, rewards, **hyper):
    """The loss of pairs with a reference of its own."""
    ref = [jnp.sin(old[0]), jnp.cos(old[1])]
    return selfplay.p3o(first, second, *old, *ref, *rewards, **{"beta": 0.3, **WIDE, **hyper})


def test_p3o_on_policy_is_the_gradient_of_the_regularised_value():
    theta, reward, beta = normal(6, 4), normal(7, 4), 0.35

    def sampled(theta):
        log_pi = jax.nn.log_softmax(theta)
        old, ref = jax.lax.stop_gradient(log_pi), jnp.asarray(REF)
        pairs = [x[i] for x in (log_pi, old, ref, reward) for i in (FIRST, SECOND)]
        return jnp.exp(old[FIRST] + old[SECOND]) @ selfplay.p3o(*pairs, beta=beta, clip_ratio=2.0, clip_range=0.2)

    np.testing.assert_allclose(jax.grad(sampled)(theta), -jax.grad(value)(theta, reward, beta), atol=1e-12)
    np.testing.assert_allclose(jax.grad(sampled)(REF + reward / beta), 0, atol=1e-12)


def test_p3o_on_policy_is_leave_one_out_with_two_samples():
    first, second = normal(8, 2, 5)
    rewards = normal(9, 2, 5)
    slopes = jax.grad(lambda a, b: p3o_of(a, b, (first, second), rewards, beta=0.0).sum(), (0, 1))(first, second)
    loo = rewards[0] - rewards[1]
    np.testing.assert_allclose(slopes[0], -loo / 2, rtol=1e-12)
    np.testing.assert_allclose(slopes[1], loo / 2, rtol=1e-12)


def test_p3o_ignores_what_a_prompt_adds_to_both_rewards():
    first, second, *old = normal(10, 4, 5)
    rewards = normal(11, 2, 5)
    shift = jnp.arange(5.0) ** 2
    np.testing.assert_allclose(
        p3o_of(first, second, old, rewards + shift), p3o_of(first, second, old, rewards), rtol=1e-12
    )


@pytest.mark.parametrize(("gap", "advantage", "moves"), [
    (0.5, 1.0, False), (0.5, -1.0, True), (-0.5, -1.0, False), (-0.5, 1.0, True), (0.1, 1.0, True), (0.1, -1.0, True),
])  # fmt: skip
def test_p3o_stops_outside_the_window_where_it_has_improved(gap, advantage, moves):
    old = jnp.array([-2.0]), jnp.array([-3.0])
    first, second = old[0] + gap / 2, old[1] - gap / 2
    rewards = jnp.array([advantage]), jnp.array([0.0])
    slopes = jax.grad(
        lambda a, b: p3o_of(a, b, old, rewards, beta=0.0, clip_range=0.2).sum(), (0, 1)
    )(first, second)  # fmt: skip
    np.testing.assert_allclose(slopes[0], -advantage / 2 if moves else 0, atol=1e-12)
    np.testing.assert_allclose(slopes[1], advantage / 2 if moves else 0, atol=1e-12)


def test_p3o_weight_is_the_product_of_both_ratios_clipped():
    old = jnp.array([-2.0, -2.0, -2.0]), jnp.array([-3.0, -3.0, -3.0])
    moved = jnp.array([0.1, 2.0, -2.0])
    rewards = jnp.ones(3), jnp.zeros(3)
    slope = jax.grad(lambda a: p3o_of(a, old[1] + 0.2, old, rewards, beta=0.0, clip_ratio=3.0).sum())(old[0] + moved)
    np.testing.assert_allclose(slope, -0.5 * np.array([np.exp(0.3), 3.0, 1 / 3]), rtol=1e-12)


def test_p3o_per_token_has_the_sequence_gradient_twice_and_clips_alone():
    first, second, old_1, old_2, ref_1, ref_2 = -1 + 0.05 * normal(12, 6, 3, 4)
    masks = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]), jnp.ones((3, 4))
    rewards = normal(13, 2, 3)
    hyper = {"beta": 0.3, **WIDE}
    by_token = lambda a, b, **changed: sum(  # noqa: E731
        x.sum() for x in selfplay.p3o_token(a, b, old_1, old_2, ref_1, ref_2, *masks, *rewards, **{**hyper, **changed})
    )
    whole = lambda a, b: selfplay.p3o(  # noqa: E731
        *((x * m).sum(-1) for x, m in zip((a, b, old_1, old_2, ref_1, ref_2), masks * 3, strict=True)),
        *rewards,
        **hyper,
    ).sum()
    tokens, sequence = (jax.grad(f, (0, 1))(first, second) for f in (by_token, whole))
    for a, b in zip(tokens, sequence, strict=True):
        np.testing.assert_allclose(a, 2 * b, rtol=1e-12)
        assert np.abs(a).max() > 0.1
    # A token that has gone far the right way stops, the others go on.
    better = jnp.sign(-tokens[0][1, 0])
    gone = jax.grad(lambda a: by_token(a, second, clip_range=0.5))(old_1.at[1, 2].add(better))
    assert gone[1, 2] == 0
    assert (gone[1, jnp.array([0, 1, 3])] != 0).all()


# --- TRPA -------------------------------------------------------------------------------------------------------------


def trpa_of(logp, ref, old, levels, mask=None, **hyper):
    mask = jnp.ones(logp.shape) if mask is None else mask
    return selfplay.trpa(logp, ref, old, jnp.asarray(levels), mask, **hyper)


def test_trpa_of_two_levels_is_dpo_per_token_and_quiet_at_the_sampling_policy():
    logp, ref = normal(27, 2, 1, 2, 5)
    mask = jnp.array([[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]])
    mean = ((logp - ref) * mask).sum(-1) / mask.sum(-1)
    f = lambda x, kl: trpa_of(x, ref, logp, [[1, 2]], mask, beta=2.0, top_weight=1.0, kl_coef=kl)  # noqa: E731
    np.testing.assert_allclose(f(logp, 0.3), np.logaddexp(0, -2.0 * (mean[:, 0] - mean[:, 1])), rtol=1e-12)
    on_policy = [jax.grad(lambda x, kl=kl: f(x, kl).sum())(logp) for kl in (0.0, 0.3)]
    np.testing.assert_allclose(*on_policy, atol=1e-15)
    moved = logp + 0.1 * normal(28, 1, 2, 5)
    d = (logp - moved) * mask
    np.testing.assert_allclose(f(moved, 0.3) - f(moved, 0.0), [0.3 * (np.exp(d) - d - 1).sum() / 8], rtol=1e-9)


def test_trpa_pairs_of_levels():
    logp, ref = normal(29, 2, 1, 5, 3)
    levels = [[2, 1, 3, 2, 1]]
    s, beta, top = (logp - ref).mean(-1)[0], 0.4, 2.5
    pairs = [(i, j) for i in range(5) for j in range(5) if levels[0][i] < levels[0][j]]
    assert len(pairs) == 2 * 2 + 2 * 1 + 2 * 1
    terms = [np.logaddexp(0, -beta * (top if levels[0][i] == 1 else 1) * (s[i] - s[j])) for i, j in pairs]
    value = trpa_of(logp, ref, logp, levels, beta=beta)
    np.testing.assert_allclose(value, [np.mean(terms)], rtol=1e-12)
    swap = jnp.array([3, 4, 2, 0, 1])  # within levels
    np.testing.assert_allclose(trpa_of(logp[:, swap], ref[:, swap], logp[:, swap], levels, beta=beta), value)


@pytest.mark.parametrize(("level", "sign"), [(1, 1), (2, -1)])
def test_trpa_without_a_pair_moves_all_responses_one_way(level, sign):
    logp, ref = normal(30, 2, 1, 3, 2)
    value = trpa_of(logp, ref, logp, [[level] * 3])
    np.testing.assert_allclose(value, [np.logaddexp(0, -sign * (logp - ref).mean(-1)).mean()], rtol=1e-12)


# --- acceleration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "gains"), [
    (0.5, [1, 2.5, 4.25, 6.125, 8.0625, 10.03125]), (0.0, [1, 2, 3, 4, 5, 6]),
])  # fmt: skip
def test_extrapolated_dpo_gains_as_the_recursion_says(momentum, gains):
    """Exact inner steps `reference e^{r / beta}`: log odds in units of the reward difference over beta."""
    reward, beta = np.array([0.3, -0.2, 0.1, 0.9]), 0.7
    previous = reference = jnp.asarray(REF)
    for gain in gains:
        policy = jax.nn.log_softmax(reference + reward / beta)
        odds = (policy - REF) - (policy - REF)[0]
        np.testing.assert_allclose(odds, gain * (reward - reward[0]) / beta, atol=1e-12)
        reference = selfplay.extrapolate_log_policy(policy, previous, momentum=momentum)
        np.testing.assert_allclose(np.exp(reference).sum(), 1, rtol=1e-12)
        previous = policy


def test_extrapolating_parameters_is_extrapolating_log_linear_policies():
    features = normal(14, 5, 3)
    new, previous = ({"w": normal(seed, 3), "step": jnp.asarray(seed)} for seed in (15, 16))
    moved = selfplay.extrapolate_tree(new, previous, momentum=0.4)
    assert moved["step"] == 15
    policies = [jax.nn.log_softmax(features @ tree["w"]) for tree in (moved, new, previous)]
    expected = selfplay.extrapolate_log_policy(*policies[1:], momentum=0.4)
    np.testing.assert_allclose(policies[0], expected, rtol=1e-12)
    np.testing.assert_allclose(selfplay.extrapolate_log_policy(*policies[1:], momentum=0.0), policies[1], rtol=1e-12)
    low = selfplay.extrapolate_tree(jnp.ones(2, jnp.bfloat16), jnp.zeros(2, jnp.bfloat16), momentum=0.5)
    assert low.dtype == jnp.bfloat16 and low[0] == 1.5  # noqa: PT018


def test_forbidden_tokens_stay_forbidden():
    new, previous = jnp.array([0.0, 1.0, -jnp.inf]), jnp.array([0.5, 0.0, -jnp.inf])
    out = selfplay.extrapolate_log_policy(new, previous, momentum=0.5)
    np.testing.assert_allclose(out, jnp.append(jax.nn.log_softmax(jnp.array([-0.25, 1.5])), -jnp.inf), rtol=1e-12)
    slope = jax.grad(lambda x: selfplay.extrapolate_log_policy(x, previous)[0])(new)
    assert np.isfinite(slope).all()
