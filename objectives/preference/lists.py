r"""Lists: losses of several responses to a prompt at once, and of batches that are compared as wholes.

Arrays are `[P, G]`, P prompts with G responses each, and results `[P]`, unless a function says otherwise. `policy` and
`reference` are log-probabilities of whole responses in nats, and `h = log pi - log ref`; `mean_logp` is the mean over
a response's tokens. References, rewards, labels and what is derived from ranks are constants. A response with mask 0
does not count. `beta` is a scalar or `[P]`. Results are float32 at least.

Every function raises a ValueError for shapes that do not fit and for log-probabilities that are not floating.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from esscher.core import tokens
from esscher.core.arrays import at_least_float32, check_floating, check_per_example, check_same_shape, expand_like
from esscher.objectives.preference import losses
from esscher.objectives.preference.pairs import dpo, log_ratios
from esscher.objectives.preference.scores import log_ratio

__all__ = [
    "aot_paired",
    "aot_unpaired",
    "brain",
    "contrastive_ranking",
    "exo_list",
    "infonca",
    "lambda_pair_weight",
    "lipo",
    "mah_dpo",
    "nca_list",
    "plackett_luce_dpo",
    "pro",
    "rrhf",
    "set_contrast",
    "step_similarity_weight",
    "step_weighted_score",
    "tree_tpo",
]

Float = float | Array
Mask = Array | None

# --- matching a softmax -----------------------------------------------------------------------------------------------


def plackett_luce_dpo(policy: Array, reference: Array, *, beta: Float = 0.1, mask: Mask = None) -> Array:
    r"""`-sum_k (beta h_k - logsumexp_{j >= k} beta h_j)` of responses from best to worst; DPO for two.

    Reference: Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv:2305.18290.
    """
    return losses.plackett_luce(_scores(policy, reference, beta, mask), mask=mask)


def infonca(
    policy: Array, reference: Array, rewards: Array, *, temperature: Float, beta: Float = 0.01, mask: Mask = None
) -> Array:
    """`-sum_i a_i log softmax(beta h)_i` with `a = softmax(rewards / temperature)`.

    If each response is listed once the minimiser is the tilt of the reference by `rewards / (beta temperature)`.

    Reference: Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv:2402.05369.
    """
    score, target = _with_target(policy, reference, rewards, temperature, beta, mask)
    return losses.listwise_softmax(score, target, mask=mask, direction="forward")


def exo_list(
    policy: Array, reference: Array, rewards: Array, *, temperature: Float, beta: Float = 0.1, mask: Mask = None
) -> Array:
    """`KL(softmax(beta h) || softmax(rewards / temperature))`: the divergence opposite to `infonca`'s, its minimiser.

    Reference: Towards Efficient Exact Optimization of Language Model Alignment, arXiv:2402.00856.
    """
    score, target = _with_target(policy, reference, rewards, temperature, beta, mask)
    return losses.listwise_softmax(score, target, mask=mask, direction="reverse")


def nca_list(
    policy: Array, reference: Array, rewards: Array, *, temperature: Float, beta: Float = 0.01, mask: Mask = None
) -> Array:
    """`sum_i a_i softplus(-beta h_i) + mean_i softplus(beta h_i)` with `a = softmax(rewards / temperature)`.

    The second term fixes the level of `h`, which `infonca` leaves free.

    Reference: Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv:2402.05369.
    """
    score, target = _with_target(policy, reference, rewards, temperature, beta, mask)
    valid = _valid(score, mask)
    target = jnp.where(valid, jax.nn.softmax(target, axis=-1, where=valid), 0)
    noise = jnp.where(valid, jax.nn.softplus(score), 0).sum(-1) / jnp.maximum(valid.sum(-1), 1)
    return jnp.sum(target * jax.nn.softplus(-score), -1) + noise


def brain(policy: Array, proposal: Array, reference: Array, log_goodness: Array, *, mask: Mask = None) -> Array:
    r"""Matches the policy to a posterior, from samples of a proposal `q`: `-sum_i a_i log b_i`, where:

        a = softmax(log ref - log q + log_goodness)        b = softmax(log pi - log q)

    The gradient is `-sum_i (a_i - b_i) grad log pi_i`, so that `b_i` is a baseline. With `rewards / beta` as goodness
    the posterior is the tilt of the reference; both weights are self-normalised, with a bias of order `1/G`.
    `proposal` is `log q`, a constant, as is `log_goodness`, which may be shifted by a number for each prompt.

    Reference: BRAIn: Bayesian Reward-conditioned Amortized Inference for natural language generation from feedback,
      arXiv:2402.02479.
    """
    _check(policy=policy, proposal=proposal, reference=reference, log_goodness=log_goodness, mask=mask)
    check_floating(proposal=proposal, reference=reference)
    logits = log_ratio(_kept(policy, mask), _kept(proposal, mask))
    target = _kept(reference, mask) - _kept(proposal, mask) + _kept(log_goodness, mask)
    return losses.listwise_softmax(logits, target, mask=mask)


# --- all pairs of a list ----------------------------------------------------------------------------------------------


def lipo(policy: Array, reference: Array, labels: Array, *, beta: Float = 0.05, mask: Mask = None) -> Array:
    """`sum_{labels_i > labels_j} w_ij softplus(-beta (h_i - h_j))` with the weights of `lambda_pair_weight`.

    Reference: LiPO: Listwise Preference Optimization through Learning-to-Rank, arXiv:2402.01878.
    """
    score = _scores(policy, reference, beta, mask, labels=labels)
    return losses.pairwise_list(score, labels, pair_weight=lambda_pair_weight(score, labels, mask=mask), mask=mask)


def lambda_pair_weight(score: Array, label: Array, *, mask: Mask = None) -> Array:
    r"""What exchanging two responses changes in DCG: `|2^l_i - 2^l_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)|`.

    Ranks count from 1, for the largest score; of equal scores the first ranks first. Labels are clipped at 80. The
    result, `[P, G, G]`, is a constant.

    Reference: LiPO: Listwise Preference Optimization through Learning-to-Rank, arXiv:2402.01878.
    """
    _check(score=score, label=label, mask=mask)
    valid = _valid(score, mask)
    discount = 1 / jnp.log(2.0 + tokens.masked_rank(stop_gradient(_kept(score, mask)), valid))
    gain = jnp.exp2(jnp.minimum(stop_gradient(_kept(label, mask)), 80.0))
    differences = [jnp.abs(x[:, :, None] - x[:, None, :]) for x in (gain, discount)]
    return jnp.where(valid[:, :, None] & valid[:, None, :], differences[0] * differences[1], 0)


def rrhf(mean_logp: Array, rewards: Array, *, nll_weight: Float = 1.0, mask: Mask = None) -> Array:
    """`sum_{rewards_i > rewards_j} max(0, m_j - m_i) - nll_weight m_best` with `m = mean_logp`; no reference.

    Reference: RRHF: Rank Responses to Align Language Models with Human Feedback without tears, arXiv:2304.05302.
    """
    _check(mean_logp=mean_logp, rewards=rewards, mask=mask)
    ranking = losses.pairwise_list(mean_logp, rewards, link=lambda z: jax.nn.relu(-z), mask=mask)
    return ranking + nll_weight * _best_nll(mean_logp, rewards, mask)


def pro(mean_logp: Array, rewards: Array, *, nll_weight: Float = 0.05, mask: Mask = None) -> Array:
    r"""Each response against all worse ones, sharper where rewards differ more; without reference, `m = mean_logp`:

        sum_k (logsumexp(m_k g_k, {m_i g_ki}) - m_k g_k) - nll_weight m_best        i over rewards_i < rewards_k

    where `g_ki = rewards_k - rewards_i`, the inverse temperatures, and `g_k = max_i g_ki`.

    Reference: Preference Ranking Optimization for Human Alignment, arXiv:2306.17492.
    """
    _check(mean_logp=mean_logp, rewards=rewards, mask=mask)
    m, r = _kept(mean_logp, mask), stop_gradient(_kept(rewards, mask))
    better = _better(r, _valid(m, mask))
    gap = jnp.where(better, r[:, :, None] - r[:, None, :], 0)
    own = m * gap.max(-1)
    others = jnp.where(better, m[:, None, :] * gap, -jnp.inf)
    total = jax.nn.logsumexp(jnp.concatenate([own[..., None], others], -1), axis=-1)
    return jnp.sum(total - own, -1) + nll_weight * _best_nll(mean_logp, rewards, mask)


def set_contrast(
    mean_logp: Array, labels: Array, *, boundary: Float | None = None, detach_worse: bool = False, mask: Mask = None
) -> Array:
    r"""`log(1 + sum_{labels_i > labels_j} e^{m_j - m_i})` with `m = mean_logp`: good responses above bad ones.

    AFT's. Alone it pushes bad responses down without end. Two remedies: `detach_worse` stops the gradient of `m_j`, and
    `boundary` adds `e^{T_j - m_j}` for each pair, with the constant `T_j = min_i m_i - 2 boundary`, whose pull equals
    the push of the least good `i` when `m_j` is `boundary` nats below it. Labels are right or wrong, or ranks.

    Reference: Making Large Language Models Better Reasoners with Alignment, arXiv:2309.02144.
    """
    if boundary is not None and detach_worse:
        raise ValueError("boundary and detach_worse exclude each other: without a push no floor is needed")
    _check(mean_logp=mean_logp, labels=labels, mask=mask)
    m = _kept(mean_logp, mask)
    better, good = _better(labels, _valid(m, mask)), m[:, :, None]
    bad = (stop_gradient(m) if detach_worse else m)[:, None, :]
    exponents = [jnp.zeros((m.shape[0], 1)), jnp.where(better, bad - good, -jnp.inf).reshape(m.shape[0], -1)]
    if boundary is not None:
        least = jnp.where(better, good, jnp.inf).min(1, keepdims=True) - 2 * expand_like(boundary, good)
        pull = jnp.where(better, stop_gradient(jnp.where(better.any(1, keepdims=True), least, 0)) - bad, -jnp.inf)
        exponents.append(pull.reshape(m.shape[0], -1))
    return jax.nn.logsumexp(jnp.concatenate(exponents, -1), axis=-1)


def contrastive_ranking(score: Array, labels: Array, *, bias: Float = 0.5, mask: Mask = None) -> Array:
    """Mean of `softplus(-(s_i - bias s_j))` over the pairs of a list with `labels_i > labels_j`; 0 without pairs.

    CPL's batch of segments is one list, `P = 1`. The score is `alpha sum_t discount^t log pi(a_t | s_t)`; a bias below
    1 also pushes up the likelihood of the data, and is on the worse segment.

    Reference: Contrastive Preference Learning: Learning from Human Feedback without RL, arXiv:2310.13639.
    """
    _check(score=score, labels=labels, mask=mask)
    check_per_example(score, bias=bias)
    s = _kept(score, mask)
    z = s[:, :, None] - (expand_like(bias, s) * s)[:, None, :]
    better = _better(labels, _valid(s, mask))
    return jnp.where(better, jax.nn.softplus(-z), 0).sum((1, 2)) / jnp.maximum(better.sum((1, 2)), 1)


def tree_tpo(
    logp: Array, ref_logp: Array, segments: Array, step_weights: Array, values: Array, *, beta: Float = 0.1
) -> Array:
    """LiPO over the branches of a tree of steps, each scored by beta times `step_weighted_score` of its log-ratios.

    Log-probabilities are of tokens, `[P, G, T]`, as are `segments`, which step each is of, -1 outside; a response
    without steps does not count. `step_weights[P, G, K]` and `values[P, G]`, larger is better, are constants.

    Reference: TPO: Aligning Large Language Models with Multi-branch & Multi-step Preference Trees, arXiv:2410.12854.
    """
    check_floating(logp=logp, ref_logp=ref_logp)
    check_same_shape(logp=logp, ref_logp=ref_logp, segments=segments)
    if logp.ndim != 3 or values.shape != logp.shape[:2]:
        raise ValueError(f"values must be [P, G] for logp [P, G, T], got {values.shape} for {logp.shape}")
    if step_weights.shape[:-1] != values.shape:
        raise ValueError(f"step_weights must be [P, G, K], [P, G] = {values.shape}, got {step_weights.shape}")
    flat = [x.reshape(-1, x.shape[-1]) for x in (log_ratio(logp, ref_logp), segments, step_weights)]
    score = step_weighted_score(*flat).reshape(values.shape)
    score, mask = expand_like(beta, score) * score, (segments >= 0).any(-1)
    return losses.pairwise_list(score, values, pair_weight=lambda_pair_weight(score, values, mask=mask), mask=mask)


def step_similarity_weight(steps: Array, best: Array) -> Array:
    """`1 + cos(step k of a response, step k of the best one)`, constants `[P, G, K]`; 1 for a step that is all zeros.

    `steps[P, G, K, D]` are embeddings, for instance mean hidden states, `best[P]` the index of the best response.

    Reference: TPO: Aligning Large Language Models with Multi-branch & Multi-step Preference Trees, arXiv:2410.12854.
    """
    check_floating(steps=steps)
    if steps.ndim != 4 or best.shape != steps.shape[:1] or not jnp.issubdtype(best.dtype, jnp.integer):
        raise ValueError(f"best must be integers [P] for steps [P, G, K, D], got {best.dtype}{best.shape}")
    steps = stop_gradient(at_least_float32(steps))
    unit = steps / jnp.maximum(jnp.linalg.norm(steps, axis=-1, keepdims=True), 1e-12)
    return 1 + jnp.sum(unit * jnp.take_along_axis(unit, best[:, None, None, None], axis=1), -1)


def step_weighted_score(log_ratios: Array, segments: Array, weights: Array) -> Array:
    """`sum_k w_k mean_{t in step k} log_ratios_t / sum_k w_k` over the steps that a response has; 0 without any.

    Of tokens `[B, T]`, with the step of each in `segments` (-1 outside) and constant weights `[B, K]` of at least 0.

    Reference: TPO: Aligning Large Language Models with Multi-branch & Multi-step Preference Trees, arXiv:2410.12854.
    """
    _check(log_ratios=log_ratios, segments=segments)
    if weights.ndim != 2 or weights.shape[0] != segments.shape[0]:
        raise ValueError(f"weights must be [B, K] for segments {segments.shape}, got {weights.shape}")
    means = tokens.segment_mean(log_ratios, segments, weights.shape[1])
    present = tokens.segment_sum(jnp.ones_like(log_ratios), segments, weights.shape[1]) > 0
    w = stop_gradient(jnp.where(present, weights, 0))
    return jnp.sum(w * means, -1) / jnp.where((w > 0).any(-1), w.sum(-1), 1)


# --- whole batches: sorted, and in heads ------------------------------------------------------------------------------


def aot_paired(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: Float = 0.01,
    flip_prob: Float = 0.0,
) -> Array:
    """`softplus(-beta (a_i - b_i))`, a: sorted margins of the policy, b: of the reference; all `[B]`.

    It asks that the policy's margins dominate the reference's as distributions. The order of the batch is lost, and
    the sort is over all of it: under `shard_map` or `pmap` gather first; `jit` with sharded arrays does so by itself.
    `beta` and `flip_prob`, which smooths labels, are scalars.

    Reference: Distributional Preference Alignment of LLMs via Optimal Transport, arXiv:2406.05882.
    """
    _check_pairs(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    margins = at_least_float32(policy_chosen) - at_least_float32(policy_rejected)
    ref_margins = stop_gradient(at_least_float32(ref_chosen) - at_least_float32(ref_rejected))
    return _sorted_pairwise(margins, ref_margins, beta, flip_prob)


def aot_unpaired(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: Float = 0.01,
    flip_prob: Float = 0.0,
) -> Array:
    """`softplus(-beta (a_i - b_i))`, a: sorted log-ratios of chosen responses, b: of rejected ones; see `aot_paired`.

    Reference: Distributional Preference Alignment of LLMs via Optimal Transport, arXiv:2406.05882.
    """
    h = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return _sorted_pairwise(*h, beta, flip_prob)


def mah_dpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    heads: Array,
    *,
    n_heads: int,
    beta: Float = 0.1,
) -> Array:
    """DPO of each pair under its objective's head, weighted so that every head in the batch counts the same; `[B]`.

    The mean of the result over the batch is the mean, over the heads present, of the mean over each head's pairs.
    `selfplay.geometric_mixture` of two heads is the tilt by the mixed reward.
    Log-probabilities are `[B]`, of each pair under its head, a number in `heads[B]` from 0 to `n_heads - 1`; a pair
    with -1 has none, and loss 0.

    Reference: Simultaneous Multi-objective Alignment Across Verifiable and Non-verifiable Rewards, arXiv:2510.01167.
    """
    arrays = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    _check_pairs(*arrays, heads=heads)
    if heads.ndim != 1 or not jnp.issubdtype(heads.dtype, jnp.integer):
        raise ValueError(f"heads must be integers [B], got {heads.dtype}{heads.shape}")
    valid = (heads >= 0) & (heads < n_heads)
    loss = dpo(*(_kept(x, valid) for x in arrays), beta=beta)
    member = jax.nn.one_hot(heads, n_heads, dtype=loss.dtype)
    counts = member.sum(0)
    return jnp.where(valid, loss * heads.size / jnp.maximum((counts > 0).sum() * (member @ counts), 1), 0)


# --- shared pieces ----------------------------------------------------------------------------------------------------


def _scores(policy: Array, reference: Array, beta: Float, mask: Mask, **others: Array) -> Array:
    """`beta h`, and 0 where the mask is."""
    _check(policy=policy, reference=reference, mask=mask, **others)
    check_floating(reference=reference)
    check_per_example(policy, beta=beta)
    return expand_like(beta, policy) * log_ratio(_kept(policy, mask), _kept(reference, mask))


def _with_target(
    policy: Array, reference: Array, rewards: Array, temperature: Float, beta: Float, mask: Mask
) -> tuple[Array, Array]:
    """`beta h`, and the logits that it is to match."""
    score = _scores(policy, reference, beta, mask, rewards=rewards)
    check_per_example(policy, temperature=temperature)
    return score, stop_gradient(_kept(rewards, mask) / expand_like(temperature, score))


def _check(**arrays: Array | None) -> None:
    """All of one shape `[P, G]`, and the first floating; what is None is absent."""
    arrays = {name: array for name, array in arrays.items() if array is not None}
    name, first = next(iter(arrays.items()))
    check_floating(**{name: first})
    check_same_shape(**arrays)
    if first.ndim != 2:
        raise ValueError(f"{name} must have two axes, got shape {first.shape}")


def _check_pairs(*arrays: Array, **others: Array) -> None:
    named = dict(zip(("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"), arrays, strict=True))
    check_floating(**named)
    check_same_shape(**named, **others)


def _sorted_pairwise(first: Array, second: Array, beta: Float, flip_prob: Float) -> Array:
    if first.ndim != 1 or jnp.shape(beta) != () or jnp.shape(flip_prob) != ():
        raise ValueError("policy_chosen must be [B], and beta and flip_prob scalars, because the order is lost")
    return losses.pairwise(*losses.sorted_scores(first, second), beta=beta, flip_prob=flip_prob)


def _valid(values: Array, mask: Mask) -> Array:
    return jnp.ones(values.shape, bool) if mask is None else mask != 0


def _kept(values: Array, mask: Mask) -> Array:
    """The values in float32 at least, 0 where the mask is."""
    return jnp.where(_valid(values, mask), at_least_float32(values), 0)


def _better(labels: Array, valid: Array) -> Array:
    """Where `i` has the larger label of a pair, `[P, G, G]`."""
    return (labels[:, :, None] > labels[:, None, :]) & valid[:, :, None] & valid[:, None, :]


def _best_nll(mean_logp: Array, rewards: Array, mask: Mask) -> Array:
    """Of the response with the largest reward, the first of several."""
    valid = _valid(mean_logp, mask)
    best = (tokens.masked_rank(_kept(rewards, mask), valid) == 0) & valid
    return -jnp.where(best, at_least_float32(mean_logp), 0).sum(-1)
