r"""Problems of the tilt bench: exact models, rewards, and the laws `p exp(r / beta)` that samplers should reach.

Mixtures of Gaussians in 1, 2, 16 and 64 dimensions under linear, quadratic and half-space rewards, and strings of
tokens under masked diffusion. The tilt can be sampled exactly in all of them, and on the line and of strings its
density is known, so a sampler's distance from it is measured, not judged.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import log_ndtr

from esscher.core import schedules
from esscher.core.categorical import linear_alpha
from esscher.core.contracts import Prediction, Predictor
from esscher.core.exact import GaussianMixture, masked
from esscher.objectives import metrics

__all__ = ["BINS", "PROBLEMS", "Problem", "Reward", "Strings", "Task", "Vectors", "make", "spectral_predictor"]

SCHEDULE = schedules.cosine()
NOISIEST, CLEANEST = -4.0, 4.0  # log(alpha / sigma) where samplers begin, and of the last noise that is removed
BINS = 32
SYMBOLS, LENGTH = 4, 4
DIRECTIONS = 64  # that the Wasserstein distance is sliced along


class Task(NamedTuple):
    """What a sampler is given: all of it may be called under `jit`, `vmap` and `grad`."""

    model: Callable[[Array, Array], Any]  # a predictor of vectors, or a denoiser of tokens; its calls are counted
    log_reward: Callable[[Array], Array]  # r / beta of clean samples, [B, ...] -> [B]
    start: Callable[[Array, int], Array]  # (key, n) -> states at the first time
    times: Callable[[int], Array]  # of so many steps, each with one call of the model, down to clean samples
    schedule: schedules.Schedule | None = None  # of vectors
    alpha: Callable[[Array], Array] | None = None  # of tokens, as is what follows
    mask_id: int | None = None
    soft_log_reward: Callable[[Array], Array] | None = None  # of one-hot vectors or means of them, [B, L, V] -> [B]


class Problem(NamedTuple):
    """A model, a reward and their exact tilt."""

    space: str  # problems of one space and shape share their programs
    sample: jax.ShapeDtypeStruct  # of one
    parameters: Any  # arrays that programs are given
    task: Callable[[Any, Callable], Task]  # (parameters, wrapper of the model that counts) -> task
    exact: Callable[[Array, int], Array]  # (key, n) -> samples of the tilt
    measure: Callable[[Array, Array], dict[str, Array]]  # (samples, those of the tilt) -> divergences by name, or nan
    ranked: str  # the divergence that samplers are ranked by; it grows as the square of an error


# --- vectors ----------------------------------------------------------------------------------------------------------


class Reward(NamedTuple):
    """`r(x) = -x'Ax / 2 + b.x + height 1[direction.x > threshold]`, and its temperature."""

    curvature: Array  # [D, D]
    slope: Array  # [D]
    direction: Array  # [D]
    threshold: Array  # []
    height: Array  # []
    beta: Array  # []

    def over_beta(self, x: Array) -> Array:
        """`r / beta`, `[B, D] -> [B]`."""
        smooth = x @ self.slope - 0.5 * jnp.einsum("bi,ij,bj->b", x, self.curvature, x)
        return (smooth + self.height * (x @ self.direction > self.threshold)) / self.beta


class Vectors(NamedTuple):
    """Parameters of a problem of vectors; the covariances are `U_k diag(l_k) U_k'`."""

    log_weights: Array  # [K]
    means: Array  # [K, D]
    values: Array  # [K, D] l_k
    bases: Array  # [K, D, D] U_k, eigenvectors in columns
    reward: Reward

    def mixture(self) -> GaussianMixture:
        """The model's law."""
        covariances = jnp.einsum("kij,kj,klj->kil", self.bases, self.values, self.bases)
        return GaussianMixture(self.log_weights, self.means, covariances)


def spectral_predictor(law: Vectors, schedule: schedules.Schedule) -> Predictor:
    """`GaussianMixture.predictor` in the eigenvectors of each covariance, without solving a system for each state."""
    centers = jnp.einsum("kd,kde->ke", law.means, law.bases)

    def predict(x: Array, t: Array) -> Prediction:
        alpha, sigma = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
        errors = jnp.einsum("bd,kde->bke", x, law.bases) - alpha * centers
        variances = alpha**2 * law.values + sigma**2
        scaled = errors / variances
        shares = jax.nn.softmax(law.log_weights - 0.5 * jnp.sum(errors * scaled + jnp.log(variances), -1))
        mean = lambda terms: jnp.einsum("bk,bke,kde->bd", shares, terms, law.bases)  # noqa: E731
        return Prediction(mean(centers + alpha * law.values * scaled), mean(sigma * scaled))

    return predict


def _vector_task(given: Vectors, counted: Callable) -> Task:
    dimension, ends = given.means.shape[1], [SCHEDULE.inverse_log_snr_half(lam) for lam in (NOISIEST, CLEANEST)]

    def times(steps: int) -> Array:
        noisy = schedules.log_snr_times(steps - 1, SCHEDULE, *ends) if steps > 1 else jnp.asarray(ends[:1])
        return jnp.append(noisy, 0.0)

    return Task(
        counted(spectral_predictor(given, SCHEDULE)),
        given.reward.over_beta,
        lambda key, n: jax.random.normal(key, (n, dimension)),
        times,
        schedule=SCHEDULE,
    )


@functools.partial(jax.jit, static_argnums=2)
def _tilted_samples(given: Vectors, key: Array, n: int) -> Array:
    """Exact ones: the smooth part of the reward by its closed form, the jump by a truncated normal across it.

    What is left of a Gaussian on either side of the plane is a truncated normal in its direction `a`, and in the other
    directions as before: `y + S a / (a'S a) (s - a.y)` for `y` from the Gaussian and `s` from the truncated normal.
    """
    reward, keys = given.reward, jax.random.split(key, 3)
    law = given.mixture().tilt_quadratic(reward.curvature, reward.slope, reward.beta)
    along = jnp.einsum("kij,j->ki", law.covariances, reward.direction)
    mean, std = law.means @ reward.direction, jnp.sqrt(along @ reward.direction)
    z = (reward.threshold - mean) / std
    sides = jnp.stack([log_ndtr(z), log_ndtr(-z) + reward.height / reward.beta], -1)  # below, above
    k, above = jnp.divmod(jax.random.categorical(keys[0], (law.log_weights[:, None] + sides).ravel(), shape=(n,)), 2)
    roots = jnp.linalg.cholesky(law.covariances)
    y = law.means + jnp.einsum("kij,nj->nki", roots, jax.random.normal(keys[1], (n, law.means.shape[1])))
    y = jnp.take_along_axis(y, k[:, None, None], 1)[:, 0]
    low, high = jnp.where(above == 1, z[k], -jnp.inf), jnp.where(above == 1, jnp.inf, z[k])
    s = mean[k] + std[k] * jax.random.truncated_normal(keys[2], low, high)
    return y + (along / std[:, None] ** 2)[k] * (s - y @ reward.direction)[:, None]


def _vector_problem(means: Array, weights: Array, values: Array, bases: Array, reward: Reward) -> Problem:
    given = jax.tree.map(jnp.asarray, Vectors(jnp.log(weights), means, values, bases, reward))
    directions = jax.random.normal(jax.random.key(1), (DIRECTIONS, given.means.shape[1]))
    edges = _equal_bins(given) if given.means.shape[1] == 1 else None

    def measure(x: Array, exact: Array) -> dict[str, Array]:
        found = {
            "sliced Wasserstein": metrics.sliced_wasserstein(x, exact, directions),
            "energy distance": metrics.energy_distance(x, exact),
        }
        if edges is not None:
            counts = jnp.bincount(jnp.searchsorted(edges, x[:, 0]), length=BINS)
            found = {"KL": _divergence(counts, jnp.full(BINS, 1 / BINS))} | found
        return _only_if(jnp.isfinite(x).all(), found)

    dimension = given.means.shape[1]
    one = jax.ShapeDtypeStruct((dimension,), jnp.float32)
    exact = lambda key, n: _tilted_samples(given, key, n)  # noqa: E731
    ranked = "KL" if dimension == 1 else "energy distance"
    return Problem(f"{dimension}-D", one, given, _vector_task, exact, jax.jit(measure), ranked)


def _equal_bins(given: Vectors, low: float = -8.0, high: float = 8.0, nodes: int = 200_001) -> Array:
    """The `BINS - 1` inner edges of bins that all hold as much of the tilt, by quadrature on the line."""
    x = np.linspace(low, high, nodes)
    density = jax.jit(lambda given, x: given.mixture().log_prob(x) + given.reward.over_beta(x))
    below = np.cumsum(np.exp(np.asarray(density(given, x[:, None]), np.float64)))
    return jnp.asarray(x[np.searchsorted(below, below[-1] * np.arange(1, BINS) / BINS)])


def _divergence(counts: Array, law: Array) -> Array:
    """`KL(empirical || law)`, `[]`."""
    share = counts / counts.sum()
    return jnp.sum(jnp.where(counts > 0, share * jnp.log(jnp.where(counts > 0, share, 1.0) / law), 0.0))


def _only_if(valid: Array, found: dict[str, Array]) -> dict[str, Array]:
    """Divergences, or nan: a bin or a number would be found for what is no sample, too."""
    return {name: jnp.where(valid, value, jnp.nan) for name, value in found.items()}


def _mixture(dimension: int, kind: str) -> Problem:
    """Modes of different weight and shape on a ring in a plane; rewards see only that, two of them the rarest mode."""
    if dimension == 1:
        means, weights, plane = np.array([[-1.0], [1.5]]), np.array([0.3, 0.7]), np.ones((1, 1))
        values, bases = np.array([[0.2], [0.35]]), np.ones((2, 1, 1))
    else:
        draw, weights = np.random.default_rng(dimension), np.array([0.3, 0.25, 0.2, 0.15, 0.1])
        plane = np.linalg.qr(draw.normal(size=(dimension, 2)))[0].T
        angles = 2 * np.pi * np.arange(5) / 5 + 0.3
        means = 2.0 * np.stack([np.cos(angles), np.sin(angles)], -1) @ plane
        values = draw.uniform(0.1, 0.4, (5, dimension))
        bases = np.linalg.qr(draw.normal(size=(5, dimension, dimension)))[0]
    along, zero, none = plane[0], np.zeros((dimension, dimension)), np.zeros(dimension)
    rare = means[weights.argmin()] / np.linalg.norm(means[weights.argmin()])
    reward = {
        "linear": Reward(zero, 1.75 * along, along, 0.0, 0.0, 0.5),
        "quadratic": Reward(4.0 * np.outer(rare, rare), 7.0 * rare, rare, 0.0, 0.0, 0.5),
        "half-space": Reward(zero, none, rare, 1.2, 3.0, 0.5),
    }[kind]
    return _vector_problem(means, weights, values, bases, reward)


# --- strings ----------------------------------------------------------------------------------------------------------


class Strings(NamedTuple):
    """Parameters of a problem of strings."""

    log_probs: Array  # [V**L] of the model, all strings in lexicographic order
    single: Array  # [L, V] r / beta of a token in its place
    pairs: Array  # [L - 1, V, V] and of neighbours

    def over_beta(self, one_hot: Array) -> Array:
        """`r / beta` of one-hot vectors or of means of them, `[B, L, V] -> [B]`."""
        alone = jnp.einsum("blv,lv->b", one_hot, self.single)
        return alone + jnp.einsum("blv,lvw,blw->b", one_hot[:, :-1], self.pairs, one_hot[:, 1:])


def _one_hot(x: Array) -> Array:
    return jax.nn.one_hot(x, SYMBOLS)


def _string_task(given: Strings, counted: Callable) -> Task:
    return Task(
        counted(lambda x, t: masked.conditionals(given.log_probs, x)),
        lambda x: given.over_beta(_one_hot(x)),
        lambda key, n: jnp.full((n, LENGTH), SYMBOLS),
        lambda steps: schedules.uniform_times(steps),
        alpha=linear_alpha,
        mask_id=SYMBOLS,
        soft_log_reward=given.over_beta,
    )


def _string_problem(given: Strings) -> Problem:
    every = masked.states(SYMBOLS, LENGTH)
    tilt = jax.nn.log_softmax(given.log_probs + given.over_beta(_one_hot(every)))

    def measure(x: Array, exact: Array) -> dict[str, Array]:
        number = x @ SYMBOLS ** jnp.arange(LENGTH - 1, -1, -1)
        kl = _divergence(jnp.bincount(number, length=len(tilt)), jnp.exp(tilt))
        return _only_if(jnp.all((x >= 0) & (x < SYMBOLS)), {"KL": kl})

    exact = lambda key, n: every[jax.random.categorical(key, tilt, shape=(n,))]  # noqa: E731
    one = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)
    return Problem("strings", one, given, _string_task, exact, jax.jit(measure), "KL")


def _strings(kind: str) -> Problem:
    keys = jax.random.split(jax.random.key(7), 3)
    log_probs = jax.nn.log_softmax(1.5 * jax.random.normal(keys[0], (SYMBOLS**LENGTH,)))
    single = 2.0 * jax.random.normal(keys[1], (LENGTH, SYMBOLS)) * (kind == "additive")
    pairs = 2.0 * jax.random.normal(keys[2], (LENGTH - 1, SYMBOLS, SYMBOLS)) * (kind == "pairwise")
    return _string_problem(Strings(log_probs, single, pairs))


# --- all --------------------------------------------------------------------------------------------------------------

PROBLEMS = (
    *(f"{d}-D {reward}" for d in (1, 2, 16, 64) for reward in ("linear", "quadratic", "half-space")),
    "strings additive",
    "strings pairwise",
)


def make(name: str) -> Problem:
    """One of `PROBLEMS`."""
    space, kind = name.split(" ")
    return _strings(kind) if space == "strings" else _mixture(int(space.removesuffix("-D")), kind)
