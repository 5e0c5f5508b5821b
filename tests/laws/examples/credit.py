"""Credit of tokens, steps and turns."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.objectives import credit

VALUES = jax.random.normal(jax.random.key(0), (8, 5))
MASK = jnp.arange(5) < jnp.array([5, 2, 1, 4, 3, 5, 2, 3])[:, None]
ENTROPY = jnp.exp(VALUES[::-1])
TOKENS = jax.random.randint(jax.random.key(1), (8, 4, 3), 0, 2)
TOKEN_MASK = jnp.arange(3) < 1 + jax.random.randint(jax.random.key(2), (8, 4), 0, 3)[..., None]
REWARDS = jax.random.normal(jax.random.key(3), (8, 4))
GROUPS = jnp.array([2, 0, -1, 2, 1, 0, 2, 0])
VALID = jnp.arange(4) < jnp.array([4, 3, 2, 4, 4, 3, 4, 4])[:, None]
TREE = {"tokens": TOKENS, "mask": TOKEN_MASK, "rewards": REWARDS, "valid": VALID}
EPS = jnp.asarray(0.1)


def tree(function, call, **hyper):
    return Example(
        name=function.__name__,
        function=call,
        arguments={**TREE, **hyper},
        covers=(function,),
        hyperparameters=tuple(hyper),
        differentiable=("rewards", *hyper),
        masks={"mask": ("tokens",), "valid": ("rewards",)},
        batch=tuple(TREE),
        bad={"tokens that are not integers": ("tokens", TOKENS / 2)},
    )


def of_steps(function, **hyper):
    return Example(
        name=function.__name__,
        function=function,
        arguments={"step_rewards": VALUES, "step_mask": MASK, **hyper},
        covers=(function,),
        hyperparameters=tuple(hyper),
        differentiable=("step_rewards", *hyper),
        masks={"step_mask": ("step_rewards",)},
        batch=("step_rewards", "step_mask"),
    )


def segmented(name, *, masks=None, **modes):
    """With a group of three, of one, and of two, and samples of none."""
    return Example(
        name=f"segment_group_advantage[{name}]",
        function=lambda rewards, groups, lengths, eps: credit.segment_group_advantage(
            rewards, groups, 3, eps=eps, **modes, **({"lengths": lengths} if name == "length_weighted" else {})
        ),
        arguments={"rewards": REWARDS[:, 0], "groups": GROUPS, "lengths": jnp.arange(2.0, 10.0), "eps": EPS},
        covers=(credit.segment_group_advantage,),
        hyperparameters=("eps",),
        differentiable=("rewards", "eps"),
        masks={"groups": ("rewards", "lengths")},
        batch=("rewards", "groups", "lengths") if name == "length_weighted" else ("rewards", "groups"),
        independent=False,
    )


EXAMPLES = [
    segmented("group"),
    segmented("length_weighted", center="length_weighted", scale="batch"),
    Example(
        name="common_prefix",
        function=credit.common_prefix,
        arguments={"tokens": TOKENS, "mask": TOKEN_MASK},
        covers=(credit.common_prefix,),
        masks={"mask": ("tokens",)},
        batch=("tokens", "mask"),
        bad={"tokens that are not integers": ("tokens", TOKENS / 2)},
    ),
    tree(
        credit.prefix_tree_values,
        lambda tokens, mask, rewards, valid: credit.prefix_tree_values(tokens, mask, rewards, valid=valid),
    ),
    tree(
        credit.tempo_advantage,
        lambda tokens, mask, rewards, valid, eps: credit.tempo_advantage(tokens, mask, rewards, valid=valid, eps=eps),
        eps=EPS,
    ),
    Example(
        name="entropy_modulated_advantage",
        function=credit.entropy_modulated_advantage,
        arguments={
            "advantages": REWARDS[:, 0], "step_entropy": ENTROPY, "step_mask": MASK, "k": jnp.asarray(0.9),
            "k_future": jnp.asarray(1.2), "zeta": jnp.asarray(0.1), "eps": EPS,
        },
        covers=(credit.entropy_modulated_advantage,),
        hyperparameters=("k", "k_future", "zeta", "eps"),
        differentiable=("advantages", "k", "k_future", "zeta", "eps"),
        constants=("step_entropy",),
        masks={"step_mask": ("step_entropy",)},
        batch=("advantages", "step_entropy", "step_mask"),
        independent=False,
    ),
    Example(
        name="mc_step_advantage",
        function=credit.mc_step_advantage,
        arguments={"step_values": VALUES, "step_mask": MASK[:, 1:]},
        covers=(credit.mc_step_advantage,),
        differentiable=("step_values",),
        batch=("step_values", "step_mask"),
    ),
    Example(
        name="mc_step_advantage[joined]",
        function=lambda start, values, step_mask: credit.mc_step_advantage(
            jnp.concatenate([start, values], -1), step_mask
        ),
        arguments={"start": VALUES[:, :1], "values": VALUES[::-1], "step_mask": MASK},
        covers=(credit.mc_step_advantage,),
        differentiable=("start", "values"),
        masks={"step_mask": ("values",)},
        batch=("start", "values", "step_mask"),
        exempt={"errors": "the example joins two arguments, so what is refused has another name"},
    ),
    of_steps(credit.clip_process_reward, eta=jnp.asarray(0.2)),
    of_steps(credit.delta_process_reward),
    Example(
        name="self_correction_rewards",
        function=credit.self_correction_rewards,
        arguments={"first": VALUES, "second": VALUES[::-1], "alpha": jnp.asarray(3.0)},
        covers=(credit.self_correction_rewards,),
        hyperparameters=("alpha",),
        differentiable=("first", "second", "alpha"),
        batch=("first", "second"),
    ),
]  # fmt: skip
