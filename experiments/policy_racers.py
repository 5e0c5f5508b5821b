"""Policy-gradient methods as they run in the race: what each makes of answers that a tabular policy has sampled.

Not here, because answers with their rewards are not what they take: mixtures (HPT, SRFT, LUFFY, AMPO, Guide,
Prefix-RFT) and distillation (MiniLLM, KDRL) need demonstrations or a teacher; DFT, ASFT, VeriFree, RLPR and the
marginal likelihood, answers known to be right; DDPO and Flow-GRPO, denoising chains; GDPO, several rewards. The sampler
is the policy, so that `importance_weight` is 1; values are exact, so that `value_loss` has nothing to learn; a bounded
number of steps needs no `kl_constraint_loss`, and answers of four tokens no `overlong_penalty`. LUSPO, TRL's losses and
others that are a reduction of one that is here are left to it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esscher.core import tokens
from esscher.experiments.racers import Problem, string_logps
from esscher.objectives.advantages import discounted_suffix_sum, gae, group_advantage, vtrace
from esscher.objectives.credit import tempo_advantage
from esscher.objectives.policy import group_methods, kl, links, methods, ratios, regression
from esscher.objectives.policy.losses import policy_gradient

__all__ = ["PASS", "RACERS", "Racer", "View", "mean_loss"]

SCORES, CRITICS, GROUPS = "score functions", "exact critics", "groups"
TOKENS, SEQUENCES = "ratios of tokens", "ratios of sequences"
RIGHT, REGRESSION, DIVERGENCE = "right and wrong", "weighted likelihood and regression", "divergence from the reference"
"""Families of methods, one figure each, of ten methods at most."""

CLIPS = (0.1, 0.2, 0.4)
PASS = 1.0  # reward of a right answer; 32% of the reference's are right
TEMPERATURES = (0.25, 0.5, 1.0)  # of rewards; the second is the testbed's
SUMS = "seq-mean-token-sum"  # the reduction that keeps the gradient of whole strings

Fraction = tuple[Array, Array]


class View(NamedTuple):
    """A policy as seen through `G` answers in each of `P` groups, of which another, or the same, was the author."""

    task: Problem
    logits: Array
    old: Array  # logits of the author
    index: Array  # [P, G] of the strings
    key: Array

    @property
    def rewards(self) -> Array:
        """Of the answers, `[P, G]`."""
        return self.task.reward[self.index]

    @property
    def right(self) -> Array:
        """1 for answers with a reward of at least `PASS`, else 0, `[P, G]`: all that some methods look at."""
        return (self.rewards >= PASS).astype(self.rewards.dtype)

    @property
    def mask(self) -> Array:
        """Of the tokens, `[P G, T]`."""
        return self.task.mask[self.index.ravel()]

    @property
    def following(self) -> Array:
        """The mask of the tokens after each, `[P G, T]`: 0 at the last one."""
        return jnp.pad(self.mask[:, 1:], ((0, 0), (0, 1)))

    @property
    def pair(self) -> tuple[Array, Array]:
        """Log-probabilities of tokens under the policy and under the author, `[P G, T]` each."""
        return tuple(string_logps(self.task, x)[self.index.ravel()] for x in (self.logits, self.old))

    @property
    def reference(self) -> Array:
        """Log-probabilities of tokens under the reference, `[P G, T]`."""
        return string_logps(self.task, self.task.logits)[self.index.ravel()]

    @property
    def groups(self) -> tuple[Array, Array, Array, Array]:
        """What methods of groups take: rewards, both log-probabilities and the mask."""
        return self.rewards, *self.pair, self.mask

    @property
    def groups_alone(self) -> tuple[Array, Array, Array]:
        """The same without the author."""
        return self.rewards, self.pair[0], self.mask

    def on(self, advantages: Array) -> tuple[Array, Array, Array, Array]:
        """What losses on advantages take."""
        return *self.pair, advantages, self.mask

    @property
    def steps(self) -> tuple[Array, Array, Array]:
        """Rewards and discounts of each token, `[P G, T]`, and the author's exact values, `[P G, T + 1]`."""
        rewards = jnp.where(self.mask & ~self.following, self.rewards.reshape(-1, 1), 0)
        law = jnp.exp(string_logps(self.task, self.old).sum(-1))

        def through(weight: Array) -> Array:  # each row of the table: of the strings that pass it
            weight = jnp.where(self.task.mask, weight[:, None], 0)
            return jnp.zeros(len(self.task.logits)).at[self.task.rows].add(weight)

        by_row = through(law * self.task.reward) / jnp.maximum(through(law), jnp.finfo(law.dtype).tiny)
        values = jnp.where(self.mask, by_row[self.task.rows[self.index.ravel()]], 0)
        return rewards, self.following.astype(values.dtype), jnp.pad(values, ((0, 0), (0, 1)))


class Racer(NamedTuple):
    """A method in the race."""

    family: str
    loss: Callable[[View, Array], Fraction]  # of the answers and the coefficient -> numerator and denominator
    coefficients: tuple[float, ...] = ()  # that the race tries, where it has one: a bound, lambda, a temperature
    epochs: int = 2  # steps on the same answers: one where there is no ratio
    tilts: bool = False  # whether the coefficient is a temperature, at which the law meant is the reference's tilt


def mean_loss(racer: Racer, view: View, coefficient: Array) -> Array:
    """The method's loss, a number; 0 where nothing counts."""
    numerator, denominator = racer.loss(view, coefficient)
    return numerator / jnp.where(denominator > 0, denominator, 1)


# --- short forms ------------------------------------------------------------------------------------------------------


def _score(function: Callable[[View], Array]) -> Racer:
    """REINFORCE on advantages of whole answers, `[P G]`, one step for each draw."""
    return Racer(SCORES, lambda v, _: _reinforce(v, function(v)), epochs=1)


def _reinforce(view: View, advantages: Array) -> Fraction:
    return tokens.aggregate(methods.reinforce(view.pair[0], advantages, view.mask), view.mask, SUMS)


def _group(function: Callable[..., Fraction], **options: Any) -> Racer:
    """A method of groups with PPO's loss, at several bounds."""
    return Racer(GROUPS, lambda v, c: function(*v.groups, low=c, high=c, **options), CLIPS)


def _ratio(family: str, how: tokens.How, function: Callable, coefficients: tuple[float, ...] = ()) -> Racer:
    """A loss on GRPO's advantages, so that methods differ by the loss alone."""

    def loss(view: View, c: Array) -> Fraction:
        advantages = group_advantage(view.rewards).ravel()
        return tokens.aggregate(function(view, advantages, c), view.mask, how)

    return Racer(family, loss, coefficients)


def _signed(positive: float | None, negative: float) -> Racer:
    def loss(view: View, c: Array) -> Fraction:
        advantages = methods.signed_advantage(
            view.right.ravel(), positive=c if positive is None else positive, negative=negative
        )
        return tokens.aggregate(methods.ppo(*view.on(advantages)), view.mask, "token-mean")

    return Racer(RIGHT, loss, (0.05, 0.1, 0.2) if positive is None else ())


def _grpo_kl(kind: kl.Kind, *, corrected: bool = False) -> Racer:
    """GRPO without a scale, summed over tokens, so that `beta` is a temperature."""

    def loss(view: View, beta: Array) -> Fraction:
        logp, old = view.pair
        # Centring at the mean, answer included, shrinks the reward's gradient by (G - 1) / G: so the penalty's, too.
        beta = beta * (1 - 1 / view.index.shape[1])
        options = {"scale": "none", "how": SUMS}
        if not corrected:
            return group_methods.grpo(*view.groups, **options, logp_ref=view.reference, beta=beta, kl=kind)
        numerator, denominator = group_methods.grpo(*view.groups, **options)
        ratio = jnp.exp(ratios.log_ratio(logp, old, view.mask))
        penalty = methods.kl_penalty(logp, view.reference, view.mask, beta=beta, kind=kind, ratio=ratio)
        return numerator + tokens.aggregate(penalty, view.mask, SUMS)[0], denominator

    return Racer(DIVERGENCE, loss, TEMPERATURES, tilts=True)


# --- methods of more than a line --------------------------------------------------------------------------------------


def _remax(view: View, _: Array) -> Fraction:
    greedy = jnp.argmax(string_logps(view.task, view.old).sum(-1))  # the mode, where a model would decode greedily
    rewards = jnp.broadcast_to(view.task.reward[greedy], view.index.shape[:1])
    return group_methods.remax(view.rewards, rewards, *view.groups_alone[1:])


def _value_baseline(view: View) -> Array:
    law = jnp.exp(string_logps(view.task, view.old).sum(-1))
    return view.rewards.ravel() - law @ view.task.reward


def _gpg(view: View, _: Array) -> Fraction:
    return group_methods.gpg(view.right, *view.groups_alone[1:])


def _bnpo(view: View, c: Array) -> Fraction:
    low, high = view.task.reward.min(), view.task.reward.max()
    return group_methods.bnpo((view.rewards - low) / (high - low), *view.groups[1:], low=c, high=c)


def _tempo(view: View, c: Array) -> Fraction:
    shape = (*view.index.shape, -1)
    strings, mask = view.task.tokens[view.index], view.mask.reshape(shape)
    advantages = tempo_advantage(strings, mask, view.rewards).reshape(view.mask.shape)
    return tokens.aggregate(methods.ppo(*view.on(advantages), low=c, high=c), view.mask, "token-mean")


def _a2c(view: View, lam: Array) -> Fraction:
    rewards, discounts, values = view.steps
    advantages = gae(rewards, values, discounts, lam, mask=view.mask)
    return _reinforce(view, advantages)


def _ppo_gae(view: View, lam: Array) -> Fraction:
    rewards, discounts, values = view.steps
    advantages = gae(rewards, values, discounts, lam, mask=view.mask)
    whitened = tokens.masked_whiten(advantages, view.mask)
    return tokens.aggregate(methods.ppo(*view.on(whitened)), view.mask, "token-mean")


def _impala(view: View, lam: Array) -> Fraction:
    rewards, discounts, values = view.steps
    ratio = jax.lax.stop_gradient(jnp.exp(ratios.log_ratio(*view.pair, view.mask)))
    advantages = vtrace(rewards, values, discounts, ratio, lam).advantages
    return _reinforce(view, advantages)


def _vapo(view: View, weight: Array) -> Fraction:
    rewards, discounts, values = view.steps
    advantages = gae(rewards, values, discounts, methods.length_adaptive_lambda(view.mask), mask=view.mask)
    numerator, denominator = tokens.aggregate(methods.ppo(*view.on(advantages), high=0.28), view.mask, "token-mean")
    imitation, count = methods.positive_nll(view.pair[0], view.right.ravel(), view.mask)
    return numerator + weight * denominator * imitation / jnp.maximum(count, 1), denominator


def _nft(view: View, negative_weight: Array) -> Fraction:
    rate = jnp.broadcast_to(view.right.mean(-1, keepdims=True), view.index.shape).ravel()
    mask = view.mask & ((rate > 0) & (rate < 1))[:, None]
    loss = regression.nft_loss(*view.pair, view.right.ravel(), rate, mask, negative_weight=negative_weight)
    return tokens.aggregate(loss, mask, "constant", length=float(mask.shape[1]))


def _likelihood(view: View, weight: Array) -> Fraction:
    logp, ones = view.pair[0], jnp.ones(weight.size)
    loss = policy_gradient(logp, logp, ones, view.mask, link=links.score_link, form="score", weight=weight.ravel())
    return tokens.aggregate(loss, view.mask, SUMS)


def _mpo(view: View, temperature: Array) -> Fraction:
    logp = view.pair[0].sum(-1).reshape(view.index.shape)  # a prompt is a state and a whole answer an action
    loss = regression.mpo_loss(logp, view.rewards, temperature)
    return loss.sum(), jnp.asarray(loss.size, loss.dtype)


def _vmpo(view: View, temperature: Array) -> Fraction:
    logp, advantages = view.pair[0].sum(-1, keepdims=True), group_advantage(view.rewards).reshape(-1, 1)
    mask = jnp.ones(logp.shape, bool)  # of whole answers
    return tokens.aggregate(regression.vmpo(logp, advantages, mask, temperature).policy_loss, mask, "token-mean")


def _a2po(view: View, beta: Array) -> Fraction:
    # The value is exact, over all strings rather than over some samples of the reference.
    law = string_logps(view.task, view.task.logits).sum(-1)
    value = beta * jax.nn.logsumexp(law + view.task.reward / beta)
    policy, rewards = view.pair[0].sum(-1), view.rewards.ravel()
    loss = regression.a2po_loss(policy, view.reference.sum(-1), rewards, jnp.full_like(policy, value), beta=beta)
    return loss.sum(), jnp.asarray(loss.size, loss.dtype)


def _returns_with_kl(view: View, beta: Array) -> Fraction:
    advantages = group_advantage(view.rewards, center="loo", scale="none").reshape(-1, 1)
    last = jnp.where(view.following, 0, advantages)
    steps = jnp.where(view.mask, kl.kl_in_reward(last, view.pair[1], view.reference, beta=beta), 0)
    returns = discounted_suffix_sum(steps, jnp.ones_like(steps))
    return _reinforce(view, returns)


RACERS: dict[str, Racer] = {
    "REINFORCE": _score(lambda v: v.rewards.ravel()),
    "REINFORCE (value)": _score(_value_baseline),
    "REINFORCE (group)": _score(lambda v: group_advantage(v.rewards, center="loo", scale="none").ravel()),
    "ReMax": Racer(SCORES, _remax, epochs=1),
    "OPO": Racer(SCORES, lambda v, _: group_methods.opo(*v.groups_alone), epochs=1),
    "GPG": Racer(SCORES, _gpg, epochs=1),
    "A2C": Racer(CRITICS, _a2c, (0.0, 0.5, 1.0), epochs=1),
    "IMPALA": Racer(CRITICS, _impala, (0.0, 0.5, 1.0)),
    "PPO (GAE)": Racer(CRITICS, _ppo_gae, (0.0, 0.5, 1.0)),
    "VAPO": Racer(CRITICS, _vapo, (0.01, 0.1, 0.3)),
    "GRPO": _group(group_methods.grpo),
    "Dr. GRPO": _group(group_methods.dr_grpo, length=4.0),
    "DAPO": Racer(GROUPS, lambda v, c: group_methods.dapo(*v.groups, high=c), (0.2, 0.28, 0.4)),
    "Lite PPO": _group(group_methods.lite_ppo),
    "BNPO": Racer(GROUPS, _bnpo, CLIPS),
    "RLOO": _group(group_methods.rloo),
    "REINFORCE++": _group(group_methods.reinforce_plus_plus),
    "REINFORCE++-baseline": _group(group_methods.reinforce_plus_plus_baseline),
    "TEMPO": Racer(GROUPS, _tempo, CLIPS),
    "importance sampling": _ratio(
        TOKENS, "token-mean", lambda v, a, _: policy_gradient(*v.on(a), link=links.importance_link)
    ),
    "PPO": _ratio(TOKENS, "token-mean", lambda v, a, c: methods.ppo(*v.on(a), low=c, high=c), CLIPS),
    "PPO (dual clip)": _ratio(
        TOKENS, "token-mean", lambda v, a, dual: methods.ppo(*v.on(a), dual=dual), (1.5, 3.0, 10.0)
    ),
    "Clip-Cov": _ratio(
        TOKENS, "token-mean", lambda v, a, c: methods.clip_cov(v.key, *v.on(a), fraction=c), (2e-4, 0.02, 0.1)
    ),
    "KL-Cov": _ratio(TOKENS, "token-mean", lambda v, a, c: methods.kl_cov(*v.on(a), fraction=c), (2e-4, 0.02, 0.1)),
    "TIS": _ratio(
        TOKENS,
        "token-mean",
        lambda v, a, c: policy_gradient(*v.on(a), link=links.clipped_weight_link(0.0, c), form="score"),
        (0.5, 1.0, 2.0),
    ),
    "CISPO": _ratio(TOKENS, "token-mean", lambda v, a, c: methods.cispo(*v.on(a), high=c), (1.1, 1.28, 5.0)),
    "SAPO": _ratio(
        TOKENS,
        "seq-mean-token-mean",
        lambda v, a, c: methods.sapo(*v.on(a), positive=c, negative=1.05 * c),
        (0.5, 1.0, 4.0),
    ),
    "GSPO": _ratio(
        SEQUENCES, "seq-mean-token-mean", lambda v, a, c: methods.gspo(*v.on(a), low=c, high=c), (4e-4, 0.02, 0.2)
    ),
    "GMPO": _ratio(SEQUENCES, "seq-mean-token-mean", lambda v, a, c: methods.gmpo(*v.on(a), low=c, high=c), CLIPS),
    "TOPR": _ratio(SEQUENCES, SUMS, lambda v, a, _: methods.topr(*v.on(a))),
    "VESPO": _ratio(
        SEQUENCES,
        "token-mean",
        lambda v, a, c: methods.vespo(*v.on(a), positive=(2 * c, 3 * c), negative=(3 * c, 2 * c)),
        (0.5, 1.0, 2.0),
    ),
    "REINFORCE (+1 or -1)": _signed(1.0, 1.0),
    "PSR": _signed(1.0, 0.0),
    "NSR": _signed(0.0, 1.0),
    "W-REINFORCE": _signed(None, 1.0),
    "NFT": Racer(RIGHT, _nft, (0.0, 0.5, 1.0)),
    "RWR": Racer(
        REGRESSION,
        lambda v, c: _likelihood(v, regression.advantage_weights(v.rewards, beta=c, weight_max=None)),
        TEMPERATURES,
        epochs=1,
    ),
    "AWR": Racer(
        REGRESSION,
        lambda v, c: _likelihood(v, regression.advantage_weights(group_advantage(v.rewards), beta=c)),
        TEMPERATURES,
        epochs=1,
    ),
    "MPO": Racer(REGRESSION, _mpo, TEMPERATURES, epochs=1),
    "V-MPO": Racer(REGRESSION, _vmpo, TEMPERATURES, epochs=1),
    "GRPO (k1 in loss)": _grpo_kl("k1"),
    "GRPO (k2 in loss)": _grpo_kl("k2"),
    "GRPO (k3 in loss)": _grpo_kl("k3"),
    "GRPO (R k3 in loss)": _grpo_kl("k3", corrected=True),
    "RLOO (k1 in reward)": Racer(
        DIVERGENCE,
        lambda v, beta: group_methods.rloo(*v.groups, logp_ref=v.reference, beta=beta),
        TEMPERATURES,
        tilts=True,
    ),
    "returns with k1": Racer(DIVERGENCE, _returns_with_kl, TEMPERATURES, epochs=1, tilts=True),
    "A*-PO": Racer(DIVERGENCE, _a2po, TEMPERATURES, tilts=True),
}
