"""Tree sampling against an enumerated chain and an exact mixture, its limits, and its rule of choice played by hand."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.core.contracts import ReverseKernel
from esscher.samplers import steppers
from esscher.samplers.diffusion import tree as trees

FIRST = np.array([0.6, 0.3, 0.1])
SECOND = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]])
REWARD, BETA = np.array([0.0, 0.8, -0.5]), 0.8
VALUE = BETA * np.log(SECOND @ np.exp(REWARD / BETA))  # of the states after one step
ROOT = BETA * np.log(FIRST @ np.exp(VALUE / BETA))
FIRST_TILT = FIRST * np.exp((VALUE - ROOT) / BETA)
BASE = FIRST @ SECOND
TILT = BASE * np.exp((REWARD - ROOT) / BETA)
TIMES = jnp.array([2.0, 1.0, 0.0])


def move(key, x, t, s):
    """Two moves between three states, the first from anywhere."""
    return jax.random.categorical(key, jnp.where(t > 1.5, jnp.log(FIRST), jnp.log(SECOND)[x]))


CHAIN = ReverseKernel(move, lambda x_s, x, t, s: jnp.zeros(len(x)))


@functools.partial(jax.jit, static_argnames=("count", "rollouts"))
def grown(key, count, rollouts, beta=BETA, reward=REWARD, **options):
    x = jnp.zeros(count, jnp.int32)
    worth = lambda x: jnp.asarray(reward)[x]  # noqa: E731
    tree = trees.grow_tree(key, CHAIN, worth, x, TIMES, beta, rollouts=rollouts, **options)
    return tree, trees.sample_tree(jax.random.fold_in(key, 0), tree, beta)


def many(seed, **changes):
    """4,096 trees of 8 roll-outs, compiled once for all settings."""
    settings = {"beta": BETA, "reward": REWARD, "widening": 1.0, "exponent": 0.5, **changes}
    settings = {name: jnp.asarray(value, jnp.float32) for name, value in settings.items()}
    return grown(jax.random.key(seed), 4096, 8, **settings)


def laws(tree, beta=BETA):
    """Of the first move and of the leaf of `sample_tree`, given each tree, `[B, 3]` both."""
    x, parent, value = np.asarray(tree.x), np.asarray(tree.parent), np.asarray(tree.value, float)
    batch = np.arange(len(x))[:, None]
    weight, total = np.where(parent >= 0, np.exp(value / beta), 0.0), np.zeros_like(value)
    np.add.at(total, (batch, np.maximum(parent, 0)), weight)
    share = weight / total[batch, np.maximum(parent, 0)]
    leaf = np.where(parent > 0, share * share[batch, np.maximum(parent, 0)], 0.0)
    collect = lambda share: np.stack([np.where(x == k, share, 0).sum(-1) for k in range(3)], -1)  # noqa: E731
    return collect(np.where(parent == 0, share, 0.0)), collect(leaf)


def assert_law(leaves, expected, n):
    """Within 4.5 standard errors, false alarms 2e-5."""
    law = np.bincount(np.asarray(leaves), minlength=3) / n
    assert np.all(np.abs(law - expected) < 4.5 * np.sqrt(expected * (1 - expected) / n))


def test_first_moves_leaves_and_the_root_tend_to_the_tilt():
    """Bias of means over 256 trees, of standard errors below 0.01; the model's own laws are five times as far away."""
    gaps = []
    for rollouts in (8, 200):
        tree, _ = grown(jax.random.key(0), 256, rollouts)
        (first, leaf), value = laws(tree), np.asarray(tree.value[:, 0])
        np.testing.assert_allclose(leaf.sum(-1), 1, rtol=1e-6)
        found = np.append(first, leaf, axis=1), np.append(FIRST_TILT, TILT)
        gaps.append(np.append(np.abs(found[0].mean(0) - found[1]), ROOT - value.mean()))
    assert max(first.std(0).max(), leaf.std(0).max(), value.std()) / 16 < 0.01
    assert gaps[1].max() < 0.04
    assert gaps[0].max() > 2 * gaps[1].max()
    assert gaps[1][-1] > 0  # values are too low
    assert min(np.abs(FIRST_TILT - FIRST).max(), np.abs(TILT - BASE).max()) > 0.1


def test_a_leaf_is_drawn_by_the_values_on_its_way():
    tree, _ = many(1)
    one = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 4096, axis=0), tree)
    assert_law(trees.sample_tree(jax.random.key(0), one, BETA), laws(tree)[1][0], 4096)


def test_independent_roll_outs_are_importance_resampling():
    """At exponent 1 every roll-out is its own branch: the root is the log-mean-exp of its leaves, unbiased in z."""
    tree, _ = many(2, exponent=1.0)
    np.testing.assert_array_equal((np.asarray(tree.parent) == 0).sum(-1), 8)
    value, parent = np.asarray(tree.value, float), np.asarray(tree.parent)
    first = np.where(parent == 0, np.exp(value / BETA), 0).sum(-1) / 8
    np.testing.assert_allclose(np.exp(value[:, 0] / BETA), first, rtol=1e-5)
    ratio = first / np.exp(ROOT / BETA)
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / 64  # false alarms 1e-5
    assert np.all(tree.size == 17)


def test_one_roll_out_and_no_tilt_have_the_law_of_the_model():
    tree, leaves = many(3, widening=1e-6)
    np.testing.assert_array_equal(tree.size, 3)
    np.testing.assert_array_equal(tree.visits[:, :3], 8)
    np.testing.assert_allclose(tree.value[:, 0], REWARD[np.asarray(leaves)], rtol=1e-6)
    assert_law(leaves, BASE, 4096)
    tree, leaves = many(4, beta=np.inf)
    assert_law(leaves, BASE, 4096)
    assert np.all(np.isfinite(tree.value[:, 0]))


def test_the_tree_of_an_exact_mixture_finds_its_soft_value(line):
    """The reverse steps are exact, two of them; 64 trees for each of two starts, standard errors below 0.02."""
    schedule, slope, beta = schedules.cosine(), jnp.array([1.0]), 1.5
    mixture = line.mixture()
    starts, times = jnp.array([[-0.4], [0.9]]), jnp.array([0.8, 0.45, 0.0])

    @jax.jit
    def run(key):
        x, reward = jnp.repeat(starts, 64, axis=0), lambda x: x[:, 0]
        return trees.grow_tree(key, mixture.reverse_kernel(schedule), reward, x, times, beta, rollouts=50)

    value = np.asarray(run(jax.random.key(5)).value[:, 0]).reshape(2, 64)
    worth = lambda x: mixture.soft_value(x, times[0], schedule, jnp.zeros((1, 1)), slope, beta)  # noqa: E731
    exact = jax.jit(worth)(starts)
    mean = jax.jit(lambda x: mixture.posterior(x, schedule, times[0]).mean()[0])
    for i, start in enumerate(starts):
        gap = exact[i] - value[i].mean()
        assert -3 * value[i].std() / 8 < gap < 0.1
        assert exact[i] - mean(start) > 0.2  # the mean reward is far away


# --- the rule of choice -----------------------------------------------------------------------------------------------


def one_step(rollouts, mode, **options):
    """A root with exactly four leaves, all different: what happens after is a bandit with known arms."""

    def sample(key, x, t, s):
        return jax.random.normal(key, x.shape)

    kernel = ReverseKernel(sample, lambda x_s, x, t, s: jnp.zeros(len(x)))
    tree = trees.grow_tree(
        jax.random.key(6), kernel, lambda x: x, jnp.zeros(64), TIMES[1:], 0.9, rollouts=rollouts, mode=mode,
        widening=3.5, exponent=1e-6, **options,
    )  # fmt: skip
    np.testing.assert_array_equal(tree.size, 5)
    return np.asarray(tree.x, float)[:, 1:5], np.asarray(tree.visits)[:, 1:5], tree


def test_search_plays_by_upper_confidence_bounds():
    arms, visits, tree = one_step(40, "search", c_uct=0.6)
    for values, found in zip(arms, visits, strict=True):
        counts = np.ones(4)
        for n in range(5, 41):  # visits of the root, this one too
            counts[np.argmax(values + 0.6 * np.sqrt(np.log(n) / counts))] += 1
        np.testing.assert_array_equal(found, counts)
    np.testing.assert_array_equal(trees.sample_tree(jax.random.key(0), tree, 0.9, mode="search"), arms.max(-1))


def test_sampling_visits_children_by_their_share():
    """396 draws for each of 64 trees of known shares; 256 terms of a chi-square, of mean 0.75 and deviation 0.08."""
    arms, visits, _ = one_step(400, "sample")
    share = np.exp(arms / 0.9) / np.exp(arms / 0.9).sum(-1, keepdims=True)
    terms = (visits - 1 - 396 * share) ** 2 / (396 * share)
    assert abs(terms.mean() - 0.75) < 4.5 * np.sqrt(2 * 3 / 16 / 64)


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_worthless_leaves_are_never_chosen_beside_others_and_do_no_harm_alone():
    tree, leaves = many(8, reward=[np.nan, 1.0, -np.inf])
    seen = np.any((np.asarray(tree.x) == 1) & (np.asarray(tree.parent) > 0), -1)
    np.testing.assert_array_equal(np.asarray(leaves)[seen], 1)
    np.testing.assert_array_equal(np.isfinite(tree.value[:, 0]), seen)
    assert 0.5 < seen.mean() < 1
    tree, leaves = many(9, reward=[-np.inf] * 3)
    np.testing.assert_array_equal(tree.value, -np.inf)
    np.testing.assert_array_equal(tree.visits[:, 0], 8)
    assert np.bincount(np.asarray(leaves)).all()


def test_rewards_that_are_nan_are_counted_and_the_caller_is_warned():
    reward = lambda x: jnp.where(x == 0, jnp.nan, x * 1.0)  # noqa: E731
    run = functools.partial(trees.grow_tree, jax.random.key(11), CHAIN, reward, times=TIMES, beta=1.0, rollouts=5)
    x = jnp.zeros(40, jnp.int32)
    with pytest.warns(UserWarning, match=r"rewards were NaN; such leaves are never chosen") as caught:
        tree = run(x, exponent=1.0)
    leaf = np.asarray(tree.parent) > 0
    nan = np.sum(leaf & (np.asarray(tree.x) == 0), -1)  # at exponent 1 each roll-out has a leaf of its own
    np.testing.assert_array_equal(tree.nan, nan)
    assert np.all(np.asarray(tree.value)[leaf & (np.asarray(tree.x) == 0)] == -np.inf)
    (warned,) = caught
    assert warned.filename == __file__
    assert str(warned.message).startswith(f"{nan.sum()} rewards")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(jax.jit(functools.partial(run, exponent=1.0))(x).nan, nan)


def test_states_keep_their_type_where_times_are_wider(x64):
    kernel = ReverseKernel(lambda key, x, t, s: x + t * jax.random.normal(key, x.shape), CHAIN.log_prob)
    x, times = jnp.zeros(3, jnp.float32), jnp.asarray(TIMES, jnp.float64)
    tree = trees.grow_tree(jax.random.key(0), kernel, lambda x: x * jnp.float64(2), x, times, 1.0, rollouts=3)
    assert tree.x.dtype == jnp.float32
    assert trees.sample_tree(jax.random.key(0), tree, 1.0).dtype == jnp.float32


def test_bad_arguments_are_named():
    grow = functools.partial(trees.grow_tree, jax.random.key(0))
    x, reward = jnp.zeros(3, jnp.int32), lambda x: jnp.zeros(len(x))
    with pytest.raises(ValueError, match="kernel must be a ReverseKernel, a stochastic step with a density"):
        grow(steppers.ddim(schedules.cosine()), reward, x, TIMES, 1.0, rollouts=2)
    with pytest.raises(ValueError, match="rollouts must be at least 1, got 0"):
        grow(CHAIN, reward, x, TIMES, 1.0, rollouts=0)
    with pytest.raises(ValueError, match='mode must be "sample" or "search", got \'best\''):
        grow(CHAIN, reward, x, TIMES, 1.0, rollouts=2, mode="best")
    with pytest.raises(ValueError, match=r"beta must be a scalar or have shape \(3,\), got \(2,\)"):
        grow(CHAIN, reward, x, TIMES, jnp.ones(2), rollouts=2)
    with pytest.raises(ValueError, match="times must be strictly decreasing"):
        grow(CHAIN, reward, x, TIMES[::-1], 1.0, rollouts=2)
    with pytest.raises(ValueError, match=r"reward must return shape \(3,\), one value per example, got \(\)"):
        grow(CHAIN, lambda x: jnp.zeros(()), x, TIMES, 1.0, rollouts=2)
    with pytest.raises(ValueError, match=r"x must have at least one example, got shape \(0,\)"):
        grow(CHAIN, reward, x[:0], TIMES, 1.0, rollouts=2)
    with pytest.raises(ValueError, match="beta must be above 0, got 0"):
        grow(CHAIN, reward, x, TIMES, 0.0, rollouts=2)
    with pytest.raises(ValueError, match="widening must be above 0, got -1"):
        grow(CHAIN, reward, x, TIMES, 1.0, rollouts=2, widening=-1)
    for exponent in (0.0, 1.5, np.nan):
        with pytest.raises(ValueError, match=rf"exponent must be in \(0, 1\], got {exponent}"):
            grow(CHAIN, reward, x, TIMES, 1.0, rollouts=2, exponent=exponent)
    with pytest.raises(ValueError, match="beta must be above 0, got -1"):
        trees.sample_tree(jax.random.key(0), grow(CHAIN, reward, x, TIMES, 1.0, rollouts=2), -1.0)
