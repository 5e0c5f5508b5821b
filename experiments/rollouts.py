"""Groups of sampled answers to prompts, and what they are worth: the data that a policy learns from by reward."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from esscher.core import meshes, reporting, sweeps
from esscher.experiments import language, policies
from esscher.experiments.setups import Setup

__all__ = ["Rollouts", "layout", "place", "replace_failed", "sampler", "unsolved", "verify"]

Verifier = Callable[[str, str], float]


class Rollouts(NamedTuple):
    """Answers in groups; with a leading axis of members in a sweep."""

    prompt: Array  # [P, T0] padded on the left
    prompt_mask: Array  # [P, T0]
    tokens: Array  # [P, G, T]
    mask: Array  # [P, G, T]
    logp: Array  # [P, G, T] of the policy that sampled; 0 for tokens that were given away
    given: Array  # [P, G, T] whether a token was given away


def sampler(setup: Setup, mesh: Mesh, length: int, group: int, hint: int = 0) -> Callable[..., Rollouts]:
    """`(params, key, prompt, mask, answer, *constants) -> Rollouts`, a pure function.

    Args:
      setup: the model.
      mesh: the mesh.
      length: tokens of an answer, at most, with those that are given away.
      group: answers to each prompt, `G`.
      hint: how many tokens of the right answer are given away.
    """
    generate = policies.generator(setup.policy, length - hint, setup.stop, mesh)

    def sample(params: Any, key: Array, prompt: Array, mask: Array, answer: Array, *constants: Any) -> Rollouts:
        shape = (len(prompt), group, hint)
        asked = jnp.concatenate([prompt, answer[:, :hint]], 1), jnp.pad(mask, ((0, 0), (0, hint)), constant_values=True)
        found = generate(key, params, *asked, *constants, n=group)
        join = lambda first, rest: jnp.concatenate([jnp.broadcast_to(first, shape), rest], -1)  # noqa: E731
        given = join(True, jnp.zeros_like(found.mask))
        # Given tokens were certain for the sampler, which saw them: log 1. So the ratio of policies is a probability.
        answers = join(answer[:, None, :hint], found.tokens), join(True, found.mask), join(0.0, found.model_logp)
        return Rollouts(prompt, mask, *answers, given)

    return sample


def verify(setup: Setup, verifier: Verifier, rollouts: Rollouts, wanted: Sequence[str]) -> np.ndarray:
    """Rewards of answers by their texts, `[P, G]` or `[S, P, G]`; process 0 asks the verifier, and tells the others."""
    tokens, mask = meshes.gather((rollouts.tokens, rollouts.mask))
    shape, length = tokens.shape[:-1], tokens.shape[-1]
    if not reporting.writes():
        return meshes.from_first(np.zeros(shape, np.float32))
    texts = language.decode(setup.tokenizer, tokens.reshape(-1, length), mask.reshape(-1, length), setup.stop)
    prompts = np.broadcast_to(np.arange(shape[-2])[:, None], shape).ravel()
    rewards = [verifier(text, wanted[i]) for text, i in zip(texts, prompts, strict=True)]
    return meshes.from_first(np.array(rewards, np.float32).reshape(shape))


def layout(mesh: Mesh, sweep: sweeps.Sweep) -> NamedSharding:
    """How answers and rewards lie on the mesh: members of a sweep, then prompts."""
    return meshes.shardings(mesh, meshes.BATCH, swept=sweep.swept)


def place(rewards: np.ndarray, where: NamedSharding) -> Array:
    """Rewards onto the mesh, next to the answers that they belong to."""
    return jax.make_array_from_callback(rewards.shape, where, rewards.__getitem__)


def unsolved(rewards: Any) -> Any:
    """Which groups hold no reward above 0; one that is NaN is none."""
    return ~(rewards > 0).any(-1)


def replace_failed(rollouts: Rollouts, hinted: Rollouts, rewards: Array) -> Rollouts:
    """Hinted answers to the prompts that no answer without a hint has solved."""
    failed = unsolved(rewards)[..., None, None]
    pick = lambda plain, other: jnp.where(failed, other, plain)  # noqa: E731
    answers = (pick(*pair) for pair in zip(rollouts[2:], hinted[2:], strict=True))
    return Rollouts(rollouts.prompt, rollouts.prompt_mask, *answers)
