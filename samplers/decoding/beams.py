r"""Beam search, and sampling without replacement by stochastic beam search.

Both keep the `width` best prefixes by a rank, and share one loop: the beams of a prompt are rows of one batch, whose
caches are gathered from the parents' after each token. A beam that has stopped has one child, itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core.arrays import at_least_float32, check_floating
from esscher.core.contracts import LanguageModel
from esscher.samplers.decoding.generation import check_prompt

__all__ = ["Beams", "StochasticBeams", "beam_search", "log_inclusion_weights", "stochastic_beam_search"]


class Beams(NamedTuple):
    """The best continuations found, best first; where there are fewer than `width`, scores are `-inf` and masks 0."""

    tokens: Array  # [B, width, length], `pad` where the mask is 0
    mask: Array  # [B, width, length], 1 up to the first stop token, that one included
    score: Array  # [B, width]


class StochasticBeams(NamedTuple):
    """Continuations drawn without replacement, in the order drawn; past the last one there is, values are `-inf`."""

    tokens: Array  # [B, width, length], `pad` where the mask is 0
    mask: Array  # [B, width, length], 1 up to the first stop token, that one included
    logp: Array  # [B, width] log p of the whole continuation
    perturbed: Array  # [B, width] log p + Gumbel noise, descending
    kappa: Array  # [B] the largest perturbed log-prob among all other continuations


def beam_search(
    language_model: LanguageModel,
    prompt: Array,
    mask: Array,
    length: int,
    *,
    width: int,
    stop: Sequence[int] = (),
    length_penalty: float | Array = 0.0,
    pad: int = 0,
) -> Beams:
    r"""Looks for the continuations with the largest `score(x) = log p(x) / |x|^length_penalty`.

    At each length it keeps the `width` best among all children of those kept and all that have stopped, by this score.
    Width 1 is greedy decoding; with as many beams as there are prefixes nothing is lost.

    Args:
      language_model: gives `log p`; its cache gets `width` rows for each prompt.
      prompt: integers, `[B, T0]`, padded on the left.
      mask: `[B, T0]`, 0 where the prompt is padding.
      length: number of tokens at most.
      width: number of beams.
      stop: tokens after which a beam stops; they count in its length.
      length_penalty: 0 compares log-probs, 1 their means over tokens; above 0 it favours long continuations.
      pad: token to fill up with.

    Returns:
      The `width` best, best first, and their scores, in nats per `|x|^length_penalty`.

    Raises:
      ValueError: a prompt that is not integers `[B, T0]`, a mask of another shape, `length` or `width` below 1.

    Reference: Google's Neural Machine Translation System, arXiv:1609.08144; there lengths are `(5 + n) / 6`.
    """

    def rank(i: Array, logp: Array, parent: Array) -> Array:
        return logp / (i + 1).astype(logp.dtype) ** length_penalty  # beams that still grow have one length

    found = _search(language_model, prompt, mask, length, width, stop, pad, rank)
    return Beams(found.tokens, found.mask, found.rank)


def stochastic_beam_search(
    key: Array,
    language_model: LanguageModel,
    prompt: Array,
    mask: Array,
    length: int,
    *,
    width: int,
    stop: Sequence[int] = (),
    pad: int = 0,
) -> StochasticBeams:
    r"""Draws `width` different continuations: those with the largest `G(x) = log p(x) + Gumbel noise`.

    The first is a sample of `p`, each next one a sample of `p` given that it is none before it, and the noise of the
    exponentially many others is never drawn: a prefix has the largest `G` of its continuations, a Gumbel variable at
    its own log-prob, and its children's `G~ = log p + Gumbel` are conditioned on having that maximum,

        G(v) = -log(exp(-G(parent)) - exp(-max_u G~(u)) + exp(-G~(v))).

    Args:
      key: a random key.
      language_model, prompt, mask, length, stop, pad: as for `beam_search`.
      width: number of continuations.

    Returns:
      The continuations, their log-probs in nats, and what `log_inclusion_weights` needs.

    Raises:
      ValueError: as `beam_search`.

    Reference: Stochastic Beams and Where to Find Them, arXiv:1903.06059.
    """

    def rank(i: Array, logp: Array, parent: Array) -> Array:
        perturbed = logp + jax.random.gumbel(jax.random.fold_in(key, i), logp.shape, logp.dtype)
        # The first tokens' maximum is whatever it is; to condition it on a fixed number would bias the weights.
        return jnp.where(i == 0, perturbed, _given_maximum(perturbed, parent))

    found = _search(language_model, prompt, mask, length, width, stop, pad, rank)
    return StochasticBeams(*found[:4], found.cut)


def log_inclusion_weights(logp: Array, kappa: Array) -> Array:
    r"""Weights `log(p(x) / q(x))` with which continuations drawn without replacement estimate expectations.

    `q(x) = P(G(x) > kappa) = 1 - exp(-exp(log p(x) - kappa))` is the probability that `x` was drawn, given the noise
    of the others, so `sum_x p(x) / q(x) f(x)` over those drawn has mean `E_p[f]`; divided by the sum of the weights it
    is biased and varies less. The inner exponent is clipped at 5, past which `q` is 1.

    Args:
      logp, kappa: `[..., width]` and `[...]`, as `stochastic_beam_search` returns them.

    Returns:
      `[..., width]`, in nats; `-inf` where `logp` is.

    Raises:
      ValueError: the shapes do not fit, or an array is not of a floating type.

    Reference: Stochastic Beams and Where to Find Them, arXiv:1903.06059.
    """
    check_floating(logp=logp, kappa=kappa)
    logp, kappa = at_least_float32(logp), at_least_float32(kappa)
    if logp.ndim < 1 or logp.shape[:-1] != kappa.shape:
        raise ValueError(f"logp must have the shape of kappa and one more axis, got {logp.shape} and {kappa.shape}")
    excess = jnp.where(logp == -jnp.inf, 0, logp) - kappa[..., None]
    # q is exp(excess) to the last digit below -30, where 1 - exp(-exp(excess)) soon would be 0.
    log_q = jnp.log(-jnp.expm1(-jnp.exp(jnp.clip(excess, -30, 5)))) + jnp.minimum(excess + 30, 0)
    return jnp.where(logp == -jnp.inf, -jnp.inf, logp - log_q)


def _given_maximum(perturbed: Array, maximum: Array) -> Array:
    """Moves Gumbel variables `[..., V]` so that their maximum is `maximum[..., 1]`, see `stochastic_beam_search`."""
    gap = perturbed.max(-1, keepdims=True) - perturbed  # 0 at the largest, where v is -inf
    v = maximum - perturbed + jnp.log(-jnp.expm1(-gap))
    moved = maximum - jnp.maximum(v, 0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    return jnp.where(perturbed == -jnp.inf, -jnp.inf, moved)


class _Beams(NamedTuple):
    tokens: Array  # [B, W, length]
    mask: Array  # [B, W, length]
    logp: Array  # [B, W]
    rank: Array  # [B, W] what they are kept by, descending; -inf for a beam that does not exist
    cut: Array  # [B] the best rank that was not kept
    alive: Array  # [B, W] whether it still grows


_Rank = Callable[[Array, Array, Array], Array]  # (i, children's logp[B, W, V], parents' rank[B, W, 1]) -> [B, W, V]


def _search(
    model: LanguageModel, prompt: Array, mask: Array, length: int, width: int, stop: Sequence, pad: int, rank: _Rank
) -> _Beams:
    """Keeps the `width` best by rank, after each token."""
    check_prompt(prompt, mask, length)
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    logits, cache = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), model.init(prompt, mask))

    def advance(i: Array, logits: Array, cache: Any, beams: _Beams) -> tuple:
        beams, parent = _expand(i, logits, beams, stop, rank)
        rows = (jnp.arange(parent.shape[0])[:, None] * width + parent).reshape(-1)
        return i + 1, jax.tree.map(lambda x: x[rows], cache), beams

    def body(state: tuple) -> tuple:
        i, cache, beams = state
        logits, cache = model.step(cache, beams.tokens[:, :, i - 1].reshape(-1))
        return advance(i, logits, cache, beams)

    only = jnp.broadcast_to(jnp.arange(width) == 0, (prompt.shape[0], width))  # one empty prefix, not `width` of them
    logp = jnp.where(only, 0, -jnp.inf).astype(at_least_float32(logits).dtype)
    tokens = jnp.zeros((*only.shape, length), jnp.int32)
    beams = _Beams(tokens, jnp.zeros_like(tokens, bool), logp, logp, jnp.full_like(logp[:, 0], -jnp.inf), only)
    state = advance(jnp.array(0), logits, cache, beams)
    beams = jax.lax.while_loop(lambda state: (state[0] < length) & state[2].alive.any(), body, state)[2]
    mask = beams.mask & (beams.rank > -jnp.inf)[..., None]
    return beams._replace(tokens=jnp.where(mask, beams.tokens, pad), mask=mask)


def _expand(i: Array, logits: Array, beams: _Beams, stop: Sequence[int], rank: _Rank) -> tuple[_Beams, Array]:
    """The best of the beams' children at position `i`, and their parents `[B, W]`."""
    (batch, width), vocabulary = beams.rank.shape, logits.shape[-1]
    logp = jax.nn.log_softmax(at_least_float32(logits)).reshape(batch, width, vocabulary) + beams.logp[..., None]
    ranks = rank(i, logp, beams.rank[..., None]).astype(logp.dtype)
    grows, itself = beams.alive[..., None], jnp.arange(vocabulary) == 0
    logp, ranks = (
        jnp.where(grows, new, jnp.where(itself, old[..., None], -jnp.inf)).reshape(batch, -1)
        for new, old in ((logp, beams.logp), (ranks, beams.rank))
    )
    # One candidate more, so that with a vocabulary of one token there is a best one that is not kept.
    best, index = jax.lax.top_k(jnp.pad(ranks, ((0, 0), (0, 1)), constant_values=-jnp.inf), width + 1)
    best, cut, index = best[:, :width], jnp.maximum(beams.cut, best[:, width]), index[:, :width]
    parent, token = index // vocabulary, index % vocabulary
    alive = jnp.take_along_axis(beams.alive, parent, axis=1) & (best > -jnp.inf)
    tokens, mask = (
        jnp.take_along_axis(old, parent[..., None], axis=1).at[:, :, i].set(new)
        for old, new in ((beams.tokens, token), (beams.mask, alive))
    )
    alive &= ~jnp.isin(token, jnp.asarray(stop, jnp.int32))
    return _Beams(tokens, mask, jnp.take_along_axis(logp, index, axis=1), best, cut, alive), parent
