"""The pieces of preference losses: links, scores, arities, regularizers; curation and evaluation of pairs."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.objectives.preference import curation, evaluation, links, losses, regularizers, scores

CHOSEN, REJECTED, OTHER = 2 * jax.random.normal(jax.random.key(0), (3, 8))
LOGP, OTHER_LOGP = -0.1 - jnp.abs(jax.random.normal(jax.random.key(1), (2, 8, 6)))
MASK = jnp.arange(6) < jnp.array([6, 2, 1, 5, 3, 0, 4, 6])[:, None]
LIST, TARGET = jax.random.normal(jax.random.key(2), (2, 8, 4))
LABEL = jnp.round(1.5 * TARGET)  # with ties
LIST_MASK = jnp.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]] * 2)[:8] > 0
PAIR_WEIGHT = jax.random.uniform(jax.random.key(3), (8, 4, 4), minval=0.2)
PART = jnp.array([1, 1, 0, 1, 0, 1, 1, 1]) > 0
UNIT = jax.random.uniform(jax.random.key(4), (8,), minval=0.1, maxval=0.9)
STATEMENTS = jax.nn.softmax(jax.random.normal(jax.random.key(5), (8, 4, 3)))
HIDDEN = jax.random.normal(jax.random.key(6), (2, 8, 6, 3))
JUDGED = jax.random.uniform(jax.random.key(7), (4, 16), minval=0.1, maxval=0.9)
PAIR = {"chosen": CHOSEN, "rejected": REJECTED}
KEY = jax.random.key(8)


def example(covered, arguments, **changes):
    """Whose floats are hyperparameters, and of whose arrays those that 8 devices can share are batches."""
    arrays = {name: value if hasattr(value, "dtype") else jnp.asarray(value) for name, value in arguments.items()}
    floats = tuple(name for name, x in arrays.items() if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.floating))
    batch = tuple(name for name, x in arrays.items() if x.ndim and x.shape[0] % 8 == 0)
    settings = {"name": covered.__name__, "function": covered, "hyperparameters": floats, "batch": batch}
    return Example(covers=(covered,), arguments=arrays, **{**settings, **changes})


def elementwise(covered, function=None, name=None, hyper=None, x=CHOSEN, argument="z", **changes):
    """Of one array, which the gradient reaches as it does the floats."""
    arguments = {argument: x, **(hyper or {})}
    settings = {"name": name or covered.__name__, "differentiable": tuple(arguments)}
    return example(covered, arguments, function=function or covered, **{**settings, **changes})


def divergence(kind, **hyper):
    def function(h, **hyper):
        return scores.divergence_score(h, kind, **hyper)

    return elementwise(scores.divergence_score, function, f"divergence_score[{kind}]", hyper, argument="h")


def noisy(name, link, **hyper):
    function = lambda z, **hyper: links.label_model(link, **hyper)(z)  # noqa: E731
    return elementwise(links.label_model, function, f"label_model[{name}]", hyper)


LINKS = [
    *(elementwise(link) for link in (links.logistic_link, links.hinge_link, links.sigmoid_link, links.linear_link)),
    *(elementwise(link) for link in (links.exponential_link, links.truncated_quadratic_link, links.savage_link)),
    elementwise(links.squared_link, lambda z, target: links.squared_link(target)(z), "squared_link", {"target": 0.7}),
    elementwise(links.discopop_link, lambda z, tau: links.discopop_link(tau)(z), "discopop_link", {"tau": 0.8}),
    noisy("soft", links.logistic_link, label_prob=0.7),
    noisy("smooth", links.hinge_link, flip_prob=0.2),
    elementwise(
        links.label_model,
        lambda z, flip_prob: links.label_model(links.logistic_link, flip_prob=flip_prob, mode="unbiased")(z),
        "label_model[unbiased]",
        {"flip_prob": 0.2},
    ),
]

SCORES = [
    example(
        scores.log_ratio,
        {"policy": CHOSEN, "reference": REJECTED, "ref_weight": 0.6},
        differentiable=("policy", "ref_weight"),
        constants=("reference",),
        bad={"three weights": ("ref_weight", jnp.ones(3))},
    ),
    example(
        scores.mixed_reference,
        {"references": LIST.T, "weights": UNIT[:4]},
        differentiable=("weights",),
        constants=("references",),
        batch={"references": 1},
        extremes=("references",),
        bad={"a weight too many": ("weights", UNIT[:5]), "whole references": ("references", jnp.ones((4, 8), int))},
    ),
    example(scores.per_token, {"score": CHOSEN, "length": MASK.sum(-1)}, differentiable=("score",)),
    divergence("reverse_kl"),
    divergence("forward_kl"),
    divergence("js"),
    divergence("chi2_kl"),
    divergence("alpha", alpha=0.4),
    elementwise(scores.odds_score, x=LOGP[:, 0], argument="mean_logp"),
    elementwise(scores.box_cox_score, hyper={"alpha": 0.25}, argument="x"),
    elementwise(
        scores.box_cox_score, name="box_cox_score[limit]", hyper={"alpha": 0.0}, argument="x", differentiable=("x",)
    ),
    elementwise(scores.log1mexp, x=LOGP[:, 1], argument="x", extremes=()),
]

LOSSES = [
    example(
        losses.pairwise,
        {**PAIR, "beta": UNIT, "margin": OTHER, "label_prob": UNIT[::-1]},
        differentiable=("chosen", "rejected"),
        extremes=("chosen", "rejected", "margin"),
    ),
    example(
        losses.pairwise,
        {**PAIR, "beta": 0.3, "margin": 0.2, "flip_prob": 0.1},
        name="pairwise[unbiased]",
        function=lambda **arguments: losses.pairwise(**arguments, mode="unbiased"),
        differentiable=("chosen", "rejected", "beta", "margin", "flip_prob"),
        bad={"two temperatures": ("beta", jnp.ones(2))},
    ),
    example(
        losses.pointwise,
        {
            "score": CHOSEN, "label": UNIT, "baseline": OTHER, "beta": 0.3, "positive_weight": 1.2,
            "negative_weight": 0.7,
        },
        differentiable=("score", "beta", "positive_weight", "negative_weight"),
        constants=("baseline",),
    ),
    *(
        example(
            losses.listwise_softmax,
            {"logits": LIST, "target_logits": TARGET, "mask": LIST_MASK},
            name=f"listwise_softmax[{direction}]",
            function=lambda logits, target_logits, mask, direction=direction: losses.listwise_softmax(
                logits, target_logits, mask=mask, direction=direction
            ),
            differentiable=("logits",),
            constants=("target_logits",),
            masks={"mask": ("logits", "target_logits")},
            bad={"whole targets": ("target_logits", jnp.ones((8, 4), int))},
        )
        for direction in ("forward", "reverse")
    ),
    example(
        losses.plackett_luce, {"score": LIST, "mask": LIST_MASK}, differentiable=("score",), masks={"mask": ("score",)}
    ),
    example(
        losses.pairwise_list,
        {"score": LIST, "label": LABEL, "pair_weight": PAIR_WEIGHT, "mask": LIST_MASK},
        function=lambda **arguments: losses.pairwise_list(**arguments, normalize=True),
        differentiable=("score",),
        constants=("pair_weight",),
        masks={"mask": ("score", "label", "pair_weight")},
    ),
    example(
        losses.group_mean_pairwise,
        {
            "chosen": LIST, "rejected": TARGET[:, :3], "chosen_mask": LIST_MASK,
            "rejected_mask": LIST_MASK[::-1, :3], "beta": 0.3, "variance_coef": 0.8,
        },
        differentiable=("chosen", "rejected", "beta", "variance_coef"),
        masks={"chosen_mask": ("chosen",), "rejected_mask": ("rejected",)},
        bad={"coefficients of pairs": ("variance_coef", jnp.ones(3))},
    ),
    example(
        losses.sorted_scores,
        {"first": CHOSEN, "second": REJECTED},
        differentiable=("first", "second"),
        output_axis=None,
    ),
]  # fmt: skip

REGULARIZERS = [
    example(
        regularizers.nll,
        {"logp": LOGP, "mask": MASK},
        function=lambda logp, mask: regularizers.nll(logp, mask, normalize=True),
        differentiable=("logp",),
        masks={"mask": ("logp",)},
    ),
    example(
        regularizers.dpop_penalty,
        {"policy_chosen": CHOSEN, "ref_chosen": OTHER},
        differentiable=("policy_chosen",),
        constants=("ref_chosen",),
    ),
    example(
        regularizers.value_incentive,
        {"policy_calibration": CHOSEN, "ref_calibration": OTHER, "coef": 0.1},
        function=lambda **arguments: regularizers.value_incentive(**arguments, attitude="pessimistic"),
        differentiable=("policy_calibration", "coef"),
        constants=("ref_calibration",),
        bad={"two coefficients": ("coef", jnp.ones(2))},
    ),
    example(
        regularizers.token_kl,
        {"policy": LOGP, "other": OTHER_LOGP, "mask": MASK},
        differentiable=("policy",),
        constants=("other",),
        masks={"mask": ("policy", "other")},
        extremes=("policy", "other"),
    ),
    example(
        regularizers.wpo_weight,
        {"logp": LOGP, "log_collision": OTHER_LOGP, "mask": MASK},
        constants=("logp", "log_collision"),
        masks={"mask": ("logp", "log_collision")},
        extremes=("logp", "log_collision"),
    ),
    example(
        regularizers.margin_scaled_beta,
        {"reward_gap": OTHER, "beta": 0.1, "w": 0.5, "k": 0.4},
        differentiable=("beta", "w", "k"),
        constants=("reward_gap",),
        extremes=("reward_gap",),
        bad={"gaps that are whole": ("reward_gap", jnp.arange(8)), "two rates": ("k", jnp.ones(2))},
    ),
    example(
        regularizers.adaptive_beta,
        {
            "margins": CHOSEN, "weights": jnp.where(PART, UNIT, 0), "running_mean": 0.3, "beta": 0.1, "alpha": 0.2,
            "minimum": 1e-3,
        },
        differentiable=("beta", "alpha", "minimum"),
        constants=("margins", "weights", "running_mean"),
        masks={"weights": ("margins",)},
        output_axis=None,
        extremes=("margins", "running_mean"),
        bad={"a mean for each pair": ("running_mean", CHOSEN)},
    ),
    example(
        regularizers.keep_typical_margins,
        {"key": KEY, "margins": CHOSEN, "running_mean": 0.3, "running_std": 1.5, "keep": 0.6},
        extremes=("margins",),
        bad={"margins of groups": ("margins", LIST), "two shares": ("keep", jnp.ones(2))},
    ),
    example(
        regularizers.running_mean_update,
        {"values": CHOSEN, "mask": PART, "running_mean": 0.3, "momentum": 0.8},
        function=lambda mask, **arguments: regularizers.running_mean_update(**arguments, mask=mask),
        differentiable=("momentum",),
        constants=("running_mean", "values"),
        masks={"mask": ("values",)},
        output_axis=None,
        extremes=("values", "running_mean"),
        bad={"two momenta": ("momentum", jnp.ones(2))},
    ),
    *(
        example(
            regularizers.tilted_mean,
            {"losses": CHOSEN, "t": jnp.asarray(t), "mask": PART},
            name=f"tilted_mean[{t}]",
            function=lambda losses, t, mask: regularizers.tilted_mean(losses, t, mask=mask),
            differentiable=("losses", "t") if t else ("losses",),
            masks={"mask": ("losses",)},
            output_axis=None,
            extremes=("losses",),
            bad={"two temperatures": ("t", jnp.ones(2))},
        )
        for t in (-0.8, 0.0, 0.02)
    ),
]  # fmt: skip

CURATION = [
    example(
        curation.answer_confidence,
        {"logp": LOGP, "answer_mask": MASK},
        differentiable=("logp",),
        masks={"answer_mask": ("logp",)},
    ),
    example(
        curation.density_ratio_reward,
        {"logp_strong": LOGP, "logp_weak": OTHER_LOGP, "mask": MASK},
        differentiable=("logp_strong",),
        constants=("logp_weak",),
        masks={"mask": ("logp_strong", "logp_weak")},
    ),
    example(
        curation.apc_score,
        {"relevance": LIST, "entailment": STATEMENTS, "mask": LIST_MASK},
        differentiable=("relevance", "entailment"),
        masks={"mask": ("relevance", "entailment")},
        bad={"two classes": ("entailment", STATEMENTS[..., :2])},
    ),
    example(
        curation.linear_scalarize,
        {"rewards": LIST, "weights": UNIT[:4]},
        differentiable=("rewards", "weights"),
        bad={"a weight too many": ("weights", UNIT[:5])},
    ),
    example(
        curation.top_gap_pairs,
        {"score": LIST, "correct": (TARGET > 0).astype(jnp.float32), "mask": LIST_MASK},
        function=lambda score, correct, mask: curation.top_gap_pairs(score, correct, 3, mask=mask),
        masks={"mask": ("score", "correct")},
        extremes=("score",),
        bad={"one group without its axis": ("score", LIST[0])},
    ),
    example(
        curation.reward_gap_split,
        {"reward_chosen": CHOSEN, "reward_rejected": REJECTED, "threshold": 0.4},
        extremes=("reward_chosen", "reward_rejected"),
        bad={"whole rewards": ("reward_chosen", jnp.arange(8))},
    ),
    example(
        curation.goal_relabel,
        {"chosen": jnp.arange(8), "rejected": jnp.arange(8, 16), "reward_chosen": CHOSEN, "reward_rejected": REJECTED},
        # Without the indices, which count positions, and with the two halves side by side.
        function=lambda **arguments: tuple(x.reshape(2, -1) for x in curation.goal_relabel(**arguments)[1:]),
        differentiable=("reward_chosen", "reward_rejected"),
        output_axis=1,
    ),
    example(
        curation.statistical_rejection_sample,
        {"key": KEY, "rewards": LIST, "mask": LIST_MASK, "beta": 0.5},
        function=lambda **arguments: curation.statistical_rejection_sample(**arguments, n=2),
        masks={"mask": ("rewards",)},
        extremes=("rewards",),
        bad={"two temperatures": ("beta", jnp.ones(2)), "whole rewards": ("rewards", jnp.ones((8, 4), int))},
    ),
    elementwise(
        curation.quantile_edges,
        lambda score: curation.quantile_edges(score, 4),
        argument="score",
        output_axis=None,
        bad={"groups": ("score", LIST)},
    ),
    example(
        curation.quantile_bucket,
        {"score": CHOSEN, "edges": jnp.array([-1.0, 0.3, 2.0])},
        extremes=("score",),
        bad={"a single edge": ("edges", jnp.asarray(0.3)), "whole scores": ("score", jnp.arange(8))},
    ),
    example(
        curation.condition_dropout,
        {
            "key": KEY, "codes": jnp.arange(24).reshape(8, 3), "null": jnp.asarray(99), "drop_prob": 0.4,
            "drop_all_prob": 0.2,
        },
        bad={"two codes": ("null", jnp.arange(2)), "a probability per example": ("drop_prob", UNIT)},
    ),
    example(
        curation.gaussian_mechanism,
        {"key": KEY, "x": LIST * jnp.linspace(0.1, 3, 8)[:, None], "clip_norm": 1.3, "sigma": 0.4},
        differentiable=("x", "clip_norm", "sigma"),
        bad={"a single vector": ("x", LIST[0])},
    ),
]  # fmt: skip

EVALUATION = [
    example(
        evaluation.ranking_accuracy,
        {
            "policy_chosen": CHOSEN, "policy_rejected": REJECTED, "len_chosen": 1 + MASK.sum(-1),
            "len_rejected": 7 - MASK.sum(-1),
        },
        extremes=("policy_chosen", "policy_rejected"),
    ),
    example(evaluation.implicit_reward_accuracy, PAIR, extremes=("chosen", "rejected")),
    example(
        evaluation.idealized_ranking_accuracy,
        {"ref_chosen": CHOSEN, "ref_rejected": REJECTED, "preference_prob": UNIT, "beta": 0.4},
        extremes=("ref_chosen", "ref_rejected"),
        bad={"two temperatures": ("beta", jnp.ones(2))},
    ),
    example(
        evaluation.flip_loss_threshold,
        {"ref_chosen": CHOSEN, "ref_rejected": REJECTED, "beta": 0.4},
        differentiable=("beta",),
        constants=("ref_chosen", "ref_rejected"),
        extremes=("ref_chosen", "ref_rejected"),
    ),
    example(
        evaluation.ches_score,
        {
            "hidden_chosen": HIDDEN[0], "mask_chosen": MASK, "hidden_rejected": HIDDEN[1, :, :5],
            "mask_rejected": MASK[::-1, 1:],
        },
        function=lambda **arguments: evaluation.ches_score(**arguments, length_normalize=True),
        differentiable=("hidden_chosen", "hidden_rejected"),
        masks={"mask_chosen": ("hidden_chosen",), "mask_rejected": ("hidden_rejected",)},
    ),
    example(
        evaluation.displacement_rate,
        {"grad_chosen": LIST, "grad_rejected": TARGET},
        function=lambda grad_chosen, grad_rejected: jax.vmap(evaluation.displacement_rate)(grad_chosen, grad_rejected),
        differentiable=("grad_chosen", "grad_rejected"),
    ),
    example(
        evaluation.length_controlled_winrate,
        {
            "preference": JUDGED[0], "len_model": 90 * JUDGED[1], "len_base": 70 * JUDGED[2],
            "difficulty": JUDGED[3], "sample_weight": jnp.where(jnp.arange(16) % 5 == 2, 0, JUDGED[3] + 1),
            "l2": 0.01,
        },
        differentiable=("preference", "difficulty", "l2"),
        masks={"sample_weight": ("preference", "len_model", "len_base", "difficulty")},
        output_axis=None,
        extremes=("len_model", "len_base"),
    ),
]  # fmt: skip

EXAMPLES = [*LINKS, *SCORES, *LOSSES, *REGULARIZERS, *CURATION, *EVALUATION]
