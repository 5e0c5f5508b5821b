"""The named policy methods: losses on advantages that are given, and whole methods from rewards of groups."""

import inspect

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.objectives.policy import group_methods, methods

LOGP = -jnp.exp(jax.random.normal(jax.random.key(0), (8, 2, 5)))
RATIO, OTHER = 0.3 * jax.random.normal(jax.random.key(1), (2, 8, 2, 5))
LENGTHS = jnp.array([[5, 2], [1, 4], [3, 0], [5, 2], [3, 3], [2, 5], [4, 1], [5, 5]])
MASK = jnp.arange(5) < LENGTHS[:, :, None]
REWARDS = jax.random.uniform(jax.random.key(2), (8, 2), minval=0.1, maxval=0.9)
ROWS = {"logp": LOGP, "logp_old": LOGP - RATIO, "logp_ref": LOGP - OTHER, "mask": MASK}
ADVANTAGES = jax.random.normal(jax.random.key(3), (8, 5))


def given(function, takes=("logp", "logp_old", "advantages", "mask"), example="", *, flowing=True, **settings):
    """Of a loss of each token, on the first answer to each prompt."""
    arrays = {name: value[:, 0] for name, value in ROWS.items()} | {"advantages": ADVANTAGES}
    hyper = {name: jnp.asarray(value) for name, value in settings.pop("hyper", {}).items()}
    settings = {"function": function, "batch": takes, **settings}
    return Example(
        name=function.__name__ + example if "name" not in settings else settings.pop("name"),
        arguments={**{name: arrays[name] for name in takes}, **hyper, **settings.pop("more", {})},
        covers=(settings.pop("covers", function),),
        hyperparameters=tuple(hyper),
        differentiable=("logp",) if flowing else (),
        constants=tuple(name for name in takes if name in ("logp_old", "logp_ref", "advantages")),
        masks={"mask": tuple(name for name in takes if name != "mask")},
        **settings,
    )


def grouped(function, example="", *, flowing=True, modes=(), more=(), ref=False, **hyper):
    """Of a method on groups of two answers, whose rows are `[P, G, T]` here, so that prompts are the batch."""
    names = [name for name in inspect.signature(function).parameters if name in ROWS]
    rows = {name: ROWS[name] for name in names if ref or name != "logp_ref"}
    hyper, more = {name: jnp.asarray(value) for name, value in hyper.items()}, dict(more)

    def flat(rewards, **arguments):
        merged = {name: x.reshape(-1, *x.shape[2:]) if name in rows else x for name, x in arguments.items()}
        return function(rewards, **merged, **dict(modes))

    return Example(
        name=function.__name__ + example,
        function=flat,
        arguments={"rewards": REWARDS, **more, **rows, **hyper},
        covers=(function,),
        hyperparameters=tuple(hyper),
        differentiable=("logp",) if flowing else (),
        constants=("rewards", *more, *(name for name in rows if name not in ("logp", "mask"))),
        masks={"mask": tuple(name for name in rows if name != "mask")},
        batch=("rewards", *more, *rows),
        output_axis=None,
        independent=False,
    )


EXAMPLES = [
    given(methods.reinforce, ("logp", "advantages", "mask")),
    given(methods.ppo, hyper={"low": 0.2, "high": 0.25, "dual": 1.4}),
    given(methods.sapo, hyper={"positive": 1.0, "negative": 1.05}),
    # The gradient of a weight that is held fixed is not what finite differences see.
    given(methods.cispo, flowing=False, hyper={"low": 0.8, "high": 1.28}),
    given(methods.topr, flowing=False),
    given(
        lambda k, **arguments: methods.vespo(**arguments, positive=(k, 3.0)),
        name="vespo", covers=methods.vespo, flowing=False, hyper={"k": 2.0},
    ),
    given(methods.gspo, flowing=False, hyper={"low": 0.03, "high": 0.04}),
    given(methods.gmpo, hyper={"low": 0.2, "high": 0.2}),
    given(
        lambda **arguments: methods.clip_cov(**arguments, bounds=(0.01, 5.0)),
        name="clip_cov", covers=methods.clip_cov, more={"key": jax.random.key(4)}, independent=False,
        hyper={"low": 0.2, "high": 0.25, "fraction": 0.1},
    ),
    given(methods.kl_cov, independent=False, hyper={"fraction": 0.1, "coefficient": 0.7}),
    given(methods.kl_penalty, ("logp", "logp_ref", "mask"), hyper={"beta": 0.3}),
    given(methods.positive_nll, ("logp", "advantages", "mask"), output_axis=None, independent=False),
    Example(
        name="signed_advantage",
        function=methods.signed_advantage,
        arguments={"correct": jnp.arange(8) % 3 == 0, "positive": jnp.asarray(0.1), "negative": jnp.asarray(1.0)},
        covers=(methods.signed_advantage,),
        hyperparameters=("positive", "negative"),
        differentiable=("positive", "negative"),
        batch=("correct",),
    ),
    Example(
        name="length_adaptive_lambda",
        function=methods.length_adaptive_lambda,
        arguments={"mask": MASK[:, 0], "alpha": jnp.asarray(0.7)},
        covers=(methods.length_adaptive_lambda,),
        hyperparameters=("alpha",),
        differentiable=("alpha",),
        batch=("mask",),
    ),
    Example(
        name="overlong_penalty",
        function=group_methods.overlong_penalty,
        arguments={
            "lengths": LENGTHS, "max_length": jnp.asarray(5.5), "buffer": jnp.asarray(3.2),
            "coefficient": jnp.asarray(0.5),
        },
        covers=(group_methods.overlong_penalty,),
        hyperparameters=("max_length", "buffer", "coefficient"),
        differentiable=("max_length", "buffer", "coefficient"),
        batch=("lengths",),
    ),
    Example(
        name="keep_mixed_groups",
        function=group_methods.keep_mixed_groups,
        arguments={"rewards": jnp.round(REWARDS)},
        covers=(group_methods.keep_mixed_groups,),
        batch=("rewards",),
        bad={"whole rewards": ("rewards", LENGTHS), "rewards of one prompt": ("rewards", REWARDS[0])},
    ),
    Example(
        name="beta_normalized_advantage",
        function=group_methods.beta_normalized_advantage,
        arguments={"rewards": REWARDS},
        covers=(group_methods.beta_normalized_advantage,),
        constants=("rewards",),
        batch=("rewards",),
        extremes=("rewards",),
        independent=False,
        bad={"rewards of one prompt": ("rewards", REWARDS[0])},
    ),
    Example(
        name="beta_normalized_advantage[shape]",
        function=lambda rewards, alpha, beta: group_methods.beta_normalized_advantage(rewards, shape=(alpha, beta)),
        arguments={"rewards": REWARDS, "alpha": jnp.asarray(1.5), "beta": jnp.asarray(1.2)},
        covers=(group_methods.beta_normalized_advantage,),
        hyperparameters=("alpha", "beta"),
        differentiable=("alpha", "beta"),
        constants=("rewards",),
        batch=("rewards",),
    ),
    grouped(group_methods.opo),
    grouped(group_methods.remax, more={"greedy_rewards": REWARDS[::-1, 0]}),
    grouped(group_methods.gpg),
    grouped(group_methods.grpo, low=0.2, high=0.25, eps=0.1),
    grouped(group_methods.grpo, "[kl]", ref=True, modes={"how": "group-mean-token-mean", "kl": "k2"}, beta=0.3),
    grouped(group_methods.dr_grpo, length=5.0, low=0.2, high=0.25),
    grouped(group_methods.dapo, low=0.2, high=0.28, eps=0.1),
    grouped(group_methods.lite_ppo, low=0.2, high=0.25, eps=0.1),
    grouped(group_methods.bnpo, low=0.2, high=0.25),
    grouped(group_methods.rloo, ref=True, low=0.2, high=0.25, beta=0.05),
    grouped(group_methods.reinforce_plus_plus, ref=True, low=0.2, high=0.25, gamma=0.9, beta=0.3),
    grouped(group_methods.reinforce_plus_plus_baseline, ref=True, low=0.2, high=0.25, beta=0.3),
]  # fmt: skip
