"""Preference methods as they run in the race: what each asks of a policy on strings, and its default temperature."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.objectives.preference import anchored, lists, pair_scores, pair_terms, pairs, reference_free

__all__ = ["RACERS", "Data", "Problem", "Racer", "View", "draw", "string_logps"]

LINKS, SCORES, LENGTHS, SINGLE, LISTS = (
    "pairs by link and label",
    "pairs by score and term",
    "pairs with lengths or without a reference",
    "single responses",
    "lists and batches",
)
"""Families of methods, one figure each."""

LIST = 4  # responses to a prompt, for the methods that take lists


class Problem(NamedTuple):
    """Strings of a tabular language model, all `N` that have a probability."""

    logits: Array  # [NP, V] of the reference
    tokens: Array  # [N, T]
    mask: Array  # [N, T] up to the end token, that one included
    rows: Array  # [N, T] of the table, that each token is drawn from
    length: Array  # [N]
    reward: Array  # [N]


class Data(NamedTuple):
    """Indices of strings drawn from the reference, labelled by Bradley-Terry or Plackett-Luce from their rewards."""

    chosen: Array  # [P]
    rejected: Array  # [P]
    ranked: Array  # [P / 4, 4] best first


def string_logps(task: Problem, logits: Array) -> Array:
    """Log-probability of each token of each string, `[N, T]`, 0 after its end."""
    table = jax.nn.log_softmax(logits)
    return jnp.where(task.mask, table[task.rows, task.tokens], 0)


def draw(key: Array, task: Problem, n: int) -> Data:
    """`n` labelled pairs, and a quarter as many lists of four, of strings from the reference."""
    log_p = string_logps(task, task.logits).sum(-1)
    pair_key, label_key, list_key, rank_key = jax.random.split(key, 4)
    both = jax.random.categorical(pair_key, log_p, shape=(n, 2))
    first, second = both.T
    wins = jax.random.bernoulli(label_key, jax.nn.sigmoid(task.reward[first] - task.reward[second]))
    several = jax.random.categorical(list_key, log_p, shape=(max(n // LIST, 1), LIST))
    noisy = task.reward[several] + jax.random.gumbel(rank_key, several.shape)
    ranked = jnp.take_along_axis(several, jnp.argsort(-noisy, axis=-1), axis=-1)
    return Data(jnp.where(wins, first, second), jnp.where(wins, second, first), ranked)


class View(NamedTuple):
    """A policy as seen through the data."""

    task: Problem
    logits: Array
    data: Data

    @property
    def four(self) -> tuple[Array, Array, Array, Array]:
        """Log-probabilities of chosen and rejected under the policy, then under the reference, `[P]` each."""
        policy, reference = (string_logps(self.task, x).sum(-1) for x in (self.logits, self.task.logits))
        chosen, rejected = self.data.chosen, self.data.rejected
        return policy[chosen], policy[rejected], reference[chosen], reference[rejected]

    @property
    def token_four(self) -> tuple[Array, Array, Array, Array]:
        """The same token by token, `[P, T]` each."""
        policy, reference = (string_logps(self.task, x) for x in (self.logits, self.task.logits))
        chosen, rejected = self.data.chosen, self.data.rejected
        return policy[chosen], policy[rejected], reference[chosen], reference[rejected]

    @property
    def masks(self) -> dict[str, Array]:
        """Of the tokens."""
        mask = self.task.mask
        return {"chosen_mask": mask[self.data.chosen], "rejected_mask": mask[self.data.rejected]}

    @property
    def lengths(self) -> dict[str, Array]:
        """Of the strings."""
        length = self.task.length
        return {"len_chosen": length[self.data.chosen], "len_rejected": length[self.data.rejected]}

    @property
    def nll(self) -> Array:
        """Of the chosen string, `[P]`, per token."""
        return -self.four[0] / self.lengths["len_chosen"]

    @property
    def kls(self) -> dict[str, Array]:
        """`sum_t KL(reference || policy)` of the next-token laws along each string."""
        log_p, log_q = jax.nn.log_softmax(self.task.logits), jax.nn.log_softmax(self.logits)
        by_row = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        along = jnp.where(self.task.mask, by_row[self.task.rows], 0).sum(-1)
        return {"kl_chosen": along[self.data.chosen], "kl_rejected": along[self.data.rejected]}

    @property
    def listed(self) -> tuple[Array, Array, Array]:
        """Log-probabilities of the lists under policy and reference, and rewards, `[P / 4, 4]` each, best first."""
        policy, reference = (string_logps(self.task, x).sum(-1) for x in (self.logits, self.task.logits))
        ranked = self.data.ranked
        return policy[ranked], reference[ranked], self.task.reward[ranked]

    @property
    def listed_means(self) -> Array:
        """Mean log-probability per token of the lists."""
        return self.listed[0] / self.task.length[self.data.ranked]


class Racer(NamedTuple):
    """A method in the race."""

    family: str
    beta: float  # the default; the race runs it at eight temperatures around
    loss: Callable[[View, Array], Array]  # -> [P]
    tilts: bool = False  # whether its optimum is the tilt of the reference at its own beta


def _pair(family: str, function: Callable, beta: float, *, tilts: bool = False, **options: float) -> Racer:
    return Racer(family, beta, lambda view, beta: function(*view.four, beta=beta, **options), tilts)


def _pointwise(function: Callable, beta: float) -> Racer:
    return Racer(SINGLE, beta, lambda view, beta: function(*view.four, beta=beta))


def _kto(view: View, beta: Array) -> Array:
    chosen, rejected, ref_chosen, ref_rejected = view.four
    # Strings of other pairs: there is one prompt, so the mismatch that estimates the divergence is a shift.
    baseline = anchored.kto_baseline(jnp.roll(rejected, 1), jnp.roll(ref_rejected, 1))
    options = {"beta": beta, "kl_baseline": baseline}
    return anchored.kto(chosen, ref_chosen, 1.0, **options) + anchored.kto(rejected, ref_rejected, 0.0, **options)


def _trained_on_lists(function: Callable, beta: float, *, tilts: bool = False) -> Racer:
    def loss(view: View, beta: Array) -> Array:
        policy, reference, rewards = view.listed
        return function(policy, reference, rewards, beta=beta)

    return Racer(LISTS, beta, loss, tilts)


RACERS: dict[str, Racer] = {
    "DPO": _pair(LINKS, pairs.dpo, 1.0, tilts=True),
    "cDPO": _pair(LINKS, pairs.cdpo, 1.0),
    "rDPO": _pair(LINKS, pairs.rdpo, 1.0),
    "IPO": _pair(LINKS, pairs.ipo, 0.5, normalize=False),
    "hinge": _pair(LINKS, pairs.hinge, 1.0),
    "EXO": _pair(LINKS, pairs.exo_pair, 1.0),
    "DiscoPOP": _pair(LINKS, pairs.discopop, 1.0),
    "DPOP": _pair(SCORES, pair_scores.dpop, 1.0, penalty=5.0),
    "f-DPO (JS)": _pair(SCORES, pair_scores.f_dpo, 1.0, kind="js"),
    "chi-PO": _pair(SCORES, pair_scores.chi_po, 1.0),
    "R-DPO": Racer(LENGTHS, 1.0, lambda v, beta: pairs.r_dpo(*v.four, **v.lengths, beta=beta)),
    "LN-DPO": Racer(LENGTHS, 3.0, lambda v, beta: pair_scores.length_normalized_dpo(*v.four, **v.lengths, beta=beta)),
    "LD-DPO": Racer(LENGTHS, 1.0, lambda v, beta: pair_scores.ld_dpo(*v.token_four, **v.masks, beta=beta)),
    "SimPO": Racer(LENGTHS, 2.5, lambda v, beta: reference_free.simpo(*v.four[:2], **v.lengths, beta=beta, gamma=0.3)),
    "AlphaPO": Racer(LENGTHS, 2.5, lambda v, beta: reference_free.alphapo(*v.four[:2], **v.lengths, beta=beta)),
    "ORPO": Racer(LENGTHS, 1.0, lambda v, beta: reference_free.orpo(*v.four[:2], **v.lengths, nll=v.nll, beta=beta)),
    "CPO": Racer(LENGTHS, 1.0, lambda v, beta: reference_free.cpo(*v.four[:2], nll=v.nll, beta=beta)),
    "TDPO1": Racer(SCORES, 1.0, lambda v, beta: pair_scores.tdpo1(*v.four, **v.kls, beta=beta)),
    "TDPO2": Racer(SCORES, 1.0, lambda v, beta: pair_scores.tdpo2(*v.four, **v.kls, beta=beta)),
    "RPO": Racer(SCORES, 1.0, lambda v, beta: pair_terms.rpo(*v.four, nll=v.nll, beta=beta)),
    "KTO": Racer(SINGLE, 1.0, _kto),
    "BCO": _pointwise(anchored.bco_pair, 1.0),
    "NCA": _pointwise(anchored.nca_pair, 1.0),
    "APO-zero": _pointwise(anchored.apo_zero, 1.0),
    "APO-down": _pointwise(anchored.apo_down, 1.0),
    "SPPO": _pointwise(anchored.sppo, 0.5),
    "AOT": Racer(LISTS, 1.0, lambda v, beta: lists.aot_paired(*v.four, beta=beta)),
    "AOT, unpaired": Racer(LISTS, 1.0, lambda v, beta: lists.aot_unpaired(*v.four, beta=beta)),
    "Plackett-Luce DPO": Racer(
        LISTS, 1.0, lambda v, beta: lists.plackett_luce_dpo(*v.listed[:2], beta=beta), tilts=True
    ),
    "LiPO": _trained_on_lists(lists.lipo, 1.0),
    "InfoNCA": _trained_on_lists(lambda *a, beta: lists.infonca(*a, temperature=1.0, beta=beta), 1.0, tilts=True),
    "EXO, lists": _trained_on_lists(lambda *a, beta: lists.exo_list(*a, temperature=1.0, beta=beta), 1.0, tilts=True),
    "RRHF": Racer(LISTS, 1.0, lambda v, beta: lists.rrhf(v.listed_means, v.listed[2])),
}
