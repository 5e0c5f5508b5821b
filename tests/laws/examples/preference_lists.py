"""Preference losses of lists, of self-play, and of diffusion models."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.core import schedules
from esscher.objectives.preference import diffusion, lists, selfplay

NORMAL = jax.random.normal(jax.random.key(0), (12, 8, 4))
POLICY, REFERENCE, PROPOSAL, GOODNESS = NORMAL[:4] - 3
REWARDS = jax.random.normal(jax.random.key(1), (8, 4))
LABELS = jnp.argsort(REWARDS, -1) // 2 + 0.0  # with ties
VALID = jnp.arange(4) < jnp.array([4, 2, 1, 3, 3, 0, 4, 4])[:, None]
TOKENS = jax.random.normal(jax.random.key(2), (3, 8, 4, 3)) - 2
TOKEN_VALID = (jnp.arange(3) < jnp.arange(1, 5)[:, None]) & VALID[..., None]
SEGMENTS = jnp.where(TOKEN_VALID, jnp.array([0, 1, 1]), -1)
LEVELS = jnp.where(jnp.arange(8)[:, None] == 3, 2, jnp.array([1, 3, 2, 1]))  # one prompt has no pairs
STEPS = jax.random.normal(jax.random.key(3), (8, 4, 2, 5))
WEIGHTS = jax.random.uniform(jax.random.key(4), (8, 4, 2), minval=0.2)
PAIR = dict(zip(("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"), 9 * NORMAL[4:8, :, 0], strict=True))
HEADS = jnp.array([0, 2, 2, -1, 0, 2, 0, 0])
NAMES = ("policy_first", "policy_second", "old_first", "old_second", "ref_first", "ref_second")
RATIOS = {"beta": 0.3, "clip_ratio": 3.0, "clip_range": 0.4}
SCORE_FUNCTION = {"gradients": "the weight of the score holds the policy, stopped: no function has this gradient"}


def traced(hyper):
    return {name: jnp.asarray(value) for name, value in hyper.items()}


def of_list(function, arguments, hyper, *, differentiable=None, constants=(), slopes=None, name=None, exempt=None):
    """Of `[P, G]`, the first argument the policy's and the others constants, under a mask."""
    first, *others = arguments
    return Example(
        name=name or function.__name__,
        function=function,
        arguments={**arguments, "mask": VALID, **traced(hyper)},
        covers=(function,),
        hyperparameters=tuple(hyper),
        differentiable=(first, *(hyper if slopes is None else slopes)) if differentiable is None else differentiable,
        constants=(*others, *constants),
        masks={"mask": tuple(arguments)},
        batch=(*arguments, "mask"),
        exempt=exempt or {},
    )


def errors(seed, n):
    return jnp.square(jax.random.normal(jax.random.key(seed), (n, 8)))


def p3o(function, arguments, masks=None):
    covered = {name: value for name, value in arguments.items() if not name.startswith("mask")}
    return Example(
        name=function.__name__,
        function=function,
        arguments={**arguments, **traced(RATIOS)},
        covers=(function,),
        hyperparameters=tuple(RATIOS),
        differentiable=NAMES[:2],
        constants=tuple(name for name in covered if name not in NAMES[:2]),
        masks=masks or {},
        batch=tuple(arguments),
        exempt=SCORE_FUNCTION,
    )


RATED = {"policy": POLICY, "reference": REFERENCE, "rewards": REWARDS}
MEANS = {"mean_logp": POLICY, "labels": LABELS}
MATCH = {"hyper": {"beta": 0.7, "temperature": 0.5}, "slopes": ("beta",), "constants": ("temperature",)}
ERRORS = dict(
    zip(("chosen_error", "rejected_error", "ref_chosen_error", "ref_rejected_error"), errors(5, 4), strict=True)
)
SORTED = {"arguments": {**PAIR, "beta": jnp.asarray(0.2), "flip_prob": jnp.asarray(0.1)}, "batch": tuple(PAIR),
          "hyperparameters": ("beta", "flip_prob"), "differentiable": (*tuple(PAIR)[:2], "beta", "flip_prob"),
          "constants": tuple(PAIR)[2:], "output_axis": None, "independent": False,
          "bad": {"a beta for each example": ("beta", jnp.ones(8))}}  # fmt: skip

EXAMPLES = [
    of_list(lists.plackett_luce_dpo, {"policy": POLICY, "reference": REFERENCE}, {"beta": 0.7}),
    of_list(lists.infonca, RATED, **MATCH),
    of_list(lists.exo_list, RATED, **MATCH),
    of_list(lists.nca_list, RATED, **MATCH),
    of_list(
        lists.brain,
        {"policy": POLICY, "proposal": PROPOSAL, "reference": REFERENCE, "log_goodness": GOODNESS},
        {},
    ),
    of_list(lists.lipo, {"policy": POLICY, "reference": REFERENCE, "labels": LABELS}, {"beta": 0.7}),
    of_list(
        lists.lambda_pair_weight, {"score": POLICY, "label": LABELS}, {}, differentiable=(), constants=("score",)
    ),
    of_list(lists.rrhf, {"mean_logp": POLICY, "rewards": REWARDS}, {"nll_weight": 0.4}),
    of_list(lists.pro, {"mean_logp": POLICY, "rewards": REWARDS}, {"nll_weight": 0.4}),
    of_list(lists.set_contrast, MEANS, {}),
    of_list(
        lists.set_contrast, MEANS, {"boundary": 0.3}, name="set_contrast[boundary]", slopes=(), constants=("boundary",),
        exempt={"gradients": "the floor holds the scores, stopped; a test holds the gradient instead"},
    ),
    of_list(lists.contrastive_ranking, {"score": POLICY, "labels": LABELS}, {"bias": 0.6}),
    Example(
        name="trpa",
        function=selfplay.trpa,
        arguments={
            "logp": TOKENS[0], "ref_logp": TOKENS[1], "old_logp": TOKENS[2], "levels": LEVELS, "mask": TOKEN_VALID,
            "beta": jnp.asarray(0.5), "top_weight": jnp.asarray(2.5), "kl_coef": jnp.asarray(0.2),
        },
        covers=(selfplay.trpa,),
        hyperparameters=("beta", "top_weight", "kl_coef"),
        differentiable=("logp", "beta", "top_weight", "kl_coef"),
        constants=("ref_logp", "old_logp"),
        masks={"mask": ("logp", "ref_logp", "old_logp")},
        batch=("logp", "ref_logp", "old_logp", "levels", "mask"),
    ),
    Example(
        name="tree_tpo",
        function=lists.tree_tpo,
        arguments={
            "logp": TOKENS[0], "ref_logp": TOKENS[1], "segments": SEGMENTS, "step_weights": WEIGHTS, "values": REWARDS,
            "beta": jnp.asarray(0.5),
        },
        covers=(lists.tree_tpo,),
        hyperparameters=("beta",),
        differentiable=("logp", "beta"),
        constants=("ref_logp", "step_weights", "values"),
        masks={"segments": ("logp", "ref_logp")},
        batch=("logp", "ref_logp", "segments", "step_weights", "values"),
    ),
    Example(
        name="step_similarity_weight",
        function=lists.step_similarity_weight,
        arguments={"steps": STEPS, "best": jnp.arange(8) % 4},
        covers=(lists.step_similarity_weight,),
        constants=("steps",),
        batch=("steps", "best"),
        extremes=("steps",),
        bad={"an index that is half": ("best", jnp.arange(8) / 2)},
    ),
    Example(
        name="step_weighted_score",
        function=lists.step_weighted_score,
        arguments={"log_ratios": TOKENS[0, :, 2], "segments": SEGMENTS[:, 2], "weights": WEIGHTS[:, 2]},
        covers=(lists.step_weighted_score,),
        differentiable=("log_ratios",),
        constants=("weights",),
        masks={"segments": ("log_ratios",)},
        batch=("log_ratios", "segments", "weights"),
    ),
    Example(name="aot_paired", function=lists.aot_paired, covers=(lists.aot_paired,), **SORTED),
    Example(name="aot_unpaired", function=lists.aot_unpaired, covers=(lists.aot_unpaired,), **SORTED),
    Example(
        name="mah_dpo",
        function=lambda **given: lists.mah_dpo(**given, n_heads=3),
        arguments={**PAIR, "heads": HEADS, "beta": jnp.asarray(0.2)},
        covers=(lists.mah_dpo,),
        hyperparameters=("beta",),
        differentiable=(*tuple(PAIR)[:2], "beta"),
        constants=tuple(PAIR)[2:],
        masks={"heads": tuple(PAIR)},
        batch=(*PAIR, "heads"),
        independent=False,
        bad={"heads that are not integers": ("heads", HEADS + 0.5)},
    ),
    Example(
        name="nash_md",
        function=selfplay.nash_md,
        arguments={
            "logp": TOKENS[0, :, 3], "ref_logp": TOKENS[1, :, 3], "mask": TOKEN_VALID[:, 3],
            "preference": jnp.linspace(0.1, 0.9, 8), "beta": jnp.asarray(0.3),
        },
        covers=(selfplay.nash_md,),
        hyperparameters=("beta",),
        differentiable=("logp",),
        constants=("ref_logp", "preference", "beta"),
        masks={"mask": ("logp", "ref_logp")},
        batch=("logp", "ref_logp", "mask", "preference"),
        exempt=SCORE_FUNCTION,
    ),
    Example(
        name="geometric_mixture",
        function=lambda policy_logits, ref_logits, mixture: selfplay.geometric_mixture(
            policy_logits, ref_logits, mixture=mixture
        ),
        arguments={"policy_logits": POLICY, "ref_logits": REFERENCE, "mixture": jnp.asarray(0.4)},
        covers=(selfplay.geometric_mixture,),
        hyperparameters=("mixture",),
        differentiable=("policy_logits", "ref_logits", "mixture"),
        batch=("policy_logits", "ref_logits"),
    ),
    p3o(
        selfplay.p3o,
        {
            **dict(zip(NAMES, NORMAL[4:10, :, 1] / 2 - 3, strict=True)),
            "rewards_first": REWARDS[:, 0], "rewards_second": REWARDS[:, 1],
        },
    ),
    p3o(
        selfplay.p3o_token,
        {
            **dict(zip(NAMES, NORMAL[4:10] / 3 - 2, strict=True)),
            "mask_first": VALID, "mask_second": VALID[::-1],
            "rewards_first": REWARDS[:, 0], "rewards_second": REWARDS[:, 1],
        },
        {"mask_first": NAMES[::2], "mask_second": NAMES[1::2]},
    ),
    Example(
        name="extrapolate_log_policy",
        function=lambda new, previous, momentum: selfplay.extrapolate_log_policy(new, previous, momentum=momentum),
        arguments={"new": POLICY, "previous": REFERENCE, "momentum": jnp.asarray(0.4)},
        covers=(selfplay.extrapolate_log_policy,),
        hyperparameters=("momentum",),
        differentiable=("new", "previous", "momentum"),
        batch=("new", "previous"),
    ),
    Example(
        name="extrapolate_tree",
        function=lambda new, previous, momentum: selfplay.extrapolate_tree(
            {"w": new, "step": jnp.asarray(3)}, {"w": previous, "step": jnp.asarray(2)}, momentum=momentum
        ),
        arguments={"new": POLICY, "previous": REFERENCE, "momentum": jnp.asarray(0.4)},
        covers=(selfplay.extrapolate_tree,),
        hyperparameters=("momentum",),
        differentiable=("new", "previous", "momentum"),
        bad={"another shape": ("previous", REFERENCE[:3])},
    ),
    Example(
        name="denoising_log_ratio",
        function=diffusion.denoising_log_ratio,
        arguments={"error": errors(6, 1)[0], "ref_error": errors(7, 1)[0], "weight": jnp.linspace(0.2, 0.9, 8)},
        covers=(diffusion.denoising_log_ratio,),
        differentiable=("error",),
        constants=("ref_error", "weight"),
        batch=("error", "ref_error", "weight"),
    ),
    Example(
        name="diffusion_dpo",
        function=diffusion.diffusion_dpo,
        arguments={**ERRORS, "beta": jnp.asarray(2.0), "weight": jnp.asarray(0.5)},
        covers=(diffusion.diffusion_dpo,),
        hyperparameters=("beta", "weight"),
        differentiable=(*tuple(ERRORS)[:2], "beta"),
        constants=(*tuple(ERRORS)[2:], "weight"),
        batch=tuple(ERRORS),
        bad={"a weight per other batch": ("weight", jnp.ones(5)), "a beta per other batch": ("beta", jnp.ones(5))},
    ),
    Example(
        name="inversion_noise",
        function=lambda latents, data, t: diffusion.inversion_noise(latents, data, t, schedules.cosine()),
        arguments={"latents": POLICY, "data": REFERENCE, "t": jnp.linspace(0.1, 0.9, 8)},
        covers=(diffusion.inversion_noise,),
        constants=("latents", "data"),
        batch=("latents", "data", "t"),
        extremes=("latents", "data"),
    ),
]  # fmt: skip
