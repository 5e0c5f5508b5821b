r"""Tiny language models, given by a table of next-token laws, with all their strings enumerated: every tilt is exact.

A string has `T` tokens of a vocabulary of `V`. Strings of `t` tokens are numbered by their code, the base-`V` integer
with the first token most significant, so that a vector over them, `[V**t]`, is in lexicographic order and the children
of code `c` are `c V + v`. The prefix of `t < T` tokens with code `c` is row `(V**t - 1) / (V - 1) + c` of a table
`[NP, V]`, `NP = (V**T - 1) / (V - 1)`: the empty prefix first, then by depth.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import logsumexp

from esscher.core.arrays import at_least_float32, check_same_shape
from esscher.core.contracts import LanguageModel

__all__ = ["TabularLM", "golden_testbed", "log_potential", "log_sum_exp", "normalize_log_weights"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TabularLM:
    r"""The law `p(x) = prod_t p(x_t | x_<t)` on `V**T` strings, `p(v | prefix) = exp(log_probs[row(prefix), v])`.

    Rows must be normalised; entries may be `-inf` (an end token that only itself can follow). Results are float32 at
    least, in nats, and differentiable in the table and the rewards; `-inf` entries and rewards receive no gradient.
    A model is a pytree with one leaf, the table.

    Attributes:
      log_probs: the table, `[NP, V]`.
      horizon: `T`, a Python integer.

    Raises:
      ValueError: the table has not the rows of this horizon.
    """

    log_probs: Array
    horizon: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        """Refuses a table that does not fit the horizon."""
        # Under vmap the leaf has a further axis, or is no array at all: those are left to the methods.
        if getattr(self.log_probs, "ndim", None) == 2:
            _ = self.table

    @classmethod
    def uniform(cls, vocabulary: int, horizon: int) -> "TabularLM":
        """The uniform law on all strings."""
        return cls(jnp.full((_offset(vocabulary, horizon), vocabulary), -math.log(vocabulary)), horizon)

    @classmethod
    def from_sequence_log_probs(cls, log_probs: Array, vocabulary: int, horizon: int) -> "TabularLM":
        """The law with `p(x)` proportional to `exp(log_probs)`, `[V**T]`, by the chain rule.

        Prefixes without mass get the uniform row; if no string has mass, the table is NaN.

        Raises:
          ValueError: `log_probs` has not one entry for each string.
        """
        uniform = cls.uniform(vocabulary, horizon)
        uniform.check_per_sequence(log_probs=log_probs)
        return uniform.tilt(log_probs, 1.0)

    # --- the law ------------------------------------------------------------------------------------------------------

    @property
    def table(self) -> Array:
        """The table, `[NP, V]`, checked, in float32 at least."""
        table = at_least_float32(self.log_probs)
        if self.horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {self.horizon}")
        if table.ndim != 2 or table.shape[0] != _offset(table.shape[1], self.horizon):
            raise ValueError(
                f"log_probs must have shape [(V**T - 1) / (V - 1), V] for horizon T = {self.horizon}, got {table.shape}"
            )
        return table

    @property
    def vocabulary(self) -> int:
        """`V`."""
        return self.table.shape[-1]

    def sequences(self) -> Array:
        """All strings in the order of their codes, integers `[V**T, T]`."""
        shape = (self.vocabulary,) * self.horizon
        return jnp.stack(jnp.unravel_index(jnp.arange(self.vocabulary**self.horizon), shape), -1)

    def sequence_log_probs(self) -> Array:
        """`log p(x)` of every string, `[V**T]`."""
        return self.path_sums(self.table)

    def check_per_sequence(self, **vectors: Array) -> None:
        """Raises a ValueError that names the argument unless each has one entry for each string, `[V**T]`."""
        wanted = (self.vocabulary**self.horizon,)
        for name, vector in vectors.items():
            if jnp.shape(vector) != wanted:
                raise ValueError(
                    f"{name} must have shape [V**T] = [{self.vocabulary}**{self.horizon}] = {wanted}, "
                    f"got {jnp.shape(vector)}"
                )

    def path_sums(self, table: Array) -> Array:
        """`sum_t table[row(x_<t), x_t]` for every string, `[NP, V] -> [V**T]`.

        Raises:
          ValueError: `table` has not the model's shape.
        """
        check_same_shape(table=table, log_probs=self.table)
        sums = jnp.zeros(1, table.dtype)
        for rows in self._by_depth(table):
            sums = (sums[:, None] + rows).reshape(-1)
        return sums

    # --- tilts --------------------------------------------------------------------------------------------------------

    def log_z(self, reward: Array, beta: float | Array) -> Array:
        """`log E_p[exp(r(x) / beta)]`, `[]`; `reward[V**T]` may be `-inf` for forbidden strings."""
        return self.soft_values(reward, beta)[0][0]

    def soft_values(self, reward: Array, beta: float | Array) -> tuple[Array, ...]:
        r"""Log optimal twists, `L_t(x_<=t) = log E_p[exp(r(x) / beta) | x_<=t]`, `[V**t]` for `t = 0..T`.

        By `L_T = r / beta`, `L_t = logsumexp_v(log p(v | .) + L_(t+1)(. v))`; the soft value of a prefix is `beta L_t`.
        A prefix that only forbidden strings continue has `-inf`.

        Args:
          reward: `[V**T]`.
          beta: the temperature, a scalar.

        Returns:
          `T + 1` vectors.

        Raises:
          ValueError: `reward` has not one entry for each string.

        Reference: Probabilistic Inference in Language Models via Twisted Sequential Monte Carlo, arXiv:2404.17546.
        """
        self.check_per_sequence(reward=reward)
        return self._backward(log_potential(reward, beta), lambda rows, values: log_sum_exp(rows + values))

    def values(self, reward: Array) -> tuple[Array, ...]:
        """Hard values, `Q_t(x_<=t) = E_p[r(x) | x_<=t]`, `[V**t]` for `t = 0..T`; never above `beta L_t`.

        A prefix from which `p` may reach a string of reward `-inf` has `-inf`, without gradient.

        Raises:
          ValueError: `reward` has not one entry for each string.
        """

        def expectation(rows: Array, values: Array) -> Array:
            forbidden = values == -jnp.inf
            mean = jnp.sum(jnp.exp(rows) * jnp.where(forbidden, 0, values), -1)
            return jnp.where(jnp.any(forbidden & (rows != -jnp.inf), -1), -jnp.inf, mean)

        self.check_per_sequence(reward=reward)
        return self._backward(at_least_float32(reward), expectation)

    def next_token_values(self, values: Sequence[Array]) -> Array:
        """The value of each prefix's each continuation, `[NP, V]`, from `T + 1` vectors `[V**t]` (the first unused).

        Raises:
          ValueError: they are not `T + 1` vectors of these lengths.
        """
        wanted = [(self.vocabulary**t,) for t in range(self.horizon + 1)]
        if [value.shape for value in values] != wanted:
            raise ValueError(f"values must have shapes {wanted}, got {[value.shape for value in values]}")
        return jnp.concatenate(values[1:]).reshape(-1, self.vocabulary)

    def tilt(self, reward: Array, beta: float | Array) -> "TabularLM":
        r"""The law `p*(x) = p(x) exp(r(x) / beta) / Z` by `p*(v | .) = p(v | .) exp(L_(t+1)(. v) - L_t(.))`.

        Prefixes that `p*` never reaches keep the row of `p`. If every string is forbidden there is no `p*`, and the
        table is NaN.

        Args:
          reward: `[V**T]`; may be `-inf`.
          beta: the temperature, a scalar.

        Raises:
          ValueError: `reward` has not one entry for each string.

        Reference: Probabilistic Inference in Language Models via Twisted Sequential Monte Carlo, arXiv:2404.17546.
        """
        table, soft_values = self.table, self.soft_values(reward, beta)
        rows, _ = normalize_log_weights(table + self.next_token_values(soft_values), table)
        return TabularLM(jnp.where(soft_values[0] == -jnp.inf, jnp.nan, rows), self.horizon)

    # --- token by token -----------------------------------------------------------------------------------------------

    def language_model(self) -> LanguageModel:
        """The model read token by token; its logits are log-probs, and its cache is each row's depth and code, `[B]`.

        Slots where a prompt's mask is 0 are skipped; a prompt may have no slots. Past the horizon token 0 is certain,
        so that rows of one batch may end at different times and what they write after their end has log-prob 0.
        `rewind` undoes tokens past the horizon too, and stops at the empty prefix. Tokens outside the vocabulary are
        not noticed.

        Raises:
          ValueError: (from `init`) `prompt` is not a matrix of integers, or `mask` has another shape.
        """

        def init(prompt: Array, mask: Array) -> tuple[Array, _Prefix]:
            if prompt.ndim != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer):
                raise ValueError(f"prompt must be integers [B, T0], got {prompt.dtype} {prompt.shape}")
            check_same_shape(prompt=prompt, mask=mask)
            nothing = jnp.zeros(prompt.shape[0], jnp.int32)
            prefix, _ = jax.lax.scan(
                lambda prefix, slot: (self._append(prefix, *slot), None), _Prefix(nothing, nothing), (prompt.T, mask.T)
            )
            return self._next_token_log_probs(prefix), prefix

        def step(cache: _Prefix, token: Array) -> tuple[Array, _Prefix]:
            cache = self._append(cache, token, jnp.ones_like(token))
            return self._next_token_log_probs(cache), cache

        def extend(cache: _Prefix, tokens: Array) -> tuple[Array, _Prefix]:
            cache, logits = jax.lax.scan(lambda cache, token: step(cache, token)[::-1], cache, tokens.T)
            return jnp.moveaxis(logits, 0, 1), cache

        return LanguageModel(init, step, extend, self._rewind)

    def _append(self, prefix: "_Prefix", token: Array, mask: Array) -> "_Prefix":
        read = mask != 0
        # A code past the horizon would soon overflow; what is there is token 0 or has no mass, so it need not be known.
        inside = read & (prefix.depth < self.horizon)
        code = jnp.where(inside, prefix.code * self.vocabulary + token.astype(jnp.int32), prefix.code)
        return _Prefix(prefix.depth + read.astype(jnp.int32), code)

    def _rewind(self, cache: "_Prefix", n: Array) -> "_Prefix":
        depth = jnp.maximum(cache.depth - jnp.asarray(n, jnp.int32), 0)
        dropped = jnp.minimum(cache.depth, self.horizon) - jnp.minimum(depth, self.horizon)
        powers = jnp.array([self.vocabulary**t for t in range(self.horizon + 1)], jnp.int32)
        return _Prefix(depth, cache.code // powers[dropped])

    def _next_token_log_probs(self, prefix: "_Prefix") -> Array:
        offsets = jnp.array([_offset(self.vocabulary, t) for t in range(self.horizon)], jnp.int32)
        rows = offsets[jnp.minimum(prefix.depth, self.horizon - 1)] + prefix.code
        table = self.table
        ended = jnp.where(jnp.arange(self.vocabulary) == 0, 0.0, -jnp.inf).astype(table.dtype)
        inside = prefix.depth < self.horizon
        return jnp.where(inside[:, None], table[jnp.where(inside, rows, 0)], ended)

    # --- shared -------------------------------------------------------------------------------------------------------

    def _by_depth(self, table: Array) -> list[Array]:
        """The rows of each depth, `[V**t, V]` for `t = 0..T-1`."""
        edges = [_offset(self.vocabulary, t) for t in range(1, self.horizon)]
        return jnp.split(table, edges)

    def _backward(self, last: Array, step: Callable[[Array, Array], Array]) -> tuple[Array, ...]:
        vectors = [last]
        for rows in reversed(self._by_depth(self.table)):
            vectors.append(step(rows, vectors[-1].reshape(rows.shape)))
        return tuple(reversed(vectors))


class _Prefix(NamedTuple):
    """What each row of a batch has read."""

    depth: Array  # [B] tokens read, also past the horizon
    code: Array  # [B] code of those up to the horizon


def _offset(vocabulary: int, t: int) -> int:
    """Number of prefixes shorter than `t`, `(V**t - 1) / (V - 1)`, also for `V = 1`."""
    return sum(vocabulary**s for s in range(t))


def golden_testbed() -> tuple[TabularLM, Array]:
    """The model and reward whose numbers the tests know: `V = 3`, `T = 4`, meant for `beta = 0.5`.

    Logits are `2 sin(1.7 n + 2.3 v + 0.5)` for row `n` and token `v`, the reward of code `c` is
    `1.5 sin(0.9 c + 0.3)`; no random numbers, in the precision of the default float type.
    """
    row, token, code = (jnp.arange(n, dtype=jnp.result_type(float)) for n in (_offset(3, 4), 3, 3**4))
    logits = 2 * jnp.sin(1.7 * row[:, None] + 2.3 * token + 0.5)
    return TabularLM(jax.nn.log_softmax(logits), 4), 1.5 * jnp.sin(0.9 * code + 0.3)


# --- log space where -inf is a value: no NaN in either direction of differentiation -----------------------------------


def log_sum_exp(log_weights: Array) -> Array:
    """`log sum exp` over the last axis; all `-inf` gives `-inf`, with gradient zero."""
    empty = jnp.all(log_weights == -jnp.inf, axis=-1)
    return jnp.where(empty, -jnp.inf, logsumexp(jnp.where(empty[..., None], 0, log_weights), axis=-1))


def normalize_log_weights(log_weights: Array, fallback: Array) -> tuple[Array, Array]:
    """Log-probs along the last axis, and the log normalisers; where all weights are `-inf`, the fallback and `-inf`."""
    log_normalizers = log_sum_exp(log_weights)
    empty = log_normalizers == -jnp.inf
    log_probs = log_weights - jnp.where(empty, 0, log_normalizers)[..., None]
    return jnp.where(empty[..., None], fallback, log_probs), log_normalizers


def log_potential(reward: Array, beta: float | Array) -> Array:
    """`r / beta`, with `-inf` for a reward of `-inf` and no gradient there, for rewards and for `beta`."""
    reward = at_least_float32(reward)
    forbidden = reward == -jnp.inf
    return jnp.where(forbidden, -jnp.inf, jnp.where(forbidden, 0, reward) / beta)
