"""Teach a language model to calculate, or to complete prompts of your own, and measure what it solves.

Makes problems like `37+58=`, trains a small decoder on them by supervised fine-tuning with packed sequences, and solves
problems that it has not seen: greedily, and with many samples each (pass@k, maj@k). With --model PATH --data FILE.jsonl
the same script fine-tunes a Hugging Face model, whole or by --lora RANK, on a laptop or on a pod.

--stage dpo goes on from such a model (--model runs/arithmetic/NAME/model) with pairs of its own answers, one right and
one wrong, or with the pairs in a file, by DPO or any other --objective. --stage rl goes on by sampling answers, having
them verified, and learning from the rewards, by GRPO or any other. Several values for a --hyper flag or for one of the
--options span a grid that trains as one program. The same command resumes a run that was stopped.
"""

import dataclasses
import pathlib
from typing import Literal

from esscher.core import meshes
from esscher.core.errors import UsageError
from esscher.experiments import cli, preference, reinforcement, runs, supervised

__all__ = ["Config", "Hyper", "main", "settled"]

STAGES = {"sft": supervised.run, "dpo": preference.run, "rl": reinforcement.run}
DEFAULTS = {  # those that depend on the stage
    "sft": {"steps": 1000, "batch_size": 16, "objective": None},
    "dpo": {"steps": 200, "batch_size": 16, "objective": "dpo"},
    "rl": {"steps": 800, "batch_size": 64, "objective": "grpo"},
}
RATES = {"sft": 2e-3, "dpo": 2e-5, "rl": 3e-4}
RL = ("advantage", "advantage_options", "reduce", "verifier", "group", "epochs", "hint", "tokens", "reference")
POSITIVE = ("width", "depth", "length", "problems", "samples", "prompts", "group", "epochs", "tokens")
BELONGS = dict.fromkeys(("prompts", "judge", "flip"), ("dpo",)) | dict.fromkeys(RL, ("rl",))
BELONGS |= dict.fromkeys(("objective", "options"), ("dpo", "rl"))
NEW = dict.fromkeys(("width", "depth"), "model") | dict.fromkeys(("digits", "operations", "base"), "data")


@dataclasses.dataclass(frozen=True)
class Hyper(runs.Hyper):
    """Float hyperparameters. Each takes one value, or several, which span a grid trained as one vmapped program."""

    lr: tuple[float, ...] = ()
    """Peak learning rate of AdamW, after 5% of the steps, then a cosine to zero; by default 2e-3; dpo 2e-5, rl 3e-4."""
    keep: tuple[float, ...] = (1.0, 0.5)
    """Shares of the pairs that dpo learns from, those first whose responses the model holds apart best (CHES)."""


@dataclasses.dataclass(frozen=True)
class Config(runs.Settings):
    """Settings of the arithmetic experiment."""

    stage: Literal["sft", "dpo", "rl"] = "sft"
    """Supervised fine-tuning, or learning from pairs, one of them better, or from rewards of sampled answers."""
    steps: int | None = None
    """Training steps; by default 1000; dpo 200, rl 800."""
    batch_size: int | None = None
    """Rows of packed sequences, or pairs, or problems, per step, over all devices; by default 16, rl 64."""
    save_every: int = 200
    """Steps between checkpoints, a multiple of 20."""
    digits: int = 2
    """Digits of the operands, at most."""
    operations: str = "+"
    """Which of + - * the problems use, e.g. +-."""
    base: int = 10
    """Base of the numbers."""
    data: pathlib.Path | None = None
    """A jsonl file in place of arithmetic, whose lines are objects with prompt and completion, for dpo with prompt,
    chosen and rejected, for rl with prompt and answer, all of them text; needs --model."""
    model: str | None = None
    """A folder with a Hugging Face model and its tokenizer, or a name on the hub; a new small model by default."""
    lora: int = 0
    """Rank of low-rank adapters to train on --model in place of all its parameters."""
    alpha: float = 16.0
    """Strength of the adapters: they add alpha / rank times their product."""
    width: int = 128
    """Width of a new model; heads are 32 wide."""
    depth: int = 3
    """Layers of a new model."""
    length: int = 128
    """Tokens in a row of packed sequences, and in a prompt with its completion."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the arithmetic, and of the weights under an adapter; what is trained stays in float32."""
    remat: bool = False
    """Save memory: compute layers again for the gradient."""
    average: bool = True
    """Keep a moving average of the parameters, and judge that; it takes the memory of another copy."""
    problems: int = 256
    """Problems held out, which judge the model."""
    samples: int = 16
    """Samples of each of them for pass@k and maj@k; dpo finds its pairs among as many."""
    objective: str | None = None
    """Loss of dpo and rl, by default dpo and grpo: a function of esscher.objectives.preference or .policy, or the
    dotted path of another, e.g. mine.my_loss. Its arguments are filled in by their names; one that is not known is
    answered with those that are."""
    options: tuple[str, ...] = ()
    """Further arguments of the objective, e.g. beta=0.05,0.1 normalize=true; several numbers make a grid."""
    prompts: int = 4096
    """Problems that dpo samples answers to; each with right and wrong ones gives a pair."""
    judge: Literal["verifier", "confidence"] = "verifier"
    """Which right and which wrong answer make a pair: any, or those with the largest gap in the model's confidence."""
    flip: float = 0.0
    """Probability with which chosen and rejected are exchanged, to see what noisy labels do."""
    group: int = 8
    """Answers that rl samples to each problem of a step."""
    epochs: int = 2
    """Updates that rl makes on the answers of a step."""
    tokens: int | None = None
    """Tokens of an answer of rl, at most; by default as many as the longest right one has."""
    verifier: str = "exact"
    """What an answer is worth: exact or last_number, or the dotted path of a function (answer, wanted) -> reward."""
    advantage: str = "group_advantage"
    """What rl compares a reward with, if the objective asks for advantages: a function of
    esscher.objectives.advantages, or the dotted path of another, of rewards [P, G]."""
    advantage_options: tuple[str, ...] = ()
    """Its further arguments, e.g. center=loo scale=none."""
    reduce: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"] = "token-mean"
    """How losses of tokens become a number, if the objective leaves that open."""
    reference: bool = False
    """Give the objective the reference's log-probabilities too; costs another forward pass."""
    hint: int = 0
    """Tokens of the right answer that are given away to problems of a step which no answer has solved."""
    hyper: Hyper = dataclasses.field(default_factory=Hyper)


def settled(config: Config) -> Config:
    """With the defaults that depend on the stage, once the flags are seen to go together.

    Raises:
      UsageError: they do not.
    """
    given = {name for name in vars(config) if getattr(config, name) != getattr(Config(), name)}
    for name, stages in BELONGS.items():
        if config.stage not in stages and name in given:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --stage {' or '.join(stages)}")
    for name in ("prompts", "judge"):
        if {name, "data"} <= given:
            raise UsageError(f"--{name} is for answers that are sampled: the pairs of --data are taken as they are")
    for name, other in NEW.items():
        if {name, other} <= given:
            raise UsageError(f"--{name} says nothing of what is read from --{other}: leave it out")
    if config.stage != "dpo" and config.hyper.keep != Hyper().keep:
        raise UsageError("--hyper.keep belongs to --stage dpo")
    if config.stage != "sft" and config.model is None:
        raise UsageError(
            f"--stage {config.stage} needs --model, e.g. runs/arithmetic/default/model once the command without "
            "--stage has made it"
        )
    if config.lora < 0:
        raise UsageError(f"--lora must be at least 0, got {config.lora}")
    if not 0 <= config.flip <= 1:
        raise UsageError(f"--flip must be between 0 and 1, got {config.flip}")
    if not all(0 < share <= 1 for share in config.hyper.keep):
        raise UsageError(f"--hyper.keep must be above 0 and at most 1, got {config.hyper.keep}")
    keep = config.hyper.keep if config.stage == "dpo" else (1.0,)
    hyper = dataclasses.replace(config.hyper, lr=config.hyper.lr or (RATES[config.stage],), keep=keep)
    defaults = {name: value for name, value in DEFAULTS[config.stage].items() if getattr(config, name) is None}
    return dataclasses.replace(config, hyper=hyper, **defaults)


def main(config: Config) -> None:
    """Trains or resumes, then evaluates and writes the report."""
    config = settled(config)
    mesh = runs.start(config, positive=POSITIVE)
    shards = meshes.row_shards(mesh)
    if config.problems % shards:
        raise UsageError(f"--problems {config.problems} does not split over {shards} devices: take a multiple")
    STAGES[config.stage](config, mesh)


if __name__ == "__main__":
    cli.run(main, Config, prog="python -m esscher.experiments.arithmetic", description=__doc__)
