"""Verifiable rewards and curricula."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.objectives import curricula, rewards

UNIT = jax.random.uniform(jax.random.key(0), (8, 5), minval=0.1, maxval=0.9)
FLAGS = jax.random.bernoulli(jax.random.key(1), 0.6, (8, 5))
MASK = jnp.arange(5) < jnp.array([5, 2, 1, 4, 3, 5, 2, 3])[:, None]
POINTS = 3 * jax.random.normal(jax.random.key(2), (8, 5)) + 1
MATCH = jax.random.bernoulli(jax.random.key(3), 0.3, (8, 5, 3)).astype(jnp.float32)
LENGTHS = jnp.arange(3.0, 43.0).reshape(8, 5)
HIDDEN = jax.random.normal(jax.random.key(4), (8, 5, 4))
REGIONS = jnp.where(MASK, jnp.arange(5) % 2, -1)  # 0: question, 1: instruction
CATEGORIES = jnp.array([2, 0, 1, 2, -1, 0, 2, 0])
LONGEST, PEAK = jnp.asarray(50.0), jnp.asarray(0.45)
NO_BATCH = {"output_axis": None, "independent": False}


def example(function, call=None, *, label="", batch=(), axis=0, differentiable=(), masks=(), hyper=(), **rest):
    """With the batch arguments and hyperparameters as dictionaries."""
    batch, hyper = dict(batch), dict(hyper)
    return Example(
        name=function.__name__ + label,
        function=call or function,
        arguments=batch | hyper,
        covers=(function,),
        hyperparameters=tuple(hyper),
        differentiable=(*differentiable, *hyper),
        masks=dict(masks),
        batch=dict.fromkeys(batch, axis),
        **rest,
    )


def calibrated(score):
    return example(
        rewards.calibrated_correctness_reward,
        lambda correct, confidence, coef: rewards.calibrated_correctness_reward(
            correct, confidence, score=score, coef=coef
        ),
        label=f"[{score}]",
        batch={"correct": FLAGS, "confidence": UNIT},
        differentiable=("confidence",),
        hyper={"coef": jnp.asarray(0.7)},
    )


def scaffold(kind, **hyper):
    return Example(
        name=f"scaffold_ratio[{kind}]",
        function=lambda progress, **hyper: curricula.scaffold_ratio(4, progress, kind=kind, **hyper),
        arguments={"progress": jnp.asarray(0.3), **hyper},
        covers=(curricula.scaffold_ratio,),
        hyperparameters=("progress", *hyper),
        differentiable=("progress", *hyper),
    )


EXAMPLES = [
    example(
        rewards.gated_process_reward,
        batch={"format_reward": FLAGS * 1.0, "outcome_reward": UNIT[::-1], "process_reward": UNIT},
        differentiable=("format_reward", "outcome_reward", "process_reward"),
    ),
    calibrated("brier"),
    calibrated("spherical"),
    calibrated("log"),
    example(
        rewards.parabolic_length_reward,
        batch={"lengths": LENGTHS},
        hyper={"max_length": LONGEST, "peak": PEAK},
    ),
    example(
        rewards.format_length_reward,
        batch={"format_ok": FLAGS, "lengths": LENGTHS},
        hyper={"max_length": LONGEST, "peak": PEAK},
    ),
    example(
        rewards.answer_set_f1,
        batch={"match": MATCH, "pred_valid": MASK, "gold_valid": MASK[::-1, :3]},
        masks={"pred_valid": ("match",)},
    ),
    example(rewards.jaccard, batch={"first": FLAGS, "second": MASK}),
    example(
        rewards.rubric_score,
        batch={"met": UNIT, "points": POINTS, "mask": MASK},
        differentiable=("points",),
        masks={"mask": ("met", "points")},
    ),
    example(
        rewards.combine_rewards,
        batch={"rewards": jnp.stack([UNIT, POINTS])},
        axis=1,
        differentiable=("rewards",),
        hyper={"weights": jnp.array([0.5, 2.0])},
        bad={"a reward without a weight": ("rewards", jnp.stack([UNIT, POINTS, POINTS]))},
    ),
    example(
        rewards.gdpo_advantage,
        batch={"rewards": jnp.stack([UNIT, POINTS])},
        axis=1,
        differentiable=("rewards",),
        hyper={"weights": jnp.array([0.5, 2.0]), "eps": jnp.asarray(0.1)},
        independent=False,
        bad={"no groups": ("rewards", UNIT)},
    ),
    example(
        curricula.abs_advantage_signal,
        lambda advantages, categories, valid: curricula.abs_advantage_signal(
            advantages, categories, 3, valid=valid
        ),
        batch={"advantages": POINTS, "categories": CATEGORIES, "valid": MASK},
        differentiable=("advantages",),
        masks={"valid": ("advantages",), "categories": ("advantages",)},
        **NO_BATCH,
    ),
    example(
        curricula.curriculum_update,
        batch={"values": UNIT, "signal": POINTS, "seen": MASK},
        differentiable=("values", "signal"),
        masks={"seen": ("signal",)},
        hyper={"alpha": jnp.asarray(0.4)},
    ),
    example(
        curricula.curriculum_probs,
        lambda values, available, tau: curricula.curriculum_probs(values, tau, available=available),
        batch={"values": UNIT, "available": MASK},
        differentiable=("values",),
        masks={"available": ("values",)},
        hyper={"tau": jnp.asarray(0.5)},
    ),
    example(
        curricula.angle_concentration,
        batch={"hidden": HIDDEN, "question": REGIONS == 0, "instruction": REGIONS == 1},
        differentiable=("hidden",),
    ),
    example(
        curricula.angle_concentration,
        lambda hidden, regions, w_cross: curricula.angle_concentration(
            hidden, regions == 0, regions == 1, w_cross=w_cross
        ),
        label="[regions]",
        batch={"hidden": HIDDEN, "regions": REGIONS},
        differentiable=("hidden",),
        masks={"regions": ("hidden",)},
        hyper={"w_cross": jnp.asarray(2.0)},
        exempt={"errors": "the example makes two masks of one argument, so what is refused has another name"},
    ),
    example(
        curricula.gaussian_order_probs,
        lambda ranks, available, mu, sigma: curricula.gaussian_order_probs(ranks, mu, sigma=sigma, available=available),
        batch={"ranks": jnp.arange(8.0), "available": jnp.arange(8) % 4 > 0},
        masks={"available": ("ranks",)},
        hyper={"mu": jnp.asarray(2.5), "sigma": jnp.asarray(3.0)},
        independent=False,
    ),
    example(
        curricula.gaussian_mu_update,
        hyper={
            "mu": jnp.asarray(30.0), "accuracy": jnp.asarray(0.4), "angle": jnp.asarray(0.3), "n": jnp.asarray(50.0),
            "alpha": jnp.asarray(1.5), "beta": jnp.asarray(0.45), "max_step": jnp.asarray(100.0),
        },
    ),
    scaffold("sigmoid", start=jnp.asarray(0.25), steepness=jnp.asarray(4.0)),
    scaffold("power", power=jnp.asarray(1.7)),
]  # fmt: skip
