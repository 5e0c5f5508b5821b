"""What a language model solves of problems whose answers are known: greedily, in k attempts, and by majority."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from esscher.core import figures, meshes, reporting, sequences
from esscher.experiments import language, policies, verifiers
from esscher.experiments.setups import Setup
from esscher.objectives import voting
from esscher.samplers import decoding

__all__ = ["Solved", "attempts", "exact_match", "report", "solve"]

SHOWN = 8  # problems in the report


class Solved(NamedTuple):
    """Answers to the test problems."""

    examples: list[sequences.Example]
    greedy: list[str]  # one answer to each problem
    sampled: list[list[str]]  # several
    verifier: Callable[[str, str], float] = verifiers.exact  # an answer is right where it gives more than a half

    @property
    def exact_match(self) -> np.ndarray:
        """Whether the greedy answer is right, `[P]`."""
        return np.array([self._right(a, example) for a, example in zip(self.greedy, self.examples, strict=True)])

    @property
    def correct(self) -> np.ndarray:
        """Which samples are right, `[P, N]`."""
        return np.array(
            [[self._right(a, x) for a in answers] for answers, x in zip(self.sampled, self.examples, strict=True)]
        )

    def _right(self, answer: str, example: sequences.Example) -> bool:
        return self.verifier(answer, example.completion) > 0.5


def exact_match(answer: decoding.Generation, tokens: Array, mask: Array) -> Array:
    """Whether a generation is token for token the one wanted, `[B]`: 1 or 0."""
    return jnp.all((answer.mask == mask) & (~mask | (answer.tokens == tokens)), axis=-1).astype(jnp.float32)


def solve(
    setup: Setup,
    trainable: Any,
    mesh: Mesh,
    *,
    key: Array,
    samples: int,
    length: int | None = None,
    verifier: Callable[[str, str], float] = verifiers.exact,
) -> Solved:
    """Answers every problem held out once greedily and `samples` times at temperature 1.

    Answers are as long as the longest that is right, if no `length` is given.
    """
    policy, (prompts, answers) = setup.policy, zip(*setup.test, strict=True)
    placed = meshes.place(sequences.pad_left(prompts), mesh)
    generate = policies.generator(policy, length or max(map(len, answers)), setup.stop, mesh)

    def both(key: Array, trainable: Any, prompt: Array, mask: Array, *constants: Any) -> tuple[Any, Any]:
        greedy = generate(key, trainable, prompt, mask, *constants, choose=decoding.greedy)
        return greedy, generate(key, trainable, prompt, mask, *constants, n=samples)

    greedy, sampled = meshes.gather(jax.jit(both)(key, trainable, *placed, *policy.constants))
    decode = functools.partial(language.decode, setup.tokenizer, stop=setup.stop)
    texts = [decode(*part) for part in zip(sampled.tokens, sampled.mask, strict=True)]
    return Solved(setup.task.test, decode(greedy.tokens, greedy.mask), texts, verifier)


def attempts(solved: Solved) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Budgets `k = 1, 2, 4, ...`, and pass@k and maj@k at each, averaged over the problems."""
    correct = solved.correct
    n = correct.shape[1]
    budgets = np.array([2**i for i in range(n.bit_length()) if 2**i <= n])
    passed = [float(np.mean(voting.pass_at_k(n, jnp.asarray(correct.sum(1)), int(k)))) for k in budgets]
    counts = np.zeros((len(correct), n), np.int32)
    winner = np.full(len(correct), n, np.int32)  # beyond the answers given, where none is right
    for row, (answers, right) in enumerate(zip(solved.sampled, correct, strict=True)):
        ids = np.unique([answer.strip() for answer in answers], return_inverse=True)[1]
        if right.any():
            ids[right] = winner[row] = ids[right][0]  # right in other words is one answer
        counts[row] = np.bincount(ids, minlength=n)
    vote = jax.jit(voting.maj_at_k, static_argnums=2)  # op by op it takes seconds
    majority = [float(np.mean(vote(jnp.asarray(counts), jnp.asarray(winner), int(k)))) for k in budgets]
    return budgets, np.array(passed), np.array(majority)


def report(folder: pathlib.Path, solved: Solved) -> dict[str, str]:
    """The report's sections on what was solved, with their figure."""
    budgets, passed, majority = attempts(solved)
    exact = float(solved.exact_match.mean())
    path = figures.lines(
        folder / "figures" / "attempts.png",
        figures.Panel(
            {"pass@k": (budgets, passed), "maj@k": (budgets, majority)},
            "samples k",
            "problems solved",
            log_x=True,
            references={"greedy": exact},
        ),
    )
    table = reporting.table(["k", "pass@k", "maj@k"], list(zip(budgets.tolist(), passed, majority, strict=True)))
    caption = (
        "Share of held-out problems of which one of k samples is right (pass@k), or the most frequent answer is (maj@k)"
    )
    wrong = np.flatnonzero(~solved.exact_match)[:SHOWN]
    first = [*wrong, *(i for i in range(len(solved.examples)) if i not in wrong)][:SHOWN]
    texts = [(solved.examples[i].prompt, solved.greedy[i], solved.examples[i].completion) for i in first]
    rows = [[_cell(text) for text in row] for row in texts]
    return {
        "Solved": "\n\n".join(
            [
                f"{exact:.1%} of {len(solved.examples)} problems never seen are solved greedily.",
                table,
                reporting.picture(path, folder, caption),
            ]
        ),
        "Answers": "\n\n".join(
            ["The first that are wrong, then others.", reporting.table(["problem", "answer", "wanted"], rows)]
        ),
    }


def _cell(text: str) -> str:
    """A text of any length and characters as one that stands in a table."""
    shown = json.dumps(text, ensure_ascii=False)[1:-1]
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
