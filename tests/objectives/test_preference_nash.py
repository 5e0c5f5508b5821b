"""Games without a reward: what INPO, DNO, SPPO and Nash-MD step to, in closed form, and what their steps lead to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.objectives.preference import anchored, links, losses, pair_scores, pairs, scores, selfplay

pytestmark = pytest.mark.usefixtures("x64")

# Rock, paper, scissors, and something that loses to all; the reference does not like them equally.
WINS = np.array([
    [0.5, 0.9, 0.2, 0.8],
    [0.1, 0.5, 0.85, 0.9],
    [0.8, 0.15, 0.5, 0.7],
    [0.2, 0.1, 0.3, 0.5],
])  # fmt: skip
REF = np.log([0.4, 0.15, 0.25, 0.2])
FIRST, SECOND = (x.ravel() for x in np.meshgrid(np.arange(4), np.arange(4), indexing="ij"))


def normalise(log_pi):
    return log_pi - np.logaddexp.reduce(log_pi)


def inpo_step(log_pi, tau, eta):
    return normalise(tau / eta * REF + (1 - tau / eta) * log_pi + WINS @ np.exp(log_pi) / eta)


def dno_step(log_pi, eta):
    return normalise(log_pi + WINS @ np.exp(log_pi) / eta)


def nash_md_step(log_pi, tau, step):
    mixture = normalise((1 - step * tau) * log_pi + step * tau * REF)
    return normalise(mixture + step * WINS @ np.exp(mixture))


def iterate(step, n, log_pi=REF):
    history = [log_pi]
    for _ in range(n):
        history.append(step(history[-1]))
    return np.array(history)


@functools.cache
def nash(tau):
    """The fixed point `softmax(log ref + P pi / tau)`, by steps far shorter than any method's."""
    log_pi = REF
    for _ in range(4000):
        log_pi = normalise(log_pi + 0.1 * (REF + WINS @ np.exp(log_pi) / tau - log_pi))
    assert np.abs(log_pi - normalise(REF + WINS @ np.exp(log_pi) / tau)).max() < 1e-14
    return log_pi


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


# --- steps are what the pair losses have as optimum -------------------------------------------------------------------


def population(theta, log_pi, reference, weight, **pair):
    """Mean pair loss over both responses drawn from `pi_t`, of scores against a reference."""
    h = scores.log_ratio(jax.nn.log_softmax(theta), reference)
    pi = np.exp(log_pi)
    return (pi[FIRST] * pi[SECOND] * weight) @ losses.pairwise(h[FIRST], h[SECOND], **pair)


def test_inpo_loss_is_stationary_at_its_step():
    tau, eta, log_pi = 0.2, 0.5, np.asarray(jax.nn.log_softmax(normal(0, 4)))
    reference = scores.mixed_reference(jnp.stack([REF, log_pi]), jnp.array([tau / eta, 1 - tau / eta]))
    gradient = jax.grad(population)
    pair = {"beta": 1.0, "link": links.squared_link(1 / (2 * eta))}
    labelled = WINS[FIRST, SECOND]
    at_step = gradient(inpo_step(log_pi, tau, eta), log_pi, reference, labelled, **pair)
    np.testing.assert_allclose(at_step, 0, atol=1e-14)
    assert np.abs(gradient(log_pi, log_pi, reference, labelled, **pair)).max() > 1e-2
    # The ends: ratio 1 is IPO against the reference, 0 against the policy that sampled.
    for ratio, end in ((1.0, REF), (0.0, log_pi)):
        mixed = scores.mixed_reference(jnp.stack([REF, log_pi]), jnp.array([ratio, 1 - ratio]))
        step = inpo_step(log_pi, ratio * eta, eta)
        np.testing.assert_allclose(mixed, end, atol=1e-15)
        np.testing.assert_allclose(gradient(step, log_pi, mixed, labelled, **pair), 0, atol=1e-14)


def test_dno_loss_is_stationary_at_its_step():
    eta, log_pi = 0.3, np.asarray(jax.nn.log_softmax(normal(1, 4)))
    rewards = WINS @ np.exp(log_pi)
    label = jax.nn.sigmoid(rewards[FIRST] - rewards[SECOND])
    gradient = lambda theta: jax.grad(population)(  # noqa: E731
        theta, log_pi, jnp.asarray(log_pi), 1.0, beta=eta, label_prob=label
    )
    np.testing.assert_allclose(gradient(dno_step(log_pi, eta)), 0, atol=1e-14)
    assert np.abs(gradient(log_pi)).max() > 1e-3
    ties = jax.grad(population)(log_pi, log_pi, jnp.asarray(log_pi), 1.0, beta=eta, label_prob=0.5)
    np.testing.assert_allclose(ties, 0, atol=1e-16)


def value(theta, payoff, beta):
    """`E payoff - beta KL(pi || ref)`."""
    log_pi = jax.nn.log_softmax(theta)
    return jnp.exp(log_pi) @ (payoff - beta * (log_pi - REF))


def test_pair_losses_of_the_policys_own_samples_are_policy_gradients():
    """IPO's is that of `P(pi > sg pi) - tau KL`, squared regression's that of the KL-regularised reward."""
    theta, reward, tau = normal(40, 4), normal(41, 4), 0.6
    log_pi, ref = np.asarray(jax.nn.log_softmax(theta)), jnp.asarray(REF)
    online = jax.grad(population)
    labelled = 2 * WINS[FIRST, SECOND]  # either of the pair may win
    ipo = online(theta, log_pi, ref, labelled, beta=1.0, link=links.squared_link(1 / (2 * tau)))
    np.testing.assert_allclose(ipo, -4 / tau * jax.grad(value)(theta, WINS @ np.exp(log_pi), tau), atol=1e-12)
    link = links.squared_link(reward[FIRST] - reward[SECOND])
    regression = online(theta, log_pi, ref, 1.0, beta=tau, link=link)
    np.testing.assert_allclose(regression, -4 * tau * jax.grad(value)(theta, reward, tau), atol=1e-12)


# --- and where they lead: the losses themselves, each step solved -----------------------------------------------------


def inpo_loss(log_pi, *pair, tau, eta):
    given = {"previous_chosen": log_pi[FIRST], "previous_rejected": log_pi[SECOND], "eta": eta, "ratio": tau / eta}
    return WINS[FIRST, SECOND] * pair_scores.inpo(*pair, REF[FIRST], REF[SECOND], **given)


def win_rates(log_pi):
    wins = WINS @ jnp.exp(log_pi)
    return {"win_rate_chosen": wins[FIRST], "win_rate_rejected": wins[SECOND]}


def dno_loss(log_pi, *pair, eta):
    return pairs.dno(*pair, log_pi[FIRST], log_pi[SECOND], **win_rates(log_pi), beta=eta)


def sppo_loss(log_pi, *pair, eta):
    return anchored.sppo(*pair, log_pi[FIRST], log_pi[SECOND], **win_rates(log_pi), beta=eta)


def solve(loss, log_pi, **hyper):
    """The policy of least expected loss over pairs of `pi_t`, by Newton's method.

    Rows are over their probabilities, so that what is rare is as well conditioned; logits leave a constant free.
    """
    pi = jnp.exp(log_pi)

    def risk(theta):
        policy = jax.nn.log_softmax(theta)
        return (pi[FIRST] * pi[SECOND]) @ loss(log_pi, policy[FIRST], policy[SECOND], **hyper)

    def improve(theta, _):
        curvature = jax.hessian(risk)(theta) / pi[:, None] + jnp.tile(pi, (4, 1))
        return theta - jnp.linalg.solve(curvature, jax.grad(risk)(theta) / pi), None

    return jax.nn.log_softmax(jax.lax.scan(improve, log_pi, length=6)[0])


def nash_md_descent(log_pi, tau, step):
    """A step along the natural gradient: against the loss's slope in the log-probabilities."""
    mixture = selfplay.geometric_mixture(log_pi, jnp.asarray(REF), mixture=step * tau)

    def loss(log_pi):
        ones, wins = jnp.ones((4, 1)), WINS @ jnp.exp(mixture)
        return selfplay.nash_md(log_pi[:, None], jnp.asarray(REF)[:, None], ones, wins, beta=tau).sum()

    return jax.nn.log_softmax(log_pi - step * jax.grad(loss)(log_pi))


def follow(step, n):
    """As `iterate`, compiled."""
    _, path = jax.jit(lambda x: jax.lax.scan(lambda x, _: (step(x),) * 2, x, length=n))(jnp.asarray(REF))
    return np.concatenate([REF[None], path])


GAME = np.array([WINS[1, 2] - 0.5, WINS[2, 0] - 0.5, WINS[0, 1] - 0.5, 0])
GAME = GAME / GAME.sum()
"""The Nash policy of the game itself: the cycle's arms, each by the edge opposite to it; the fourth is dominated."""


def exploit(pi):
    """By how much the best answer to a policy wins."""
    return (WINS @ pi).max() - 0.5


def averages(path):
    return np.cumsum(np.exp(path), 0) / np.arange(1, len(path) + 1)[:, None]


def test_the_game_has_one_exact_nash_policy():
    np.testing.assert_allclose((WINS @ GAME)[:3], 0.5, atol=1e-15)
    assert (WINS @ GAME)[3] < 0.5
    assert exploit(np.exp(REF)) > 0.05
    assert np.ptp(GAME[:3]) > 0.05  # so that the uniform policy is not it


@pytest.mark.parametrize("tau", [0.1, 0.4])
def test_inpo_converges_to_the_regularised_nash_policy(tau):
    path = follow(functools.partial(solve, inpo_loss, tau=tau, eta=3 * tau), 400)
    np.testing.assert_allclose(path, iterate(lambda x: inpo_step(x, tau, eta=3 * tau), 400), atol=1e-11)
    np.testing.assert_allclose(path[-1], nash(tau), atol=1e-12)
    gaps = np.abs(path - nash(tau)).max(-1)
    assert gaps[100] < 1e-3 * gaps[0]
    pi = np.exp(path)
    payoff = pi @ WINS.T - tau * (path - REF)  # against oneself, regularised
    regret = tau * np.logaddexp.reduce(REF + pi @ WINS.T / tau, axis=-1) - np.sum(pi * payoff, -1)
    assert regret[0] > 1e-2
    assert -1e-15 < regret[-1] < 1e-12


def test_dno_averages_towards_nash_but_does_not_stay():
    """No anchor: policies turn around the game's Nash policy outwards, their averages approach it; INPO's stay.

    The bound is the regret of multiplicative weights with a fixed step `1 / eta`.
    """
    eta = 4.0
    path = follow(functools.partial(solve, dno_loss, eta=eta), 4000)
    np.testing.assert_allclose(path[:300], iterate(lambda x: dno_step(x, eta), 299), atol=1e-9)
    average = averages(path)
    for n in (100, 1000, 4000):
        assert exploit(average[n]) < -REF.min() * eta / n + 1 / (8 * eta)
    assert exploit(average[4000]) < 0.2 * exploit(average[100])
    assert exploit(average[4000]) < 0.01
    assert np.mean([exploit(np.exp(log_pi)) for log_pi in path[-500:]]) > 0.1
    assert path[-1, 3] < np.log(1e-12)


def test_sppo_averages_towards_nash_too():
    path = follow(functools.partial(solve, sppo_loss, eta=4.0), 4000)
    average = averages(path)
    assert exploit(average[4000]) < 0.2 * exploit(average[100])
    assert exploit(average[4000]) < 0.01
    np.testing.assert_allclose(average[4000], GAME, atol=0.02)
    assert np.mean([exploit(np.exp(log_pi)) for log_pi in path[-500:]]) > 0.05


def test_sppo_steps_differ_from_multiplicative_weights_in_third_order():
    """A half stands for the normaliser, so that the regression has a rest, and its minimum is not quite the step."""
    log_pi = np.asarray(jax.nn.log_softmax(normal(17, 4)))
    pi, sppo_step, gaps, rests = np.exp(log_pi), jax.jit(functools.partial(solve, sppo_loss)), [], []
    for eta in (4.0, 8.0, 16.0):
        step = sppo_step(jnp.asarray(log_pi), eta=eta)
        gaps.append(np.abs(step - dno_step(log_pi, eta)).max())
        rests.append((pi[FIRST] * pi[SECOND]) @ sppo_loss(log_pi, step[FIRST], step[SECOND], eta=eta))
    assert gaps[0] < 1e-2
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 2**3, rtol=0.1)
    np.testing.assert_allclose(np.divide(rests[:-1], rests[1:]), 2**4, rtol=0.1)  # the square of a second order


def test_iterated_dpo_cycles_where_inpo_converges():
    """Hard labels of pairs from `pi_t`, reference `pi_t`: each step tilts by the Bradley-Terry fit of a cycle."""
    beta = 1.0

    def fit(log_pi):
        """Bradley-Terry rewards by Newton's method, pairs weighted by `pi_t`."""
        pi, r = np.exp(log_pi), np.zeros(4)
        weight = np.outer(pi, pi) + 1e-12
        for _ in range(20):
            s = 1 / (1 + np.exp(r[None] - r[:, None]))
            curvature = weight * s * (1 - s)
            r = r + np.linalg.solve(np.diag(curvature.sum(1)) - curvature + 1 / 4, (weight * (WINS - s)).sum(1))
        return r

    step = lambda log_pi: normalise(log_pi + fit(log_pi) / beta)  # noqa: E731
    path = iterate(step, 60)
    log_pi = path[1]  # the step is what DPO's population loss has as optimum
    gradient = jax.grad(population)(step(log_pi), log_pi, jnp.asarray(log_pi), WINS[FIRST, SECOND], beta=beta)
    np.testing.assert_allclose(gradient, 0, atol=1e-9)
    late = np.exp(path[30:])
    assert {0, 1, 2} <= set(late.argmax(-1))  # each in turn is almost all there is
    assert late.max(-1).mean() > 0.7
    moves = np.abs(np.diff(np.exp(path), axis=0)).max(-1)
    assert moves[30:].max() > 0.3
    steady = np.exp(iterate(lambda x: inpo_step(x, 0.3, 1.0), 60))
    assert np.abs(np.diff(steady, axis=0)).max(-1)[50:].max() < 1e-4


def test_nash_md_stops_near_the_nash_policy_at_a_distance_of_its_step():
    tau, gaps = 0.5, []
    for step in (0.4, 0.2, 0.1):
        path = follow(functools.partial(nash_md_descent, tau=tau, step=step), 1500)
        np.testing.assert_allclose(path[:50], iterate(lambda x, step=step: nash_md_step(x, tau, step), 49), atol=1e-12)
        np.testing.assert_allclose(path[-1], path[-2], atol=1e-13)
        gaps.append(np.abs(path[-1] - nash(tau)).max())
    assert gaps[0] < 0.2
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 2, rtol=0.15)


def test_nash_md_gradient_is_that_of_the_game_against_the_mixture():
    theta, beta = normal(2, 4), 0.3
    mixture = selfplay.geometric_mixture(theta, jnp.asarray(REF), mixture=0.6)
    np.testing.assert_allclose(mixture, normalise(0.4 * np.asarray(theta) + 0.6 * REF), rtol=1e-12)
    wins = WINS @ np.exp(mixture)

    def sampled(theta):
        logp = jax.nn.log_softmax(theta)[:, None]
        loss = selfplay.nash_md(logp, jnp.asarray(REF)[:, None], jnp.ones((4, 1)), jnp.asarray(wins), beta=beta)
        return jax.lax.stop_gradient(jax.nn.softmax(theta)) @ loss

    np.testing.assert_allclose(jax.grad(sampled)(theta), -jax.grad(value)(theta, wins, beta), atol=1e-14)
