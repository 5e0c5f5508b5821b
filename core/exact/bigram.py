r"""A bigram model, tilted by rewards that add up over positions and held to a finite automaton: exact at any length.

`p*(x)` is proportional to `p(x) exp(sum_t u[t, x_t]) 1[the automaton accepts x]`. What is left to come depends on the
last token and the automaton's state alone, so that one backward pass over both gives the normaliser and every
next-token law, at a cost of `T V^2 Q`, where `TabularLM` would need all `V^T` strings.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_known
from esscher.core.exact.tabular_lm import log_sum_exp, normalize_log_weights

__all__ = ["TiltedBigram"]


class TiltedBigram(NamedTuple):
    r"""The law `p*(x)` on strings of `T` tokens, `V` of them, with an automaton of `Q` states.

    Methods are in nats, float32 at least, and differentiable in the log-probs and the scores. If no string is accepted,
    `log_z` is `-inf` and there is no law: the other results mean nothing.

    Attributes:
      start: log-probs of the first token, `[V]`.
      transitions: log-probs of the next token (second axis) given the last (first axis), `[V, V]`.
      scores: `u`, the reward of each token at each position over beta, `[T, V]`; may be `-inf`.
      next_state: the automaton, integers in `0..Q-1`, `[Q, V]`.
      accepting: booleans, `[Q]`.
      first_state: before the first token, an integer scalar in `0..Q-1`.

    Reference: Adaptable Logical Control for Large Language Models, arXiv:2406.13892.
    """

    start: Array
    transitions: Array
    scores: Array
    next_state: Array
    accepting: Array
    first_state: int | Array = 0

    def log_z(self) -> Array:
        """`log E_p[exp(sum_t u[t, x_t]) 1[accepted]]`, `[]`."""
        first = self._continuations()[0, self.first_state]
        return log_sum_exp(at_least_float32(self.start) + first)

    def sample(self, key: Array, n: int) -> Array:
        """`n` independent draws from `p*`, integers `[n, T]`."""
        table, continuations = self._table(), self._continuations()

        def step(state: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
            (last, automaton), (key, continuation) = state, inputs
            token = jax.random.categorical(key, table[last] + continuation[automaton]).astype(last.dtype)
            return (token, self.next_state[automaton, token]), token

        keys = jax.random.split(key, self.scores.shape[0])
        return jax.lax.scan(step, self._before_first_token(n), (keys, continuations))[1].T

    def next_token_log_probs(self, tokens: Array) -> Array:
        """`log p*(v | x_<t)` for the prefixes of given strings, integers `[B, T] -> [B, T, V]`.

        Prefixes that `p*` never reaches keep the law of the bigram model. The entries at the strings' own tokens sum
        to `log p*(x)` for strings that are accepted.

        Raises:
          ValueError: `tokens` does not hold strings of `T` tokens.
        """
        table, continuations = self._table(), self._continuations()
        if tokens.ndim != 2 or tokens.shape[1] != self.scores.shape[0]:
            raise ValueError(f"tokens must have shape [B, {self.scores.shape[0]}], got {tokens.shape}")

        def step(state: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
            (last, automaton), (token, continuation) = state, inputs
            log_probs, _ = normalize_log_weights(table[last] + continuation[automaton], table[last])
            return (token, self.next_state[automaton, token]), log_probs

        first = self._before_first_token(tokens.shape[0])
        _, log_probs = jax.lax.scan(step, first, (tokens.astype(first[0].dtype).T, continuations))
        return jnp.moveaxis(log_probs, 0, 1)

    def _continuations(self) -> Array:
        """`u[t, v]` and all that may follow, in state `q` before position `t`: `C[t, q, v]`, `[T, Q, V]`."""
        self._check()
        transitions, scores = at_least_float32(self.transitions), at_least_float32(self.scores)

        def step(messages: Array, score: Array) -> tuple[Array, Array]:
            continuation = score + messages[jnp.arange(score.size), self.next_state]
            return log_sum_exp(transitions[:, None] + continuation), continuation

        accepted = jnp.where(self.accepting, 0.0, -jnp.inf).astype(jnp.result_type(transitions, scores))
        last = jnp.broadcast_to(accepted, (transitions.shape[0], accepted.size))
        return jax.lax.scan(step, last, scores, reverse=True)[1]

    def _table(self) -> Array:
        """Next-token log-probs by last token, the row after the vocabulary being the start, `[V + 1, V]`."""
        return at_least_float32(jnp.concatenate([self.transitions, self.start[None]]))

    def _before_first_token(self, n: int) -> tuple[Array, Array]:
        states = jnp.full(n, self.first_state, self.next_state.dtype)
        return jnp.full(n, self.start.shape[0], jnp.int32), states

    def _check(self) -> None:
        tokens, states = self.start.shape[0], self.accepting.shape[0]
        wanted = {
            "start": (tokens,),
            "transitions": (tokens, tokens),
            "scores": (*self.scores.shape[:1], tokens),
            "next_state": (states, tokens),
            "accepting": (states,),
        }
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {getattr(self, name).shape}")
        if not jnp.issubdtype(self.next_state.dtype, jnp.integer):
            raise ValueError(f"next_state must be integers, got {self.next_state.dtype}")
        inside = lambda state: (state >= 0) & (state < states)  # noqa: E731
        check_known(inside, f"in 0..{states - 1}", first_state=self.first_state, next_state=self.next_state)
