"""Votes over answers, and the chance that k samples hold or elect the right one."""

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.objectives import voting

ANSWERS = jax.random.randint(jax.random.key(0), (8, 5), 0, 3)
WEIGHTS = jax.random.uniform(jax.random.key(1), (8, 5), minval=0.1)
VALID = jax.random.bernoulli(jax.random.key(2), 0.7, (8, 5))
COUNTS = jax.random.randint(jax.random.key(3), (8, 4), 1, 6)
CORRECT = jnp.arange(8) % 5  # 4: one that nobody gave


EXAMPLES = [
    Example(
        name="votes",
        function=lambda answers, weights, valid: (
            voting.weighted_majority_vote(answers, weights, valid),
            voting.majority_vote(answers, valid),
        ),
        arguments={"answers": ANSWERS, "weights": WEIGHTS, "valid": VALID},
        covers=(voting.majority_vote, voting.weighted_majority_vote),
        masks={"valid": ("answers", "weights")},
        batch=("answers", "weights", "valid"),
        extremes=("weights",),
        bad={"answers that are not integers": ("answers", WEIGHTS), "whole weights": ("weights", ANSWERS)},
    ),
    Example(
        name="pass_at_k",
        function=voting.pass_at_k,
        arguments={"n": COUNTS.sum(-1), "correct": COUNTS[:, 0], "k": jnp.asarray(3)},
        covers=(voting.pass_at_k,),
        batch=("n", "correct"),
        bad={"half a sample": ("k", jnp.asarray(2.5))},
    ),
    Example(
        name="maj_at_k",
        function=lambda counts, correct: voting.maj_at_k(counts, correct, 3),
        arguments={"counts": COUNTS, "correct": CORRECT},
        covers=(voting.maj_at_k,),
        batch=("counts", "correct"),
        bad={"half a vote": ("counts", COUNTS / 2)},
    ),
]
