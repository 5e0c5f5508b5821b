"""Advantages, importance ratios, links, divergence estimates, and the losses that join them."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.objectives import advantages
from esscher.objectives.policy import kl, links, losses, ratios

LOGP = -jnp.exp(jax.random.normal(jax.random.key(0), (8, 5)))
RATIO, OTHER = 0.4 * jax.random.normal(jax.random.key(1), (2, 8, 5))
ADVANTAGES = jax.random.normal(jax.random.key(2), (8, 5))
MASK = jnp.arange(5) < jnp.array([5, 2, 1, 4, 3, 0, 5, 2])[:, None]
HOLES = jax.random.bernoulli(jax.random.key(3), 0.6, (8, 5))
REWARDS, NEXT, CRITIC = jax.random.normal(jax.random.key(4), (3, 8, 5))
VALUES = jax.random.normal(jax.random.key(5), (8, 6))
DISCOUNTS = jnp.where(jnp.arange(5) < 4, 0.9, 0.0) * jnp.ones((8, 1))
GROUPS = jax.random.normal(jax.random.key(6), (8, 3))
VALID = jnp.arange(3) < jnp.array([3, 2, 1, 3, 0, 3, 2, 3])[:, None]
WHOLE = jnp.ones((8, 5), jnp.int32)
TOKENS = {"logp": LOGP, "logp_old": LOGP - RATIO, "mask": MASK}


def group(center, scale, *, batch=False, **arrays):
    def function(rewards, valid, eps, **arrays):
        return advantages.group_advantage(rewards, center=center, scale=scale, eps=eps, valid=valid, **arrays)

    return Example(
        name=f"group_advantage[{center}, {scale}]",
        function=function,
        arguments={"rewards": GROUPS, "valid": VALID, "eps": jnp.asarray(0.1), **arrays},
        covers=(advantages.group_advantage,),
        hyperparameters=("eps",),
        differentiable=("rewards",),
        masks={"valid": ("rewards", *arrays)},
        batch=("rewards", "valid", *arrays),
        independent=not batch,
        bad={"rewards of one prompt": ("rewards", GROUPS[0])},
    )


def trajectory(function, differentiable, *, name="", hyper=(), masks=None, **arguments):
    hyper = {key: jnp.asarray(value) for key, value in dict(hyper).items()}
    return Example(
        name=function.__name__ + name,
        function=function,
        arguments={**arguments, **hyper},
        covers=(function,),
        hyperparameters=tuple(hyper),
        differentiable=differentiable,
        masks=masks or {},
        batch=tuple(arguments),
    )


def ratio(level):
    return Example(
        name=f"log_ratio[{level}]",
        function=lambda **arguments: ratios.log_ratio(**arguments, level=level),
        arguments=TOKENS,
        covers=(ratios.log_ratio,),
        # Finite differences see what the straight-through value hides.
        differentiable=() if level == "geometric_token" else ("logp",),
        constants=("logp_old",),
        masks={"mask": ("logp", "logp_old")},
        batch=tuple(TOKENS),
        bad={"whole numbers": ("logp", WHOLE), "whole old numbers": ("logp_old", WHOLE)},
    )


def weight(cut):
    return Example(
        name=f"importance_weight[{cut}]",
        function=lambda logp, logp_old, mask, limit: ratios.importance_weight(
            logp, logp_old, mask, cut=cut, limit=limit
        ),
        arguments={**TOKENS, "limit": jnp.asarray(1.1)},
        covers=(ratios.importance_weight,),
        hyperparameters=("limit",),
        constants=("logp", "logp_old"),
        masks={"mask": ("logp", "logp_old")},
        batch=tuple(TOKENS),
        extremes=("logp", "logp_old"),
    )


def link(covered, make, differentiable=(), **hyper):
    hyper = {key: jnp.asarray(value) for key, value in hyper.items()}
    return Example(
        name=covered.__name__,
        function=lambda log_ratio, advantages, **hyper: make(**hyper)(log_ratio, advantages),
        arguments={"log_ratio": RATIO, "advantages": ADVANTAGES, **hyper},
        covers=(covered,),
        hyperparameters=tuple(hyper),
        differentiable=differentiable,
        batch=("log_ratio", "advantages"),
        extremes=(),
        exempt={"errors": "elementwise, within policy_gradient, which checks shapes and types"},
    )


def estimate(kind):
    return Example(
        name=f"kl_estimate[{kind}]",
        function=lambda logp, logp_ref: kl.kl_estimate(logp, logp_ref, kind),
        arguments={"logp": LOGP, "logp_ref": LOGP - RATIO},
        covers=(kl.kl_estimate,),
        differentiable=("logp",),
        constants=("logp_ref",),
        batch=("logp", "logp_ref"),
        extremes=("logp", "logp_ref"),
    )


def policy(name, differentiable=("logp",), arguments=(), **modes):
    return Example(
        name=f"policy_gradient[{name}]",
        function=lambda **arguments: losses.policy_gradient(**arguments, **modes),
        arguments={**TOKENS, "advantages": ADVANTAGES, **dict(arguments)},
        covers=(losses.policy_gradient,),
        differentiable=differentiable,
        constants=("logp_old", "advantages", *dict(arguments)),
        masks={"mask": ("logp", "logp_old", "advantages", *dict(arguments))},
        batch=(*TOKENS, "advantages", *dict(arguments)),
        bad={"whole advantages": ("advantages", WHOLE)},
    )


EXAMPLES = [
    group("mean", "group"),
    group("loo", "none"),
    group("length_weighted", "none", lengths=1 + jnp.arange(24.0).reshape(8, 3)),
    group("none", "batch", batch=True),
    trajectory(
        advantages.discounted_suffix_sum, ("values", "factors"), values=REWARDS, factors=jax.nn.sigmoid(RATIO)
    ),
    trajectory(
        advantages.gae, ("rewards", "values", "lam"), name="[holes]", masks={"mask": ("rewards",)}, hyper={"lam": 0.7},
        rewards=REWARDS, values=VALUES, discounts=DISCOUNTS, mask=HOLES,
    ),
    trajectory(
        advantages.gae, ("rewards", "values", "lam"), hyper={"lam": 0.7},
        rewards=REWARDS, values=VALUES, discounts=DISCOUNTS,
    ),
    trajectory(
        advantages.lambda_returns, ("rewards", "next_values", "discounts", "lam"), hyper={"lam": 0.7},
        rewards=REWARDS, next_values=NEXT, discounts=DISCOUNTS,
    ),
    trajectory(
        advantages.vtrace, ("rewards", "values", "lam"),
        hyper={"lam": 0.7, "rho_max": 1.2, "policy_rho_max": 1.1},
        rewards=REWARDS, values=VALUES, discounts=DISCOUNTS, ratios=jnp.exp(RATIO),
    ),
    trajectory(
        advantages.off_policy_returns, ("rewards", "action_values", "next_values", "traces"),
        rewards=REWARDS, action_values=CRITIC, next_values=NEXT, discounts=DISCOUNTS, traces=jax.nn.sigmoid(RATIO),
    ),
    *map(ratio, ("token", "sequence", "geometric", "geometric_token")),
    *map(weight, ("truncate", "mask", "none")),
    link(links.score_link, lambda: links.score_link, ("log_ratio", "advantages")),
    link(links.importance_link, lambda: links.importance_link, ("log_ratio", "advantages")),
    link(links.ppo_link, links.ppo_link, ("log_ratio", "advantages"), low=0.2, high=0.3, dual=1.4),
    link(links.clipped_weight_link, links.clipped_weight_link, ("advantages",), low=0.8, high=1.2),
    link(
        links.signed_weight_link, lambda low, high: links.signed_weight_link((1.0, high), (low, 1.0)), ("advantages",),
        low=0.7, high=1.2,
    ),
    link(
        links.soft_gate_link, links.soft_gate_link, ("log_ratio", "advantages", "positive"), positive=1.0, negative=1.1
    ),
    link(links.tapered_link, links.tapered_link, ("log_ratio", "advantages", "gamma"), gamma=0.1),
    Example(
        name="link_slope",
        function=lambda log_ratio, advantages, gamma: links.link_slope(
            links.tapered_link(gamma), log_ratio, advantages
        ),
        arguments={"log_ratio": RATIO, "advantages": ADVANTAGES, "gamma": jnp.asarray(0.4)},
        covers=(links.link_slope,),
        hyperparameters=("gamma",),
        differentiable=("log_ratio", "advantages", "gamma"),
        batch=("log_ratio", "advantages"),
        exempt={"errors": "elementwise, within policy_gradient, which checks shapes and types"},
    ),
    *map(estimate, ("k1", "abs", "k2", "k3")),
    Example(
        name="straight_through_kl",
        function=kl.straight_through_kl,
        arguments={"logp": LOGP, "logp_ref": LOGP - RATIO},
        covers=(kl.straight_through_kl,),
        constants=("logp_ref",),
        batch=("logp", "logp_ref"),
        extremes=("logp", "logp_ref"),
    ),
    Example(
        name="kl_in_reward",
        function=kl.kl_in_reward,
        arguments={"rewards": REWARDS, "logp": LOGP, "logp_ref": LOGP - RATIO, "beta": jnp.asarray(0.2)},
        covers=(kl.kl_in_reward,),
        hyperparameters=("beta",),
        constants=("rewards", "logp", "logp_ref"),
        batch=("rewards", "logp", "logp_ref"),
        extremes=("rewards", "logp", "logp_ref"),
    ),
    policy("ppo"),
    policy("importance, weighted", arguments={"weight": jnp.exp(OTHER)}, link=links.importance_link, level="sequence"),
    policy("score", (), link=links.clipped_weight_link(0.8, 1.2), form="score"),  # its slope is held fixed
    Example(
        name="value_loss",
        function=losses.value_loss,
        arguments={
            "values": VALUES[:, 1:], "values_old": VALUES[:, 1:] - RATIO, "returns": REWARDS, "mask": MASK,
            "clip": jnp.asarray(0.3),
        },
        covers=(losses.value_loss,),
        hyperparameters=("clip",),
        differentiable=("values", "clip"),
        constants=("values_old", "returns"),
        masks={"mask": ("values", "values_old", "returns")},
        batch=("values", "values_old", "returns", "mask"),
    ),
]  # fmt: skip
