"""Weighted likelihood and regression, distillation, policy gradients of diffusion models."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.core.contracts import ReverseKernel
from esscher.objectives.policy import diffusion, distillation, regression

LOGP = -jnp.exp(jax.random.normal(jax.random.key(0), (8, 5)))
RATIO = 0.1 * jax.random.normal(jax.random.key(1), (8, 5))
VALUES = jax.random.normal(jax.random.key(2), (8, 5))
MASK = jnp.arange(5) < jnp.array([5, 2, 1, 4, 3, 0, 5, 2])[:, None]
CORRECT, RATE = jnp.arange(8) % 2, jnp.linspace(0.1, 0.6, 8)
STUDENT, TEACHER = jax.random.normal(jax.random.key(3), (2, 8, 5, 4))
TARGETS = jax.random.randint(jax.random.key(4), (8, 5), 0, 4)
REWARDS = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.5, 1.0], [0.0, 1.0]])
CHAIN = jax.random.normal(jax.random.key(5), (4, 8, 2))
TOKENS = {"logp": LOGP, "logp_old": LOGP - RATIO}
TILT = {"temperature": jnp.asarray(0.8), "epsilon": jnp.asarray(0.1)}


def nft(weight, level):
    def function(low, **arguments):
        return regression.nft_loss(**arguments, weight=weight, level=level, rate_limits=(low, 1 - low))

    return Example(
        name=f"nft_loss[{weight}, {level}]",
        function=function,
        arguments={
            **TOKENS, "correct": CORRECT, "pass_rate": RATE, "mask": MASK, "floor": jnp.asarray(0.1),
            "negative_weight": jnp.asarray(0.9), "low": jnp.asarray(0.02),
        },
        covers=(regression.nft_loss,),
        hyperparameters=("floor", "negative_weight", "low"),
        differentiable=("logp", "negative_weight"),
        constants=("logp_old", "pass_rate"),
        masks={"mask": ("logp", "logp_old")},
        batch=("logp", "logp_old", "correct", "pass_rate", "mask"),
    )  # fmt: skip


def gaussian_kernel(drift, noise):
    def log_prob(x_s, x, t, s):
        z = (x_s - (1 - drift * (t - s)) * x) / noise
        return (-0.5 * z**2 - jnp.log(noise)).sum(-1)

    return ReverseKernel(lambda key, x, t, s: x, log_prob)


def divergence(kind, **hyper):
    arrays = {"student_logits": STUDENT[:, 0], "teacher_logits": TEACHER[:, 0]}
    hyper = {name: jnp.asarray(value) for name, value in {**hyper, "temperature": 0.8}.items()}
    return Example(
        name=f"divergence[{kind}]",
        function=lambda **arguments: distillation.divergence(**arguments, kind=kind),
        arguments={**arrays, **hyper},
        covers=(distillation.divergence,),
        hyperparameters=tuple(hyper),
        differentiable=("student_logits",),
        constants=("teacher_logits",),
        batch=tuple(arrays),
    )


EXAMPLES = [
    nft("one_minus_rate", "token"),
    nft("sqrt_odds", "sequence"),
    Example(
        name="advantage_weights",
        function=regression.advantage_weights,
        arguments={"advantages": VALUES, "beta": jnp.asarray(0.7), "weight_max": jnp.asarray(3.0)},
        covers=(regression.advantage_weights,),
        hyperparameters=("beta", "weight_max"),
        constants=("advantages",),
        batch=("advantages",),
        bad={"whole advantages": ("advantages", TARGETS)},
    ),
    Example(
        name="optimal_value",
        function=lambda values, valid, beta: regression.optimal_value(values, beta, valid=valid),
        arguments={"values": VALUES, "valid": MASK, "beta": jnp.asarray(0.5)},
        covers=(regression.optimal_value,),
        hyperparameters=("beta",),
        differentiable=("beta",),
        constants=("values",),
        masks={"valid": ("values",)},
        batch=("values", "valid"),
        extremes=("values",),
        bad={"whole values": ("values", TARGETS)},
    ),
    Example(
        name="tilted_samples",
        function=lambda values, valid, temperature, epsilon: regression.tilted_samples(
            values, temperature, epsilon=epsilon, valid=valid
        ),
        arguments={"values": VALUES, "valid": MASK, **TILT},
        covers=(regression.tilted_samples,),
        hyperparameters=("temperature", "epsilon"),
        differentiable=("epsilon",),
        constants=("values",),
        masks={"valid": ("values",)},
        batch=("values", "valid"),
        extremes=("values",),
        bad={"whole values": ("values", TARGETS)},
    ),
    Example(
        name="mpo_loss",
        function=regression.mpo_loss,
        arguments={"logp": LOGP, "values": VALUES, **TILT},
        covers=(regression.mpo_loss,),
        hyperparameters=("temperature", "epsilon"),
        differentiable=("logp", "epsilon"),
        constants=("values",),
        batch=("logp", "values"),
    ),
    Example(
        name="top_fraction_mask",
        function=lambda values, mask, fraction: regression.top_fraction_mask(values, mask, fraction, over="sequence"),
        arguments={"values": VALUES, "mask": MASK, "fraction": jnp.asarray(0.5)},
        covers=(regression.top_fraction_mask,),
        hyperparameters=("fraction",),
        masks={"mask": ("values",)},
        batch=("values", "mask"),
        bad={"whole values": ("values", TARGETS)},
    ),
    Example(
        name="vmpo",
        function=regression.vmpo,
        arguments={"logp": LOGP, "advantages": VALUES, "mask": MASK, **TILT, "fraction": jnp.asarray(0.5)},
        covers=(regression.vmpo,),
        hyperparameters=("temperature", "epsilon", "fraction"),
        differentiable=("logp", "epsilon"),
        constants=("advantages",),
        masks={"mask": ("logp", "advantages")},
        bad={"logp of one sequence": ("logp", LOGP[0])},
    ),
    Example(
        name="kl_constraint_loss",
        function=regression.kl_constraint_loss,
        arguments={"kl": jnp.exp(VALUES), "alpha": jnp.asarray(0.5), "epsilon": jnp.asarray(0.1)},
        covers=(regression.kl_constraint_loss,),
        hyperparameters=("alpha", "epsilon"),
        differentiable=("kl",),
        batch=("kl",),
        exempt={"gradients": "one factor of the product learns from one half of the loss, the other from the other"},
    ),
    Example(
        name="a2po_loss",
        function=regression.a2po_loss,
        arguments={
            "policy": LOGP.sum(-1), "reference": LOGP.sum(-1) - RATIO.sum(-1), "rewards": VALUES[:, 0],
            "value": VALUES[:, 1], "beta": jnp.asarray(0.3),
        },
        covers=(regression.a2po_loss,),
        hyperparameters=("beta",),
        differentiable=("policy", "beta"),
        constants=("reference", "rewards", "value"),
        batch=("policy", "reference", "rewards", "value"),
    ),
    divergence("forward"),
    divergence("reverse"),
    divergence("jsd", beta=0.3),
    Example(
        name="logit_distillation",
        function=distillation.logit_distillation,
        arguments={
            "student_logits": STUDENT, "teacher_logits": TEACHER, "targets": TARGETS, "alpha": jnp.asarray(0.3),
            "temperature": jnp.asarray(2.0),
        },
        covers=(distillation.logit_distillation,),
        hyperparameters=("alpha", "temperature"),
        differentiable=("student_logits", "alpha"),
        constants=("teacher_logits",),
        batch=("student_logits", "teacher_logits", "targets"),
    ),
    Example(
        name="minillm",
        function=distillation.minillm,
        arguments={
            "student_logits": STUDENT, "teacher_logits": TEACHER, "targets": TARGETS, "mask": MASK,
            "gamma": jnp.asarray(0.9),
        },
        covers=(distillation.minillm,),
        hyperparameters=("gamma",),
        differentiable=("student_logits",),
        constants=("teacher_logits", "gamma"),
        masks={"mask": ("student_logits", "teacher_logits", "targets")},
        batch=("student_logits", "teacher_logits", "targets", "mask"),
        output_axis=None,
        exempt={"gradients": "rewards that depend on the policy are constants of it"},
    ),
    Example(
        name="kdrl",
        function=lambda **arguments: distillation.kdrl(**arguments, distilled="wrong"),
        arguments={
            **TOKENS, "logp_teacher": LOGP[::-1], "rewards": REWARDS, "mask": MASK, "beta": jnp.asarray(0.1)
        },
        covers=(distillation.kdrl,),
        hyperparameters=("beta",),
        differentiable=("logp", "beta"),
        constants=("logp_old", "logp_teacher", "rewards"),
        masks={"mask": ("logp", "logp_old", "logp_teacher")},
    ),
    Example(
        name="chain_logps",
        function=lambda chain, times, drift, noise: diffusion.chain_logps(gaussian_kernel(drift, noise), chain, times),
        arguments={
            "chain": CHAIN, "times": jnp.array([1.0, 0.7, 0.3, 0.0]), "drift": jnp.asarray(0.4),
            "noise": jnp.asarray(0.6),
        },
        covers=(diffusion.chain_logps,),
        hyperparameters=("drift", "noise"),
        differentiable=("drift", "noise"),
        constants=("chain",),
        batch={"chain": 1},
        bad={"whole times": ("times", jnp.arange(4)), "fewer times": ("times", jnp.ones(3))},
    ),
    Example(
        name="ddpo",
        function=diffusion.ddpo,
        arguments={**TOKENS, "advantages": VALUES[:, 0], "mask": MASK, "advantage_max": jnp.asarray(0.9)},
        covers=(diffusion.ddpo,),
        hyperparameters=("advantage_max",),
        differentiable=("logp",),
        constants=("logp_old", "advantages"),
        masks={"mask": ("logp", "logp_old")},
        batch=("logp", "logp_old", "advantages", "mask"),
        output_axis=None,
    ),
    Example(
        name="flow_grpo",
        function=diffusion.flow_grpo,
        arguments={**TOKENS, "rewards": REWARDS, "mask": MASK, "kl": jnp.exp(VALUES), "beta": jnp.asarray(0.1)},
        covers=(diffusion.flow_grpo,),
        hyperparameters=("beta",),
        differentiable=("logp", "kl", "beta"),
        constants=("logp_old", "rewards"),
        masks={"mask": ("logp", "logp_old", "kl")},
    ),
]  # fmt: skip
