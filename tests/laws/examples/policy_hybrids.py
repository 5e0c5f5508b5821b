"""Mixtures of imitation and reinforcement, and rewards from reference answers."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.objectives.policy import answers, hybrids

LOGP = -jnp.exp(jax.random.normal(jax.random.key(0), (8, 5)))
RATIO = 0.1 * jax.random.normal(jax.random.key(1), (8, 5))
MASK = jnp.arange(5) < jnp.array([5, 2, 1, 4, 3, 0, 5, 2])[:, None]
REWARDS = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.5, 1.0], [0.0, 1.0]])
GROUPS = jax.random.uniform(jax.random.key(2), (8, 3))
LOGITS, REFERENCE = jax.random.normal(jax.random.key(3), (2, 8, 5, 4))
TARGETS = jax.random.randint(jax.random.key(4), (8, 5), 0, 4)
OFF = jnp.arange(8) % 3 == 0
TOKENS = {"logp": LOGP, "logp_old": LOGP - RATIO}
ANSWER = MASK & (jnp.arange(5) >= 2)

EXAMPLES = [
    Example(
        name="dft_loss",
        function=answers.dft_loss,
        arguments={"logp": LOGP, "mask": MASK, "exponent": jnp.asarray(0.8)},
        covers=(answers.dft_loss,),
        hyperparameters=("exponent",),
        differentiable=("logp",),
        constants=("exponent",),
        masks={"mask": ("logp",)},
        batch=("logp", "mask"),
        exempt={"gradients": "its slope is that of -p^exponent, by a weight without gradient"},
    ),
    Example(
        name="asft_loss",
        function=answers.asft_loss,
        arguments={
            "logits": LOGITS, "ref_logits": REFERENCE, "targets": TARGETS, "mask": MASK,
            "kl_weight": jnp.asarray(0.3),
        },
        covers=(answers.asft_loss,),
        hyperparameters=("kl_weight",),
        differentiable=("logits", "kl_weight"),
        constants=("ref_logits",),
        masks={"mask": ("logits", "ref_logits", "targets")},
        batch=("logits", "ref_logits", "targets", "mask"),
        exempt={"gradients": "its slope is that of -p, by a weight without gradient"},
    ),
    Example(
        name="reference_answer_score",
        function=lambda logp, answer_mask: tuple(
            answers.reference_answer_score(logp, answer_mask, kind) for kind in ("prob", "mean_prob")
        ),
        arguments={"logp": LOGP, "answer_mask": MASK},
        covers=(answers.reference_answer_score,),
        differentiable=("logp",),
        masks={"answer_mask": ("logp",)},
        batch=("logp", "answer_mask"),
        extremes=(),  # the exponential of 1e4 is infinite, and no log-probability is so
    ),
    Example(
        name="reference_answer_score[log]",
        function=lambda logp, answer_mask: jnp.stack(
            [answers.reference_answer_score(logp, answer_mask, kind) for kind in ("log", "mean_log")], -1
        ),
        arguments={"logp": LOGP, "answer_mask": MASK.at[5, 0].set(True)},
        covers=(answers.reference_answer_score,),
        differentiable=("logp",),
        masks={"answer_mask": ("logp",)},
        batch=("logp", "answer_mask"),
    ),
    Example(
        name="verifree",
        function=lambda logp, think_mask, answer_mask: answers.verifree(logp, think_mask, answer_mask, group_size=2),
        arguments={
            "logp": jnp.concatenate([LOGP, LOGP[::-1]]), "think_mask": jnp.concatenate([MASK & ~ANSWER] * 2),
            "answer_mask": jnp.concatenate([ANSWER] * 2),
        },
        covers=(answers.verifree,),
        differentiable=("logp",),
        extremes=(),
        exempt={"gradients": "weights that depend on the policy are constants of it"},
    ),
    Example(
        name="reference_probability_reward",
        function=answers.reference_probability_reward,
        arguments={
            "score": GROUPS[:, 0], "base_score": GROUPS[:, 1], "well_formed": OFF, "format_weight": jnp.asarray(0.1),
        },
        covers=(answers.reference_probability_reward,),
        hyperparameters=("format_weight",),
        constants=("score", "base_score", "format_weight"),
        batch=("score", "base_score", "well_formed"),
        bad={"whole scores": ("score", TARGETS[:, 0])},
    ),
    Example(
        name="std_filter",
        function=answers.std_filter,
        arguments={
            "rewards": GROUPS, "running_std": jnp.asarray(0.3), "ratio": jnp.asarray(0.5), "decay": jnp.asarray(0.9),
            "eps": jnp.asarray(1e-6),
        },
        covers=(answers.std_filter,),
        hyperparameters=("running_std", "ratio", "decay", "eps"),
        constants=("rewards",),
        bad={"rewards of one prompt": ("rewards", GROUPS[0]), "whole rewards": ("rewards", TARGETS)},
    ),
    Example(
        name="marginal_likelihood_loss",
        function=answers.marginal_likelihood_loss,
        arguments={"logp": LOGP, "valid": MASK, "beta": jnp.asarray(0.7)},
        covers=(answers.marginal_likelihood_loss,),
        hyperparameters=("beta",),
        differentiable=("logp", "beta"),
        masks={"valid": ("logp",)},
        batch=("logp", "valid"),
    ),
    Example(
        name="performance_gate",
        function=lambda rewards, solved: hybrids.performance_gate(rewards, solved=solved),
        arguments={"rewards": jnp.concatenate([REWARDS, 1 - REWARDS]), "solved": jnp.asarray(1.0)},
        covers=(hybrids.performance_gate,),
        hyperparameters=("solved",),
        constants=("rewards",),
        batch=("rewards",),
        bad={"rewards of one prompt": ("rewards", REWARDS[0]), "whole rewards": ("rewards", TARGETS)},
    ),
    Example(
        name="hpt",
        function=hybrids.hpt,
        arguments={
            **TOKENS, "rewards": REWARDS, "mask": MASK, "demo_logp": LOGP[2:6] - 0.1, "demo_mask": MASK[2:6],
            "length": jnp.asarray(7.0), "solved": jnp.asarray(0.0), "demo_weight": jnp.asarray(0.3),
        },
        covers=(hybrids.hpt,),
        hyperparameters=("length", "solved", "demo_weight"),
        differentiable=("logp", "demo_logp", "length", "demo_weight"),
        constants=("logp_old", "rewards"),
        masks={"mask": ("logp", "logp_old"), "demo_mask": ("demo_logp",)},
    ),
    Example(
        name="srft_weights",
        function=hybrids.srft_weights,
        arguments={"entropy": GROUPS[:, 0]},
        covers=(hybrids.srft_weights,),
        constants=("entropy",),
        batch=("entropy",),
        bad={"a whole entropy": ("entropy", TARGETS[:, 0])},
    ),
    Example(
        name="mixed_policy_gradient",
        function=hybrids.mixed_policy_gradient,
        arguments={**TOKENS, "advantages": RATIO[:, 0], "mask": MASK, "off_policy": OFF},
        covers=(hybrids.mixed_policy_gradient,),
        differentiable=("logp",),
        constants=("logp_old", "advantages"),
        masks={"mask": ("logp", "logp_old")},
        batch=("logp", "logp_old", "advantages", "mask", "off_policy"),
    ),
    Example(
        name="mixed_grpo",
        function=hybrids.mixed_grpo,
        arguments={
            **TOKENS, "rewards": REWARDS, "mask": MASK, "off_policy": OFF.reshape(4, 2), "length": jnp.asarray(7.0)
        },
        covers=(hybrids.mixed_grpo,),
        hyperparameters=("length",),
        differentiable=("logp",),
        constants=("logp_old", "rewards"),
        masks={"mask": ("logp", "logp_old")},
    ),
    Example(
        name="taper_scale",
        function=hybrids.taper_scale,
        arguments={**TOKENS, "mask": MASK, "off_policy": OFF, "q": jnp.asarray(0.7)},
        covers=(hybrids.taper_scale,),
        hyperparameters=("q",),
        constants=("logp", "logp_old"),
        masks={"mask": ("logp", "logp_old")},
        batch=("logp", "logp_old", "mask", "off_policy"),
        output_axis=None,
    ),
    Example(
        name="teacher_replace",
        function=lambda key, rewards, scores, lengths: hybrids.teacher_replace(key, rewards, scores, lengths, k=1),
        arguments={
            "key": jax.random.key(5), "rewards": jnp.round(GROUPS), "scores": GROUPS[::-1], "lengths": TARGETS[:, :3],
        },
        covers=(hybrids.teacher_replace,),
        batch=("rewards", "scores", "lengths"),
        bad={"whole rewards": ("rewards", TARGETS), "whole scores": ("scores", TARGETS)},
    ),
    Example(
        name="hint_reroll_select",
        function=hybrids.hint_reroll_select,
        arguments={"rewards": GROUPS, "hinted_rewards": GROUPS[::-1], "threshold": jnp.asarray(0.5)},
        covers=(hybrids.hint_reroll_select,),
        hyperparameters=("threshold",),
        batch=("rewards", "hinted_rewards"),
        bad={"whole rewards": ("rewards", TARGETS), "whole hinted rewards": ("hinted_rewards", TARGETS)},
    ),
    Example(
        name="hybrid_prefix_advantage",
        function=hybrids.hybrid_prefix_advantage,
        arguments={"rewards": REWARDS, "prefix_mask": (OFF[:, None] & (jnp.arange(5) < 2)) * 1.0, "mask": MASK},
        covers=(hybrids.hybrid_prefix_advantage,),
        differentiable=("rewards",),
        extremes=("rewards",),
        masks={"mask": ("prefix_mask",)},
    ),
]  # fmt: skip
