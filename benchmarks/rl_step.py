"""Time of one whole GRPO step against TRL's `GRPOTrainer` with transformers' generation, for the same small Llama.

A step samples answers to prompts, verifies them by the same Python function of token ids, and updates the parameters by
AdamW; in float32, with a KL coefficient of 0, one update on each step's answers, no gradient checkpointing. Every
answer has all its tokens: the end-of-text token is forbidden on both sides (`min_new_tokens` there, `token_mask` here).
The sides run in processes of their own, in turns; torch gets its better number of threads.

- Esscher: one compiled program samples (prompts are read once for all their answers), tokens go to the verifier and
  rewards come back, and a second program, which owns the parameters and the optimizer's state, updates them. Its ratio
  of policies is to the log-probabilities found while sampling. Compilation is printed and not counted.
- TRL: `GRPOTrainer.training_step`, which tokenises, samples, decodes, verifies and differentiates, then the optimizer's
  own step. Its metrics and entropies are part of that; its data loader, logging, callbacks and checkpoints are not
  run. Its ratio of policies is to its own log-probabilities, and so exactly 1.

The share of the peak is (matrix products that the step asks for) / (seconds x peak): 2 operations for each parameter of
a matrix and each token forward and 4 backward, attention to the tokens that are seen included, every prompt read once
for sampling, logits where one is needed; on both sides the same number. The peak is that of a product of float32
matrices of 4096 x 4096 in Esscher's process, at its best. Figures are medians, ratios those of the medians.

Compared before the first step: a greedy continuation, and loss and gradients for given answers whose ratios spread
around 1, so that some are clipped.

    python benchmarks/rl_step.py [--rounds 5] [--prompts 8] [--group 16] [--prompt 16] [--new 64]
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from _sides import measure

VOCABULARY, WIDTH, DEPTH, HEADS, KV_HEADS, MLP = 1024, 256, 4, 8, 4, 704
PAD, END, RATE, SQUARE = 0, 1, 1e-5, 4096
EPS = 1e-4  # TRL's, added to the spread of a group's rewards
OURS = "Esscher"


def save_model(folder: str) -> None:
    """Writes a Llama with random weights, and a tokenizer whose words are the numbers of its tokens."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, intermediate_size=MLP, pad_token_id=PAD, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token=str(PAD)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=str(PAD), eos_token=str(END))
    fast.save_pretrained(folder)


def verify(tokens: list[int]) -> float:
    """Share of even tokens."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def data(options: argparse.Namespace) -> types.SimpleNamespace:
    """Prompts, and answers with log-probabilities of a policy that is not the model; the same on all sides."""
    rng = np.random.default_rng(0)
    answers = options.prompts * options.group, options.new
    logp = -np.log(VOCABULARY) + rng.normal(0, 0.3, answers)
    return types.SimpleNamespace(
        prompts=rng.integers(2, VOCABULARY, (options.prompts, options.prompt), np.int32),
        answers=rng.integers(2, VOCABULARY, answers, np.int32),
        logp=logp.astype(np.float32),
    )


# --- the sides --------------------------------------------------------------------------------------------------------


def programs(config: Any, options: argparse.Namespace) -> tuple[Callable, Callable, Callable]:
    """Esscher's sampling, its loss, and its update, to be compiled."""
    import jax
    import jax.numpy as jnp
    import optax

    from esscher.core import tokens
    from esscher.models import decoder
    from esscher.models.language_model import language_model
    from esscher.objectives import policy
    from esscher.samplers import decoding

    words = decoding.token_mask(jnp.arange(VOCABULARY) != END)

    def sample(params, key, prompts, **how):
        model = language_model(params, config, prompts.shape[1] + options.new)
        return decoding.generate(key, model, prompts, jnp.ones_like(prompts), options.new, transforms=[words], **how)

    def loss(params, prompts, answers, rewards, logp_old):
        answers, logp_old = (each.reshape(-1, options.new) for each in (answers, logp_old))
        rows = jnp.concatenate([jnp.repeat(prompts, options.group, axis=0), answers], axis=1)
        states = decoder.hidden(params, config, rows[:, :-1])[:, prompts.shape[1] - 1 :]
        logp = tokens.linear_token_logps(states, decoder.unembedding(params), answers)
        numerator, denominator = policy.grpo(rewards, logp, logp_old, jnp.ones_like(logp, bool), eps=EPS)
        return numerator / denominator

    def update(state, *batch):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, moments = optax.adamw(RATE, weight_decay=0.0).update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return sample, loss, update


def ours(folder: str, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """A step, seconds of its parts until now, a large product of matrices, and what is compared."""
    import jax
    import jax.numpy as jnp
    import optax

    from esscher.models import decoder, hf
    from esscher.samplers import decoding

    config, params = hf.load(folder)
    sample, loss, update = programs(config, options)
    x = data(options)
    prompts, given = jnp.asarray(x.prompts), x.answers.reshape(-1, options.group, options.new)
    judged = prompts, jnp.asarray(given), rewards_of(given), jnp.asarray(x.logp.reshape(given.shape))
    greedy = np.asarray(sample(params, jax.random.key(0), prompts[:1], choose=decoding.greedy).tokens[0])
    value, gradient = jax.jit(jax.value_and_grad(loss))(params, *judged)
    compared = [np.asarray(each) for each in (value, gradient["embedding"], decoder.unembedding(gradient).T)]

    began = time.perf_counter()
    state = params, optax.adamw(RATE).init(params)
    rollout = jax.jit(functools.partial(sample, n=options.group)).lower(params, jax.random.key(0), prompts).compile()
    improve = jax.jit(update, donate_argnums=0).lower(state, *judged).compile()
    print(f"{OURS}: compiled in {time.perf_counter() - began:.1f} s (not counted below)")
    parts = []

    def step():
        nonlocal state
        times = [time.perf_counter()]
        played = rollout(state[0], jax.random.key(len(parts)), prompts)
        answers = np.asarray(played.tokens)
        times.append(time.perf_counter())
        rewards = rewards_of(answers)
        times.append(time.perf_counter())
        state, value = jax.block_until_ready(improve(state, prompts, played.tokens, rewards, played.model_logp))
        times.append(time.perf_counter())
        parts.append(np.diff(times))
        return float(value)

    square = jax.random.normal(jax.random.key(1), (SQUARE, SQUARE), jnp.float32)
    product = jax.jit(jnp.matmul).lower(square, square).compile()
    return {
        "step": step,
        "parts": lambda: parts,
        "product": lambda: float(product(square, square)[0, 0]),
        "compared": lambda: (greedy, compared),
    }


def rewards_of(answers: np.ndarray) -> np.ndarray:
    """`[P, G, T] -> [P, G]`."""
    return np.array([[verify(answer) for answer in group] for group in answers.tolist()], np.float32)


def theirs(folder: str, options: argparse.Namespace, threads: int) -> dict[str, Callable[[], Any]]:
    """The same by TRL; of the parts, only how long the sampling took."""
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # that TRL's own names in transformers will change
    transformers.utils.logging.disable_progress_bar()
    x, group, new = data(options), options.group, options.new
    texts = [" ".join(map(str, prompt)) for prompt in x.prompts]
    arguments = trl.GRPOConfig(
        output_dir=f"{folder}/run-{threads}", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=len(texts) * group, gradient_accumulation_steps=1, num_generations=group,
        max_completion_length=new, generation_kwargs={"min_new_tokens": new}, num_iterations=1, beta=0.0,
        loss_type="grpo", learning_rate=RATE, weight_decay=0.0, max_grad_norm=0.0, lr_scheduler_type="constant",
        gradient_checkpointing=False, max_steps=10**6,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completion_ids, **_: [verify(tokens) for tokens in completion_ids],
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    trainer.create_optimizer_and_scheduler(arguments.max_steps)
    trainer.current_gradient_accumulation_steps = 1  # set by `train`, which this replaces
    model, optimizer, sampling = trainer.model, trainer.optimizer, []
    model.train()

    def timed(*args, **kwargs):
        began = time.perf_counter()
        out = generate(*args, **kwargs)
        sampling.append(time.perf_counter() - began)
        return out

    generate, trainer._generate = trainer._generate, timed
    compared = differentiate(trainer, x, options)
    tokens = torch.tensor(x.prompts[:1], dtype=torch.long)
    how = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": PAD}
    greedy = model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)[0, options.prompt :].numpy()
    batch = [{"prompt": text} for text in texts for _ in range(group)]

    def step():
        value = trainer.training_step(model, batch, None)
        optimizer.step()
        optimizer.zero_grad()
        trainer.state.global_step += 1
        return float(value)

    return {"step": step, "parts": lambda: sampling, "compared": lambda: (greedy, compared)}


def differentiate(trainer: Any, x: types.SimpleNamespace, options: argparse.Namespace) -> list[np.ndarray]:
    """TRL's loss for the given answers, and its gradients in embedding and head."""
    import torch

    rewards = rewards_of(x.answers.reshape(-1, options.group, options.new))
    spread = rewards.std(1, ddof=1, keepdims=True) + EPS
    inputs = {
        "prompt_ids": torch.tensor(np.repeat(x.prompts, options.group, 0), dtype=torch.long),
        "completion_ids": torch.tensor(x.answers, dtype=torch.long),
        "old_per_token_logps": torch.tensor(x.logp),
        "advantages": torch.tensor(((rewards - rewards.mean(1, keepdims=True)) / spread).ravel()),
    }
    for name in ("prompt", "completion"):
        inputs[f"{name}_mask"] = torch.ones_like(inputs[f"{name}_ids"])
    model = trainer.model
    weights = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    loss = trainer._compute_loss(model, inputs)
    return [loss.detach().numpy(), *(each.numpy() for each in torch.autograd.grad(loss, weights))]


# --- what is asked for ------------------------------------------------------------------------------------------------


def operations(options: argparse.Namespace) -> tuple[float, float]:
    """Additions and multiplications in the matrix products of sampling and of updating."""
    answers, width = options.prompts * options.group, WIDTH // HEADS
    layers = DEPTH * (2 * WIDTH * WIDTH + 2 * WIDTH * KV_HEADS * width + 3 * WIDTH * MLP)  # entries of the matrices
    head = WIDTH * VOCABULARY
    read, length = options.prompt, options.prompt + options.new - 1  # nothing comes after the last token

    def attention(first: int, last: int) -> float:  # scores and sums of values; a token sees itself and those before it
        return sum(2 * 2 * DEPTH * WIDTH * (position + 1) for position in range(first, last))

    prompts = options.prompts * (2 * read * layers + attention(0, read) + 2 * head)
    sampling = prompts + answers * (2 * (options.new - 1) * (layers + head) + attention(read, length))
    forward = answers * (2 * length * layers + attention(0, length) + 2 * options.new * head)
    return sampling, 3 * forward


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rounds": 5, "prompts": 8, "group": 16, "prompt": 16, "new": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        sides = {OURS: (ours, folder, options)}
        trl = {f"TRL, {n} threads": n for n in sorted({1, os.cpu_count() or 1})}
        sides |= {side: (theirs, folder, options, n) for side, n in trl.items()}
        jobs = [*((side, name) for name in ("step", "parts") for side in sides), (OURS, "product")]
        times, results = measure(sides, jobs, options.rounds, once=[(side, "compared") for side in sides])

    seconds = {side: statistics.median(times[side, "step"]) for side in sides}
    best = min(trl, key=seconds.get)
    parts = {side: np.median(results[side, "parts"][-options.rounds :], axis=0) for side in sides}
    for side in trl:
        sampling = parts[side]
        print(f"{side:16} {seconds[side]:6.2f} s: {sampling:.2f} sampling, {seconds[side] - sampling:.2f} the rest")
    sampling, verifying, updating = parts[OURS]
    print(
        f"{OURS:16} {seconds[OURS]:6.2f} s: {sampling:.2f} sampling, {verifying:.3f} verifying, {updating:.2f} updating"
    )
    print(f"time    TRL / Esscher: {seconds[best] / seconds[OURS]:.2f}")

    peak = 2 * SQUARE**3 / min(times[OURS, "product"])
    asked = operations(options)
    print(f"peak of a float32 product: {peak / 1e9:.0f} GFLOP/s; the step asks for {sum(asked) / 1e9:.0f} GFLOP")
    share = lambda count, seconds: f"{count / seconds / peak:.1%}"  # noqa: E731
    print(
        f"share of the peak: Esscher {share(sum(asked), seconds[OURS])} ({share(asked[0], sampling)} sampling, "
        f"{share(asked[1], updating)} updating), TRL {share(sum(asked), seconds[best])}"
    )

    (mine, ours_found), (other, trl_found) = (results[side, "compared"] for side in (OURS, best))
    agreement = "the same tokens" if np.array_equal(mine, other) else "DIFFERENT TOKENS"
    worst = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours_found, trl_found, strict=True)]
    print(f"greedy continuation: {agreement}; loss for given answers {ours_found[0]:.6f}, TRL {trl_found[0]:.6f}")
    print(f"largest relative difference: value {worst[0]:.0e}, gradients {worst[1]:.0e} and {worst[2]:.0e}")


if __name__ == "__main__":
    main()
