"""Preference methods as they run in the race: what each asks of a policy on strings, and its default temperature.

Not here, because labelled strings of one prompt are not what they take: MAH-DPO (several heads), Step-APO, Tree-TPO and
RISE (values or trees of steps, edited copies), Nash-MD, P3O and extrapolation (samples of the policy as it learns),
Diffusion-DPO (denoising errors). Online DPO, SPIN, Step-DPO and RSO are losses that are here, on pairs that are not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.objectives.preference import (
    anchored,
    links,
    lists,
    losses,
    pair_scores,
    pair_terms,
    pairs,
    reference_free,
    regularizers,
    selfplay,
)

__all__ = ["RACERS", "Data", "Problem", "Racer", "View", "draw", "string_logps"]

LINKS, LABELS, SCORES, TERMS = "pairs by link", "pairs by label", "pairs by score", "pairs with weights and terms"
LENGTHS, FREE = "pairs with lengths", "pairs without a reference"
SINGLE, LIKELIHOOD = "single responses", "regression and weighted likelihood"
LISTS, FREE_LISTS, BATCHES = "lists", "lists without a reference", "batches and groups"
"""Families of methods, one figure each, of ten methods at most."""

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

    @property
    def listed_tokens(self) -> tuple[Array, Array, Array]:
        """Log-probabilities of the lists' tokens under policy and reference, and their mask, `[P / 4, 4, T]` each."""
        policy, reference = (string_logps(self.task, x) for x in (self.logits, self.task.logits))
        ranked = self.data.ranked
        return policy[ranked], reference[ranked], self.task.mask[ranked]

    @property
    def gap(self) -> Array:
        """Of the rewards of a pair, `[P]`."""
        return self.task.reward[self.data.chosen] - self.task.reward[self.data.rejected]

    @property
    def win_rates(self) -> dict[str, Array]:
        """Probability that each string of a pair beats one of the reference's."""
        reward, law = self.task.reward, jnp.exp(string_logps(self.task, self.task.logits).sum(-1))
        rates = jax.nn.sigmoid(reward[:, None] - reward) @ law
        return {"win_rate_chosen": rates[self.data.chosen], "win_rate_rejected": rates[self.data.rejected]}

    @property
    def weights(self) -> dict[str, Array]:
        """WPO's, of the two strings of a pair."""
        log_collision = jax.nn.logsumexp(2 * jax.nn.log_softmax(self.logits), axis=-1)[self.task.rows]
        weight = regularizers.wpo_weight(string_logps(self.task, self.logits), log_collision, self.task.mask)
        return {"weight_chosen": weight[self.data.chosen], "weight_rejected": weight[self.data.rejected]}

    @property
    def singles(self) -> tuple[Array, Array, Array]:
        """Of all chosen, then all rejected strings: log-probabilities under policy and reference, 1 or 0, `[2 P]`."""
        chosen, rejected, ref_chosen, ref_rejected = self.four
        desirable = jnp.repeat(jnp.array([1.0, 0.0]), len(chosen), total_repeat_length=2 * len(chosen))
        return jnp.concatenate([chosen, rejected]), jnp.concatenate([ref_chosen, ref_rejected]), desirable

    @property
    def single_tokens(self) -> tuple[Array, Array, Array]:
        """Log-probabilities of the tokens of the same, their strings' rewards, and their mask, `[2 P, T]` each."""
        index = jnp.concatenate([self.data.chosen, self.data.rejected])
        mask = self.task.mask[index]
        return string_logps(self.task, self.logits)[index], jnp.where(mask, self.task.reward[index, None], 0), mask


class Racer(NamedTuple):
    """A method in the race."""

    family: str
    beta: float  # the default; the race runs it at eight temperatures around, or weights where there is no temperature
    loss: Callable[[View, Array], Array]  # -> [P], or whatever its mean is to be taken of
    tilts: bool = False  # whether its optimum is the tilt of the reference at its own beta


def _pair(family: str, function: Callable, beta: float, *, tilts: bool = False, **options: Any) -> Racer:
    return Racer(family, beta, lambda view, beta: function(*view.four, beta=beta, **options), tilts)


def _kto(view: View, beta: Array) -> Array:
    policy, reference, desirable = view.singles
    # There is one prompt, so the mismatch that estimates the divergence is a shift. The data are the reference's, not
    # the policy's, so the estimate is hardly ever above 0, where it is cut off: and then this is APO-zero.
    baseline = anchored.kto_baseline(jnp.roll(policy, 1), jnp.roll(reference, 1))
    return anchored.kto(policy, reference, desirable, kl_baseline=baseline, beta=beta)


def _bco(view: View, beta: Array) -> Array:
    policy, reference, desirable = view.singles
    # All data are in the batch, so that the running mean of rewards is the batch's.
    return anchored.bco(policy, reference, desirable, baseline=beta * jnp.mean(policy - reference), beta=beta)


def _beta_dpo(view: View, beta: Array) -> Array:
    chosen, rejected = pairs.log_ratios(*view.four)
    margins = chosen - rejected
    mean, std = margins.mean(), margins.std()  # of all data, in the place of running statistics
    keep = regularizers.keep_typical_margins(jax.random.key(0), margins, mean, std).astype(margins.dtype)
    beta = regularizers.adaptive_beta(margins, mean, beta=beta, alpha=0.6, weights=keep)
    return pair_terms.beta_dpo(*view.four, beta=beta, keep=keep)


def _mm_dpo(view: View, beta: Array) -> Array:
    beta = regularizers.margin_scaled_beta(view.gap, beta=beta, w=0.5, k=0.5)
    return pair_terms.mm_dpo(*view.four, nll=view.nll, beta=beta)


def _vpo(view: View, beta: Array) -> Array:
    calibration = {"policy_calibration": view.four[0], "ref_calibration": view.four[2]}
    return pair_terms.vpo(*view.four, **calibration, attitude="pessimistic", beta=beta, alpha=0.1)


def _xpo(view: View, beta: Array) -> Array:
    # Either string is a sample of the reference as long as one does not ask which was chosen: so the mean of both.
    return pair_terms.xpo(*view.four, policy_exploration=sum(view.four[:2]) / 2, beta=beta, alpha=1e-3)


def _gepo(view: View, beta: Array) -> Array:
    policy, reference, _ = view.listed
    better, worse = jnp.split(policy - reference, 2, axis=-1)
    return losses.group_mean_pairwise(better, worse, beta=beta, variance_coef=0.1)


def _trpa(view: View, beta: Array) -> Array:
    policy, reference, mask = view.listed_tokens
    levels = jnp.broadcast_to(jnp.arange(1, LIST + 1), policy.shape[:2])  # lists are sorted, and the reference's
    return selfplay.trpa(policy, reference, reference, levels, mask, beta=beta)


def _brain(view: View, beta: Array) -> Array:
    policy, reference, rewards = view.listed
    return lists.brain(policy, reference, reference, rewards / beta)  # the proposal is the reference


def _rwr(view: View, beta: Array) -> Array:
    return anchored.advantage_weighted_nll(*view.single_tokens, beta=beta).sum(-1)


def _unlikelihood(view: View, alpha: Array) -> Array:
    logp, _, mask = view.single_tokens
    desirable = jnp.broadcast_to(view.singles[2][:, None], logp.shape)
    return anchored.unlikelihood(logp, desirable, mask, alpha=alpha).sum(-1)


def _trained_on_lists(function: Callable, beta: float, *, tilts: bool = False, **options: float) -> Racer:
    return Racer(LISTS, beta, lambda view, beta: function(*view.listed, beta=beta, **options), tilts)


RACERS: dict[str, Racer] = {
    "DPO": _pair(LINKS, pairs.dpo, 1.0, tilts=True),
    "IPO": _pair(LINKS, pairs.ipo, 0.5, normalize=False),
    "hinge": _pair(LINKS, pairs.hinge, 1.0),
    "truncated quadratic": _pair(LINKS, pairs.gpo, 1.0, link=links.truncated_quadratic_link),
    "exponential": _pair(LINKS, pairs.gpo, 1.0, link=links.exponential_link),
    "Savage": _pair(LINKS, pairs.gpo, 1.0, link=links.savage_link),
    "EXO": _pair(LINKS, pairs.exo_pair, 1.0),
    "DiscoPOP": _pair(LINKS, pairs.discopop, 1.0),
    "cDPO": _pair(LABELS, pairs.cdpo, 1.0),
    "rDPO": _pair(LABELS, pairs.rdpo, 1.0),
    "soft DPO": Racer(
        LABELS, 1.0, lambda v, beta: pairs.soft_dpo(*v.four, label_prob=jax.nn.sigmoid(v.gap), beta=beta), tilts=True
    ),
    "ODPO": Racer(LABELS, 1.0, lambda v, beta: pairs.odpo(*v.four, margin=v.gap, beta=beta)),
    "DNO": Racer(LABELS, 0.25, lambda v, beta: pairs.dno(*v.four, **v.win_rates, beta=beta)),
    "INPO": Racer(  # its first round, where the previous policy is the reference, and so IPO
        LABELS,
        0.5,
        lambda v, eta: pair_scores.inpo(*v.four, previous_chosen=v.four[2], previous_rejected=v.four[3], eta=eta),
    ),
    "DPOP": _pair(SCORES, pair_scores.dpop, 1.0, penalty=5.0),
    "f-DPO (JS)": _pair(SCORES, pair_scores.f_dpo, 1.0, kind="js"),
    "chi-PO": _pair(SCORES, pair_scores.chi_po, 1.0),
    "DPO-gamma": _pair(SCORES, pair_scores.dpo_gamma, 1.0, gamma=0.5),
    "Flex-DPO": Racer(
        SCORES, 1.0, lambda v, beta: pair_scores.flex_dpo(*v.four, beta_chosen=beta, beta_rejected=beta / 2)
    ),
    "TDPO1": Racer(SCORES, 1.0, lambda v, beta: pair_scores.tdpo1(*v.four, **v.kls, beta=beta)),
    "TDPO2": Racer(SCORES, 1.0, lambda v, beta: pair_scores.tdpo2(*v.four, **v.kls, beta=beta)),
    "WPO": Racer(TERMS, 1.0, lambda v, beta: pair_terms.wpo(*v.four, **v.weights, beta=beta)),
    "beta-DPO": Racer(TERMS, 1.0, _beta_dpo),
    "MM-DPO": Racer(TERMS, 1.0, _mm_dpo),
    "RPO": Racer(TERMS, 1.0, lambda v, beta: pair_terms.rpo(*v.four, nll=v.nll, beta=beta)),
    "iterative RPO": Racer(
        TERMS, 1.0, lambda v, beta: pair_terms.iterative_rpo(*v.four, len_chosen=v.lengths["len_chosen"], beta=beta)
    ),
    "VPO": Racer(TERMS, 1.0, _vpo),
    "XPO": Racer(TERMS, 1.0, _xpo),
    "Dr. DPO": Racer(TERMS, 1.0, lambda v, beta: regularizers.tilted_mean(pairs.dpo(*v.four, beta=beta), -1.0)),
    "R-DPO": Racer(LENGTHS, 1.0, lambda v, beta: pairs.r_dpo(*v.four, **v.lengths, beta=beta)),
    "LN-DPO": Racer(LENGTHS, 3.0, lambda v, beta: pair_scores.length_normalized_dpo(*v.four, **v.lengths, beta=beta)),
    "LD-DPO": Racer(LENGTHS, 1.0, lambda v, beta: pair_scores.ld_dpo(*v.token_four, **v.masks, beta=beta)),
    "SimPO": Racer(FREE, 2.5, lambda v, beta: reference_free.simpo(*v.four[:2], **v.lengths, beta=beta, gamma=0.3)),
    "AlphaPO": Racer(FREE, 2.5, lambda v, beta: reference_free.alphapo(*v.four[:2], **v.lengths, beta=beta)),
    "ORPO": Racer(FREE, 1.0, lambda v, beta: reference_free.orpo(*v.four[:2], **v.lengths, nll=v.nll, beta=beta)),
    "CPO": Racer(FREE, 1.0, lambda v, beta: reference_free.cpo(*v.four[:2], nll=v.nll, beta=beta)),
    "SLiC": Racer(FREE, 1.0, lambda v, delta: reference_free.slic(*v.four[:2], nll=v.nll, delta=delta)),
    "REDI": Racer(FREE, 0.8, lambda v, alpha: anchored.redi(*v.four[:2], **v.lengths, alpha=alpha)),
    "CPL": Racer(
        FREE, 1.0, lambda v, beta: pair_scores.contrastive_preference(*v.token_four[:2], **v.masks, beta=beta)
    ),
    "KTO": Racer(SINGLE, 1.0, _kto),
    "BCO": Racer(SINGLE, 1.0, _bco),
    "BCO, pairs": _pair(SINGLE, anchored.bco_pair, 1.0),
    "NCA": _pair(SINGLE, anchored.nca_pair, 1.0),
    "APO-zero": _pair(SINGLE, anchored.apo_zero, 1.0),
    "APO-zero, unpaired": Racer(SINGLE, 1.0, lambda v, beta: anchored.apo_zero_unpaired(*v.singles, beta=beta)),
    "APO-down": _pair(SINGLE, anchored.apo_down, 1.0),
    "SPPO": _pair(LIKELIHOOD, anchored.sppo, 0.5),
    "Cal-DPO": _pair(LIKELIHOOD, anchored.cal_dpo, 0.5),
    "f-SFT (chi2)": Racer(LIKELIHOOD, 1.0, lambda v, beta: anchored.f_sft(*v.four[::2], phi="chi2", beta=beta)),
    "RWR": Racer(LIKELIHOOD, 1.0, _rwr, tilts=True),
    "unlikelihood": Racer(LIKELIHOOD, 1.0, _unlikelihood),
    "Plackett-Luce DPO": Racer(
        LISTS, 1.0, lambda v, beta: lists.plackett_luce_dpo(*v.listed[:2], beta=beta), tilts=True
    ),
    "LiPO": _trained_on_lists(lists.lipo, 1.0),
    "InfoNCA": _trained_on_lists(lists.infonca, 1.0, tilts=True, temperature=1.0),
    "NCA, lists": _trained_on_lists(lists.nca_list, 1.0, temperature=1.0),
    "EXO, lists": _trained_on_lists(lists.exo_list, 1.0, tilts=True, temperature=1.0),
    "BRAIn": Racer(LISTS, 1.0, _brain, tilts=True),
    "TRPA": Racer(LISTS, 3.0, _trpa),
    "RRHF": Racer(FREE_LISTS, 1.0, lambda v, weight: lists.rrhf(v.listed_means, v.listed[2], nll_weight=weight)),
    "PRO": Racer(FREE_LISTS, 0.05, lambda v, weight: lists.pro(v.listed_means, v.listed[2], nll_weight=weight)),
    "AFT": Racer(FREE_LISTS, 1.0, lambda v, gap: lists.set_contrast(v.listed_means, v.listed[2], boundary=gap)),
    "CPL, lists": Racer(FREE_LISTS, 1.0, lambda v, beta: lists.contrastive_ranking(beta * v.listed[0], v.listed[2])),
    "AOT": _pair(BATCHES, lists.aot_paired, 1.0),
    "AOT, unpaired": _pair(BATCHES, lists.aot_unpaired, 1.0),
    "GEPO": Racer(BATCHES, 1.0, _gepo),
}
