"""Token log-probabilities, masked reductions and segments."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.core import tokens

HIDDEN, OTHER = jax.random.normal(jax.random.key(0), (2, 8, 2, 4))
UNEMBEDDING, OTHER_UNEMBEDDING = jax.random.normal(jax.random.key(1), (2, 4, 37))
TARGETS = jax.random.randint(jax.random.key(2), (8, 2), 0, 37)
CONSTANTS = {"temperature": jnp.asarray(0.8), "softcap": jnp.asarray(3.0)}

VALUES = jax.random.normal(jax.random.key(3), (8, 6))
MASK = jnp.arange(6) < jnp.array([6, 2, 1, 5, 3, 0, 4, 6])[:, None]
SEGMENTS = jnp.where(MASK, jnp.cumsum(jax.random.bernoulli(jax.random.key(4), 0.6, (8, 6)), -1), 0) - 1
STEPS = jax.random.normal(jax.random.key(5), (8, 3))
KEPT = {"values": VALUES, "mask": MASK}


def linear(function, arguments, batch, constants=CONSTANTS):
    return Example(
        name=function.__name__,
        function=lambda **arguments: function(**arguments, chunk=16),
        arguments={**arguments, **constants},
        covers=(function,),
        hyperparameters=tuple(constants),
        differentiable=tuple(name for name in arguments if name != "targets"),
        constants=tuple(constants),
        batch=batch,
        bad={"an unembedding for other hidden states": ("unembedding", UNEMBEDDING[:3])},
    )


def of_targets(function):
    arguments = {"hidden": HIDDEN, "unembedding": UNEMBEDDING, "targets": TARGETS}
    return linear(function, arguments, ("hidden", "targets"))


def masked(covered, **changes):
    settings = {
        "name": covered.__name__, "function": covered, "arguments": KEPT, "differentiable": ("values",),
        "masks": {"mask": ("values",)}, "batch": ("values", "mask"),
    }  # fmt: skip
    return Example(covers=(covered,), **{**settings, **changes})


def aggregated(how, function=None, **changes):
    function = function or (lambda values, mask: tokens.aggregate(values, mask, how))
    return masked(tokens.aggregate, name=f"aggregate[{how}]", function=function, output_axis=None, **changes)


def segmented(function):
    return Example(
        name=function.__name__,
        function=lambda values, segments: function(values, segments, 3),
        arguments={"values": VALUES, "segments": SEGMENTS},
        covers=(function,),
        differentiable=("values",),
        masks={"segments": ("values",)},
        batch=("values", "segments"),
    )


def of_segments(function, **arguments):
    return Example(
        name=function.__name__,
        function=function,
        arguments={**arguments, "segments": SEGMENTS},
        covers=(function,),
        differentiable=tuple(arguments),
        batch=(*arguments, "segments"),
    )


EXAMPLES = [
    of_targets(tokens.linear_token_logps),
    of_targets(tokens.linear_token_statistics),
    linear(
        tokens.linear_token_kl,
        {
            "hidden": HIDDEN, "unembedding": UNEMBEDDING,
            "other_hidden": OTHER, "other_unembedding": OTHER_UNEMBEDDING,
        },
        ("hidden", "other_hidden"),
        {**CONSTANTS, "other_softcap": jnp.asarray(2.0)},
    ),
    Example(
        name="token_logps",
        function=tokens.token_logps,
        arguments={"logits": HIDDEN @ UNEMBEDDING, "targets": TARGETS},
        covers=(tokens.token_logps,),
        differentiable=("logits",),
        batch=("logits", "targets"),
        bad={"targets that are not integers": ("targets", TARGETS + 0.5)},
    ),
    Example(
        name="token_entropy",
        function=tokens.token_entropy,
        arguments={"logits": HIDDEN @ UNEMBEDDING},
        covers=(tokens.token_entropy,),
        differentiable=("logits",),
        batch=("logits",),
    ),
    Example(
        name="sequence_logp",
        function=lambda logp, mask: tokens.sequence_logp(logp, mask, normalize=True),
        arguments={"logp": VALUES, "mask": MASK},
        covers=(tokens.sequence_logp,),
        differentiable=("logp",),
        masks={"mask": ("logp",)},
        batch=("logp", "mask"),
    ),
    Example(
        name="shared_prefix_sequence_logp",
        function=tokens.shared_prefix_sequence_logp,
        arguments={"logp": VALUES, "mask": MASK, "shared_length": jnp.arange(8) // 2, "alpha": jnp.asarray(0.4)},
        covers=(tokens.shared_prefix_sequence_logp,),
        hyperparameters=("alpha",),
        differentiable=("logp", "alpha"),
        masks={"mask": ("logp",)},
        batch=("logp", "mask", "shared_length"),
    ),
    masked(
        tokens.masked_mean, function=lambda values, mask: tokens.masked_mean(values, mask, axis=0), output_axis=None
    ),
    masked(tokens.masked_var, function=lambda values, mask: tokens.masked_var(values, mask, axis=-1, ddof=1)),
    masked(
        tokens.masked_whiten,
        function=lambda values, mask, eps: tokens.masked_whiten(values, mask, eps=eps),
        arguments={**KEPT, "eps": jnp.asarray(0.1)},
        hyperparameters=("eps",),
        differentiable=("values", "eps"),
        independent=False,
    ),
    masked(
        tokens.masked_quantile,
        arguments={**KEPT, "q": jnp.asarray(0.3)},
        hyperparameters=("q",),
        differentiable=("values", "q"),
    ),
    masked(tokens.masked_rank, differentiable=()),
    aggregated("token-mean"),
    aggregated("seq-mean-token-mean"),
    aggregated("seq-mean-token-sum"),
    aggregated(
        "group-mean-token-mean",
        lambda values, mask: tokens.aggregate(values, mask, "group-mean-token-mean", group_size=2),
        arguments={name: jnp.concatenate([value, value[::-1]]) for name, value in KEPT.items()},
        batch=(),
    ),
    aggregated(
        "constant",
        lambda values, mask, length: tokens.aggregate(values, mask, "constant", length=length),
        arguments={**KEPT, "length": jnp.asarray(7.0)},
        hyperparameters=("length",),
    ),
    segmented(tokens.segment_sum),
    segmented(tokens.segment_mean),
    of_segments(tokens.segment_ends),
    of_segments(tokens.segment_positions),
    of_segments(tokens.segment_broadcast, steps=STEPS),
    of_segments(tokens.segment_scatter, steps=STEPS),
]  # fmt: skip
