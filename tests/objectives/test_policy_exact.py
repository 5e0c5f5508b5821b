r"""Expected gradients of estimators, by enumeration of all groups of all strings, against the exact gradient.

The policy is a table of next-token logits over strings of three tokens of two, in float64; a group of `G` strings is
one of `8^G`. What is exact, by which factor it is not, and which estimators are biased, is derived beside each test.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.objectives.advantages import group_advantage
from esscher.objectives.policy import links
from esscher.objectives.policy.losses import policy_gradient
from esscher.objectives.policy.ratios import importance_weight

pytestmark = pytest.mark.usefixtures("x64")

V, T = 2, 3
N = V**T
STRINGS = np.array(list(itertools.product(range(V), repeat=T)))
ROWS = np.zeros((N, T), int)  # of the table, for the prefix before each token
for position in range(1, T):
    ROWS[:, position] = (V**position - 1) // (V - 1) + STRINGS[:, :position] @ V ** np.arange(position)[::-1]
RNG = np.random.default_rng(0)
THETA, OTHER = RNG.normal(size=(2, 7, V))
SOLVED = np.array([0.0, 1, 0, 0, 1, 0, 0, 1])  # real rewards have two that are equal
REAL = np.array([0.5, -1.25, 2.0, 0.5, 0.0, 1.5, -0.25, 9.0])
REWARDS = {"binary": SOLVED, "real": REAL}


def token_logps(theta):
    """Log-probabilities of the tokens of all strings, `[N, T]`."""
    return jax.nn.log_softmax(theta)[ROWS, STRINGS]


def probabilities(theta):
    """Of all strings, in NumPy, `[N]`."""
    logits = np.asarray(theta)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.exp(logps[ROWS, STRINGS].sum(-1))


def scores(theta):
    """`grad log pi(y)` of all strings, `[N, 7, V]`, by the softmax rule `1[v] - pi(v)`."""
    logits = np.asarray(theta)
    pi = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = np.zeros((N, *logits.shape))
    for y, t in itertools.product(range(N), range(T)):
        out[y, ROWS[y, t]] += np.eye(V)[STRINGS[y, t]] - pi[ROWS[y, t]]
    return out


PI, SCORES = probabilities(THETA), scores(THETA)


def exact(rewards):
    """`grad E r`."""
    return np.einsum("n,n,nrv->rv", PI, rewards, SCORES)


def groups(size):
    """All groups of strings, `[N^G, G]`, and their probabilities."""
    index = np.array(list(itertools.product(range(N), repeat=size)))
    return index, PI[index].prod(-1)


@functools.partial(jax.jit, static_argnames=("level", "link"))
def descend(theta, index, logp_old, advantages, chance, weight, level="token", link=links.score_link):
    """Minus the gradient of the loss: summed over tokens, averaged over each group and over groups of these chances."""
    logp = token_logps(theta)[index.reshape(-1)]
    losses = lambda theta: policy_gradient(  # noqa: E731
        token_logps(theta)[index.reshape(-1)],
        logp if logp_old is None else logp_old[index.reshape(-1)],
        advantages.reshape(-1),
        jnp.ones_like(logp),
        level=level,
        link=link,
        weight=weight,
    )
    share = jnp.repeat(chance / index.shape[1], index.shape[1])
    return -jax.grad(lambda theta: share @ losses(theta).sum(-1))(theta)


def expected(advantages, index, chance):
    return np.asarray(descend(THETA, index, None, advantages, chance, None))


@functools.partial(jax.jit, static_argnames=("center", "scale", "ddof"))
def advantage(rewards, eps=1e-6, *, center="mean", scale="group", ddof=1):
    return group_advantage(rewards, center=center, scale=scale, ddof=ddof, eps=eps)


def close(actual, desired, **more):
    np.testing.assert_allclose(actual, desired, **{"rtol": 1e-10, "atol": 1e-13, **more})


def test_the_oracle_of_scores_is_what_autodiff_gives():
    close(jax.jacobian(lambda theta: token_logps(theta).sum(-1))(THETA), SCORES)
    close(np.einsum("n,nrv->rv", PI, SCORES), np.zeros((7, V)))


# --- unscaled groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("center", ["loo", "mean", "none"])
def test_unscaled_advantages_are_exact_up_to_the_share_of_the_others(center, size, kind):
    """Sample i is in its own mean with weight 1 / G, and `E r_j grad log pi(y_i) = 0` for the others: (G - 1) / G."""
    index, chance = groups(size)
    gradient = expected(advantage(REWARDS[kind][index], center=center, scale="none"), index, chance)
    factor = (size - 1) / size if center == "mean" else 1
    close(gradient, factor * exact(REWARDS[kind]))


def test_right_and_wrong_answers_alone_each_give_the_whole_gradient():
    """`E[(r - 1) grad log pi] = E[r grad log pi]`: positive, negative, and both as one with rewards of +-1."""
    index, chance = groups(1)
    right, wrong = SOLVED[index], SOLVED[index] - 1
    close(expected(right, index, chance), exact(SOLVED))
    close(expected(wrong, index, chance), exact(SOLVED))
    close(expected(right + wrong, index, chance), 2 * exact(SOLVED))
    close(expected(0.1 * right + wrong, index, chance), 1.1 * exact(SOLVED))
    losses = [
        np.asarray(policy_gradient(jnp.log(PI)[:, None], jnp.zeros((N, 1)), jnp.asarray(a[:, 0]), jnp.ones((N, 1))))
        for a in (right, wrong, 2 * right - 1)
    ]
    close(losses[0] + losses[1], losses[2])


# --- groups scaled by their std ---------------------------------------------------------------------------------------
#
# With K of G right, `A_i = (r_i - K / G) h(K)`. Given K, a right answer has the score `grad p / p` on average and a
# wrong one `-grad p / (1 - p)`, so that `E mean_i A_i grad log pi(y_i) = c grad p` with
# `c = E[K (G - K) / G^2 h(K)] / (p (1 - p))`.


def binomial(size, p):
    k = np.arange(size + 1)
    return np.array([math.comb(size, i) for i in k]) * p**k * (1.0 - p) ** (size - k)


def factor(size, p, eps=0.0, ddof=0):
    k = np.arange(1, size)
    variance = k * (size - k) / size**2
    h = 1 / (np.sqrt(variance * size / (size - ddof)) + eps)
    return binomial(size, p)[1:-1] @ (variance * h) / (p * (1 - p))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("ddof", "eps"), [(0, 1e-14), (1, 1e-14), (0, 0.3), (1, 0.3)])
def test_scaled_advantages_of_binary_rewards_ascend_by_a_factor_of_the_pass_rate(size, ddof, eps):
    index, chance = groups(size)
    p, gradient = PI @ SOLVED, expected(advantage(SOLVED[index], eps, ddof=ddof), index, chance)
    close(gradient, factor(size, p, eps, ddof) * exact(SOLVED), rtol=1e-9)
    if eps < 1e-9:
        closed = {2: 1, 3: math.sqrt(2)}[size] * math.sqrt((size - ddof) / size)
        close(gradient, closed * exact(SOLVED), rtol=1e-9)


def factor_of_library(size, p, **modes):
    """`E a_right(K' + 1) + E |a_wrong(K')|` over the other `G - 1` answers, from the advantages at all counts."""
    rows = (np.arange(size) < np.arange(size + 1)[:, None]) * 1.0
    a = np.asarray(advantage(rows, 1e-14, **modes))
    others = binomial(size - 1, p)
    return others @ a[1:, 0] - others @ a[:-1, -1]


TABLE = {  # of population stds, in p; of the sheet, to six digits
    4: [1.710006, 1.690282, 1.645032, 1.616025],
    8: [2.473063, 2.327689, 2.026116, 1.855656],
    16: [3.267097, 2.847812, 2.197914, 1.934123],
    64: [4.336435, 3.254773, 2.284805, 1.984186],
}


@pytest.mark.parametrize("size", TABLE)
def test_factors_of_larger_groups_by_counts(size):
    rates = np.array([0.05, 0.1, 0.25, 0.5])
    out = [factor_of_library(size, p, ddof=0) for p in rates]
    np.testing.assert_allclose(out, TABLE[size], atol=5.1e-7)
    close(out, [factor(size, p) for p in rates])
    close([factor_of_library(size, p, ddof=1) for p in rates], np.array(out) * math.sqrt((size - 1) / size))
    close([factor_of_library(size, p, center="loo", scale="none") for p in rates], np.ones(4))
    # The factor is also E mean|A| / (2 p (1 - p)), and nears 1 / sqrt(p (1 - p)) from below.
    rows = (np.arange(size) < np.arange(size + 1)[:, None]) * 1.0
    mean_size = np.abs(np.asarray(advantage(rows, 1e-14, ddof=0))).mean(-1)
    close([binomial(size, p) @ mean_size / (2 * p * (1 - p)) for p in rates], out)
    assert (np.array(out) < 1 / np.sqrt(rates * (1 - rates))).all()


def test_factor_of_four():
    p = np.array([0.05, 0.3, 0.5])
    close([factor(4, x) for x in p], math.sqrt(3) * (1 - 2 * p * (1 - p)) + 3 * p * (1 - p))


def test_scaled_pairs_of_real_rewards_ascend_the_chance_to_win():
    """The std of a pair is half its difference: `A = sign(r_1 - r_2)`, so what is ascended is wins less losses."""
    index, chance = groups(2)
    gradient = expected(advantage(REAL[index], 1e-14, ddof=0), index, chance)
    wins = np.sign(REAL[:, None] - REAL) @ PI
    close(gradient, exact(wins), rtol=1e-9)
    cosine = (gradient * exact(REAL)).sum() / np.linalg.norm(gradient) / np.linalg.norm(exact(REAL))
    assert 0.5 < cosine < 0.97


@pytest.mark.parametrize("size", [2, 3])
def test_dynamic_sampling_divides_by_the_chance_of_a_mixed_group(size):
    """Groups without spread have no gradient: to draw again until there is one only divides by how often it is."""
    index, chance = groups(size)
    p, mixed = PI @ SOLVED, SOLVED[index].std(-1) > 0
    share = (chance * mixed).sum()
    close(share, 1 - p**size - (1 - p) ** size)
    a = advantage(SOLVED[index], 1e-14, ddof=0)
    close(expected(a, index, chance * mixed / share), factor(size, p) / share * exact(SOLVED), rtol=1e-9)


def test_scaling_by_the_batch_gives_each_prompt_a_factor_of_all_pass_rates():
    """Of two prompts, `c_1 = E[K_1 (G - K_1) / G^2 h(K_1, K_2)] / (p_1 (1 - p_1))`, `h = 1 / (std of all + eps)`."""
    eps, size = 0.1, 2
    pairs, chance = groups(size)
    chances = [chance, probabilities(OTHER)[pairs].prod(-1)]
    both = np.array(list(itertools.product(range(N**2), repeat=2)))
    rewards = SOLVED[pairs[both]]  # [prompt pairs, 2 prompts, 2 samples]
    batch = jax.jit(jax.vmap(lambda r: group_advantage(r, scale="batch", ddof=0, eps=eps)))
    a = np.asarray(batch(rewards)).reshape(len(chance), len(chance), 2, size)
    rates = [PI @ SOLVED, probabilities(OTHER) @ SOLVED]
    k = np.arange(size + 1)
    std = np.sqrt((q := (k[:, None] + k) / (2 * size)) * (1 - q))
    spread = k * (size - k) / size**2
    for prompt, theta in enumerate((THETA, OTHER)):
        own = a[:, :, prompt] if prompt == 0 else a[:, :, prompt].swapaxes(0, 1)
        mean = np.einsum("ijg,j->ig", own, chances[1 - prompt])  # over the other prompt's groups
        gradient = descend(theta, pairs, None, mean, chances[prompt], None)
        mine, other = binomial(size, rates[prompt]), binomial(size, rates[1 - prompt])
        c = np.einsum("i,j,i,ij", mine, other, spread, 1 / (std + eps)) / (rates[prompt] * (1 - rates[prompt]))
        slope = np.einsum("n,n,nrv->rv", probabilities(theta), SOLVED, scores(theta))
        close(gradient, c * slope)


# --- off-policy -------------------------------------------------------------------------------------------------------

MU = probabilities(OTHER)


def off_policy(rewards, weight=None, **modes):
    """Of single samples of the other policy; with the weight of a level, against the policy itself as denominator."""
    index = np.arange(N)[:, None]
    logp, logp_mu = token_logps(jnp.asarray(THETA)), token_logps(jnp.asarray(OTHER))
    if weight is not None:
        weight = importance_weight(logp, logp_mu, jnp.ones((N, T)), **weight)
    old = logp if weight is not None else logp_mu
    return np.asarray(descend(THETA, index, old, jnp.asarray(rewards), MU, weight, **modes))


@pytest.mark.parametrize("kind", REWARDS)
def test_weights_of_whole_sequences_are_unbiased_and_of_tokens_are_not(kind):
    """The token's weight lacks the ratios of the tokens before it and after it, on which reward and score depend."""
    rewards, goal = REWARDS[kind], exact(REWARDS[kind])
    close(off_policy(rewards, {"level": "sequence", "cut": "none"}), goal)
    close(off_policy(rewards, {"level": "sequence", "limit": 1e6}), goal)
    by_token = off_policy(rewards, {"level": "token", "cut": "none"})
    ratio = np.exp(np.asarray(token_logps(jnp.asarray(THETA)) - token_logps(jnp.asarray(OTHER))))
    per_token = np.stack([scores_of_token(t) for t in range(T)], 1)
    close(by_token, np.einsum("n,n,nt,ntrv->rv", MU, rewards, ratio, per_token))
    assert np.linalg.norm(by_token - goal) > 0.1 * np.linalg.norm(goal)
    for cut in ("truncate", "mask"):
        biased = off_policy(rewards, {"level": "sequence", "cut": cut, "limit": 0.9})
        assert np.linalg.norm(biased - goal) > 0.1 * np.linalg.norm(goal)


def scores_of_token(t):
    out = np.zeros((N, 7, V))
    pi = np.exp(THETA) / np.exp(THETA).sum(-1, keepdims=True)
    out[np.arange(N), ROWS[:, t]] = np.eye(V)[STRINGS[:, t]] - pi[ROWS[:, t]]
    return out


def test_ratios_of_sequences_are_unbiased_with_any_baseline_and_of_tokens_are_not():
    """A sequence's ratio stands at each of its T tokens, with the gradient of all: the sum over tokens has T of it."""
    for baseline in (0.0, 0.7):
        whole = off_policy(REAL - baseline, level="sequence", link=links.importance_link)
        close(whole / T, exact(REAL))
    by_token = off_policy(REAL, level="token", link=links.importance_link)
    close(by_token, off_policy(REAL, {"level": "token", "cut": "none"}))


ARMS = np.random.default_rng(3).normal(size=(3, 6))  # logits of a policy and of the one that sampled, rewards
PPO, CISPO = links.ppo_link(0.2, 0.2), links.clipped_weight_link(0.8, 1.28)
TOPR, SAPO, TRUNCATED = links.signed_weight_link((1, 1), (0, 1)), links.soft_gate_link(), links.clipped_weight_link()
COEFFICIENTS = {  # of grad log pi, written down from the table of links
    "importance": (links.importance_link, lambda R, A: R * A),
    "ppo": (PPO, lambda R, A: R * A * ~(((A > 0) & (R > 1.2)) | ((A < 0) & (R < 0.8)))),
    "cispo": (CISPO, lambda R, A: np.clip(R, 0.8, 1.28) * A),
    "truncated": (TRUNCATED, lambda R, A: np.minimum(R, 1) * A),
    "topr": (TOPR, lambda R, A: np.where(A >= 0, 1, np.minimum(R, 1)) * A),
    "sapo": (SAPO, lambda R, A: A * R / np.cosh(np.where(A > 0, 1, 1.05) * (R - 1) / 2) ** 2),
    "naive": (links.score_link, lambda R, A: A),
}


def normalised(logits):
    return logits - np.log(np.exp(logits).sum())


@functools.partial(jax.jit, static_argnames="link")
def arm_gradient(logits, logits_mu, rewards, link):
    """Expected gradient, in the logits, of single decisions that the other policy takes."""
    mu, one = jax.nn.softmax(logits_mu), jnp.ones((6, 1))
    a, old = rewards - mu @ rewards, jax.nn.log_softmax(logits_mu)[:, None]
    loss = lambda z: mu @ policy_gradient(jax.nn.log_softmax(z)[:, None], old, a, one, link=link)[:, 0]  # noqa: E731
    return -jax.grad(loss)(logits)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_links_off_policy_point_elsewhere_unless_the_ratio_is_left_as_it_is(name):
    """`E_mu[C(R, A) grad log pi]` with the coefficients of the table; only `C = R A` is the gradient of `E_pi r`."""
    link, coefficient = COEFFICIENTS[name]
    goal_of = lambda pi, r: pi * (r - pi @ r)  # noqa: E731
    cosines = []
    for distance in (0.0, 0.3, 1.0):
        logits, rewards = ARMS[0], ARMS[2]
        logits_mu = logits + distance * ARMS[1]
        pi, mu = np.exp(normalised(logits)), np.exp(normalised(logits_mu))
        weights = mu * coefficient(pi / mu, rewards - mu @ rewards)
        expectation = weights - weights.sum() * pi  # sum_a weights_a (e_a - pi)
        gradient, goal = np.asarray(arm_gradient(logits, logits_mu, rewards, link)), goal_of(pi, rewards)
        close(gradient, expectation)
        cosines.append(gradient @ goal / np.linalg.norm(gradient) / np.linalg.norm(goal))
        if name == "importance" or distance == 0:
            close(gradient, goal)
    assert name == "importance" or max(cosines[1:]) < 1 - 1e-6, cosines


# --- where there is nothing to compare with ---------------------------------------------------------------------------


def test_groups_of_one_have_nothing_to_be_compared_with():
    rewards = jnp.array([[3.0], [-2.0]])
    for center, scale in itertools.product(("mean", "loo"), ("group", "batch", "none")):
        assert not np.asarray(advantage(rewards, center=center, scale=scale)).any(), (center, scale)
    for scale in ("group", "none"):
        np.testing.assert_array_equal(advantage(rewards, center="none", scale=scale), rewards)
    equal = jnp.array([[2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(advantage(equal, center="none", scale="group"), equal)


def test_groups_without_spread_have_no_gradient():
    index, chance = groups(2)
    equal = np.full(index.shape, 0.75)
    for center, scale in itertools.product(("mean", "loo"), ("group", "batch", "none")):
        assert not expected(advantage(equal, center=center, scale=scale), index, chance).any(), (center, scale)


@pytest.mark.parametrize("center", ["mean", "loo"])
def test_equal_rewards_are_exactly_zero_though_their_mean_is_rounded(center):
    for size in (3, 19, 64):
        for reward in (0.9, 1.3, 1e4 / 3):
            rewards = np.full((2, size), reward, np.float32)
            rewards[1, 0] = np.nan
            assert not np.asarray(advantage(jnp.asarray(rewards), center=center)).any(), (size, reward)


def test_answers_without_a_reward_are_as_if_they_were_not_there():
    """Of three in a group one is not judged, whichever it says: two thirds of what pairs give."""
    index, chance = groups(3)
    rewards = REAL[index]
    rewards[:, 1] = np.nan
    gradient = expected(advantage(rewards, center="loo", scale="none"), index, chance)
    close(gradient, 2 / 3 * exact(REAL))
    assert not np.asarray(advantage(jnp.full((2, 3), jnp.nan))).any()


def test_masked_tokens_and_rows_have_no_loss_and_no_gradient():
    logp = token_logps(jnp.asarray(THETA))[:4]
    mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 1]])
    dirty = jnp.where(mask != 0, logp, jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    a = jnp.array([1.0, -2.0, jnp.nan, 0.5])
    for level in ("token", "sequence", "geometric", "geometric_token"):

        @jax.jit
        def run(x, level=level):
            loss = lambda x: policy_gradient(x, logp - 0.1, a, mask, level=level)  # noqa: E731
            return loss(x), jax.grad(lambda x: loss(x).sum())(x)

        value, slope = map(np.asarray, run(dirty))
        assert np.isfinite(slope).all()
        assert not value[mask == 0].any()
        assert not slope[mask == 0].any()
        assert (value[mask != 0] != 0).all()
