r"""Gaussian mixtures: every law a diffusion model passes through, and its exponential tilts, in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import log_ndtr, logsumexp
from jax.scipy.stats import multivariate_normal

from esscher.core.contracts import Prediction, Predictor, ReverseKernel
from esscher.core.schedules import Schedule

__all__ = ["GaussianMixture"]


class GaussianMixture(NamedTuple):
    r"""The law `p(x) = sum_k w_k N(x; m_k, S_k)` on `R^D`.

    Weights need not be normalised; every method divides by their sum, except `log_mass`, which returns its logarithm.
    Under a schedule, `x_t = alpha x_0 + sigma eps` has the law `at(schedule, t)`, also a mixture.

    Attributes:
      log_weights: `[K]`, up to a constant.
      means: `[K, D]`.
      covariances: `[K, D, D]`, symmetric, positive definite (semi-definite where only tilts are taken).
    """

    log_weights: Array
    means: Array
    covariances: Array

    # --- the law ------------------------------------------------------------------------------------------------------

    def log_mass(self) -> Array:
        """Logarithm of the sum of the weights, `[]`: 0 for a normalised mixture, `log Z` for an unnormalised tilt."""
        return logsumexp(self.log_weights)

    def normalized(self) -> "GaussianMixture":
        """The same law with weights that sum to one."""
        return self._replace(log_weights=self.log_weights - self.log_mass())

    def log_responsibilities(self, x: Array) -> Array:
        """`log p(k | x)`, `[B, D] -> [B, K]`."""
        return jax.nn.log_softmax(self._log_joint(x), axis=-1)

    def log_prob(self, x: Array) -> Array:
        """`log p(x)` in nats, `[B, D] -> [B]`."""
        return logsumexp(self._log_joint(x), axis=-1) - self.log_mass()

    def score(self, x: Array) -> Array:
        """`grad_x log p(x)`, `[B, D] -> [B, D]`."""
        responsibilities = jnp.exp(self.log_responsibilities(x))
        precision_errors = jnp.linalg.solve(self.covariances[None], (self.means - x[:, None])[..., None])[..., 0]
        return jnp.einsum("bk,bkd->bd", responsibilities, precision_errors)

    def sample(self, key: Array, n: int) -> Array:
        """`n` independent draws, `[n, D]`."""
        component_key, noise_key = jax.random.split(key)
        component = jax.random.categorical(component_key, self.log_weights, shape=(n,))
        noise = jax.random.normal(noise_key, (n, self.means.shape[-1]), self.means.dtype)
        return self.means[component] + jnp.einsum("bij,bj->bi", _square_roots(self.covariances)[component], noise)

    def mean(self) -> Array:
        """`E[x]`, `[D]`."""
        return jax.nn.softmax(self.log_weights) @ self.means

    def covariance(self) -> Array:
        """`Cov[x]`, `[D, D]`."""
        centered = self.means - self.mean()
        second = self.covariances + centered[:, :, None] * centered[:, None, :]
        return jnp.einsum("k,kij->ij", jax.nn.softmax(self.log_weights), second)

    def _log_joint(self, x: Array) -> Array:
        if x.ndim != 2 or x.shape[-1] != self.means.shape[-1]:
            raise ValueError(f"x must have shape [B, {self.means.shape[-1]}], got {x.shape}")
        log_density = jax.vmap(multivariate_normal.logpdf, in_axes=(None, 0, 0), out_axes=-1)
        return self.log_weights + log_density(x, self.means, self.covariances)

    # --- under noise --------------------------------------------------------------------------------------------------

    def at(self, schedule: Schedule, t: Array) -> "GaussianMixture":
        """The law of `x_t`: means `alpha m_k`, covariances `alpha^2 S_k + sigma^2 I`; `t` is a scalar."""
        if jnp.ndim(t):
            raise ValueError(f"t must be a scalar, got shape {jnp.shape(t)}; map over times with jax.vmap")
        alpha, sigma = schedule.alpha(jnp.asarray(t)), schedule.sigma(jnp.asarray(t))
        identity = jnp.eye(self.means.shape[-1], dtype=self.means.dtype)
        return self._replace(means=alpha * self.means, covariances=alpha**2 * self.covariances + sigma**2 * identity)

    def posterior(self, x: Array, schedule: Schedule, t: Array) -> "GaussianMixture":
        """The law of `x_0` given one `x_t = x[D]`, a mixture with `[K]` components (exact, singular at `t = 0`)."""
        return self._reverse(x, schedule, t, jnp.zeros_like(jnp.asarray(t)))

    def predictor(self, schedule: Schedule) -> Predictor:
        """The exact `(x_t[B, D], t[B]) -> (E[x_0 | x_t], E[eps | x_t])`; `eps` needs `sigma(t) > 0`, else it is 0."""

        def predict(x: Array, t: Array) -> Prediction:
            t = jnp.broadcast_to(t, x.shape[:1])
            data = jax.vmap(lambda x, t: self.posterior(x, schedule, t).mean())(x, t)
            score = jax.vmap(lambda x, t: self.at(schedule, t).score(x[None])[0])(x, t)
            return Prediction(data, -schedule.sigma(t)[:, None] * score)

        return predict

    def reverse_kernel(self, schedule: Schedule) -> ReverseKernel:
        """The exact law of `x_s` given `x_t` for any `s < t`, one step or a hundred: no discretisation error."""

        def sample(key: Array, x: Array, t: Array, s: Array) -> Array:
            draw = lambda key, x: self._reverse(x, schedule, t, s).sample(key, 1)[0]  # noqa: E731
            return jax.vmap(draw)(jax.random.split(key, x.shape[0]), x)

        def log_prob(x_s: Array, x: Array, t: Array, s: Array) -> Array:
            return jax.vmap(lambda x_s, x: self._reverse(x, schedule, t, s).log_prob(x_s[None])[0])(x_s, x)

        return ReverseKernel(sample, log_prob)

    def _reverse(self, x: Array, schedule: Schedule, t: Array, s: Array) -> "GaussianMixture":
        """Law of `x_s` given one `x_t = x[D]`: components condition a joint Gaussian, weights are responsibilities."""
        at_s, at_t = self.at(schedule, s), self.at(schedule, t)
        ratio = schedule.alpha(jnp.asarray(t)) / schedule.alpha(jnp.asarray(s))
        kept = jnp.linalg.solve(at_t.covariances, at_s.covariances)
        gain = ratio * jnp.swapaxes(kept, -1, -2)
        # B - ratio^2 B C^-1 B for the covariances B at s and C at t; C = ratio^2 B + noise I, so that nothing cancels.
        sigma_t, sigma_s = schedule.sigma(jnp.asarray(t)), ratio * schedule.sigma(jnp.asarray(s))
        covariances = (sigma_t - sigma_s) * (sigma_t + sigma_s) * kept
        return GaussianMixture(
            log_weights=at_t.log_responsibilities(x[None])[0],
            means=at_s.means + jnp.einsum("kij,kj->ki", gain, x - at_t.means),
            covariances=0.5 * (covariances + jnp.swapaxes(covariances, -1, -2)),
        )

    # --- tilts --------------------------------------------------------------------------------------------------------

    def tilt_linear(self, a: Array, beta: Array) -> "GaussianMixture":
        """The normalised law proportional to `p(x) exp(a.x / beta)`, with `a[D]`."""
        return self.tilt_quadratic(jnp.zeros_like(self.covariances[0]), a, beta)

    def tilt_quadratic(self, A: Array, b: Array, beta: Array) -> "GaussianMixture":
        """The normalised law proportional to `p(x) exp((-x'Ax/2 + b.x) / beta)`.

        `A[D, D]` is symmetric and `S_k^-1 + A/beta` must be positive definite, else the tilt does not exist and the
        result is not finite.
        """
        return self._tilted(A, b, beta).normalized()

    def log_z(self, A: Array, b: Array, beta: Array) -> Array:
        """`log E[exp((-x'Ax/2 + b.x) / beta)]`, `[]`: the log normaliser of `tilt_quadratic`."""
        return self._tilted(A, b, beta).log_mass() - self.log_mass()

    def soft_value(self, x: Array, t: Array, schedule: Schedule, A: Array, b: Array, beta: Array) -> Array:
        """`beta log E[exp(r(x_0)/beta) | x_t = x]` for `r(x) = -x'Ax/2 + b.x`, `[B, D] -> [B]`; `t` is a scalar."""
        return jax.vmap(lambda x: beta * self.posterior(x, schedule, t).log_z(A, b, beta))(x)

    def soft_value_half_space(
        self, x: Array, t: Array, schedule: Schedule, a: Array, threshold: Array, beta: Array, height: Array = 1.0
    ) -> Array:
        """`beta log E[exp(r(x_0)/beta) | x_t = x]` for `r(x) = height 1[a.x > threshold]`, `[B, D] -> [B]`.

        `t` is a scalar with `sigma(t) > 0`.
        """

        def value(x: Array) -> Array:
            law = self.posterior(x, schedule, t)
            z = (law.means @ a - threshold) / jnp.sqrt(jnp.einsum("i,kij,j->k", a, law.covariances, a))
            inside, outside = (logsumexp(law.log_weights + log_ndtr(sign * z)) for sign in (1, -1))
            return beta * jnp.logaddexp(outside, inside + height / beta)

        return jax.vmap(value)(x)

    def _tilted(self, A: Array, b: Array, beta: Array) -> "GaussianMixture":
        # Written without S^-1, so that point masses and posteriors at t = 0 can be tilted too.
        curvature = self.covariances @ A / beta
        system = jnp.eye(self.means.shape[-1], dtype=self.means.dtype) + curvature
        covariances = jnp.linalg.solve(system, self.covariances)
        sign, log_determinant = jnp.linalg.slogdet(system)
        exists = (sign > 0) & _no_negative_direction(self.covariances, A / beta)
        covariances = jnp.where(exists[:, None, None], covariances, jnp.nan)
        pull = (b - self.means @ A) / beta
        step = jnp.einsum("kij,kj->ki", covariances, pull)
        reward = self.means @ b - 0.5 * jnp.einsum("ki,ij,kj->k", self.means, A, self.means)
        log_gain = reward / beta + 0.5 * jnp.sum(pull * step, -1) - 0.5 * log_determinant
        return GaussianMixture(self.log_weights + log_gain, self.means + step, covariances)

    def product(self, other: "GaussianMixture") -> "GaussianMixture":
        """The law proportional to `p(x) q(x)`, unnormalised: its `log_mass()` is `log int p q`; `K K'` components."""
        pairs = [jnp.repeat(field, other.means.shape[0], 0) for field in self.normalized()]
        others = [jnp.concatenate([field] * self.means.shape[0]) for field in other.normalized()]
        (log_w, m, cov), (log_w_other, m_other, cov_other) = pairs, others
        gain = jnp.swapaxes(jnp.linalg.solve(cov + cov_other, cov), -1, -2)
        overlap = jax.vmap(multivariate_normal.logpdf)(m, m_other, cov + cov_other)
        return GaussianMixture(
            log_weights=log_w + log_w_other + overlap,
            means=m + jnp.einsum("kij,kj->ki", gain, m_other - m),
            covariances=gain @ cov_other,
        )

    def anneal(self, power: Array) -> "GaussianMixture":
        """The law proportional to `p(x)^power` of a single Gaussian: the covariance divided by `power > 0`.

        Its `log_mass()` is `log int p^power`.

        Raises:
          ValueError: the mixture has several components; then the power is no mixture (see `quadrature.moments`).
        """
        if self.means.shape[0] != 1:
            raise ValueError(f"anneal is exact for a single Gaussian, got a mixture of {self.means.shape[0]}")
        dimension = self.means.shape[-1]
        log_determinant = jnp.linalg.slogdet(2 * jnp.pi * self.covariances)[1]
        log_mass = 0.5 * (1 - power) * log_determinant - 0.5 * dimension * jnp.log(power)
        return GaussianMixture(log_mass, self.means, self.covariances / power)


def _no_negative_direction(covariances: Array, curvature: Array) -> Array:
    """Whether no eigenvalue of `I + S_k C` is below zero by more than rounding, `[K]`; the determinant shows odd ones.

    They are looked for twice: in a symmetric matrix similar to it, where rounding by the large eigenvalues hides the
    small ones, and in the tilted covariance, its inverse times `S_k`, where it is the other way round.
    """
    covariances, curvature = jax.lax.stop_gradient((covariances, curvature))
    identity = jnp.eye(curvature.shape[-1], dtype=covariances.dtype)
    roots = _square_roots(covariances)
    positive = roots @ roots  # S_k, but for the negative eigenvalues that rounding gives to singular ones
    tilted = jnp.linalg.solve(identity + positive @ curvature, positive)
    values = jnp.linalg.eigvalsh(jnp.stack([identity + roots @ curvature @ roots, tilted]))
    rounding = curvature.shape[-1] * jnp.finfo(values.dtype).eps * jnp.abs(values).max(-1)
    return jnp.all(values.min(-1) >= -rounding, 0)


def _square_roots(covariances: Array) -> Array:
    """Symmetric square roots of `[K, D, D]`; they exist for semi-definite matrices too, where Cholesky fails."""
    values, vectors = jnp.linalg.eigh(covariances)
    return vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :] @ jnp.swapaxes(vectors, -1, -2)
