"""TRL's own code, run on ragged batches, gives the policy losses that ours give, and their gradients.

GRPOTrainer and RLOOTrainer are made without their `__init__`, as in test_trl_parity, with log-probabilities and rewards
that are given: what turns them into advantages and losses is TRL's. Both sides compute in float64.
"""

from collections import defaultdict, deque
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from peers.test_trl_parity import agree, make, torch64  # noqa: F401

from esscher.core import tokens
from esscher.objectives import advantages as adv
from esscher.objectives.policy import group_methods, losses, methods, ratios
from esscher.objectives.policy.links import ppo_link

torch = pytest.importorskip("torch", reason="needs the extra `peers`: pip install 'esscher[peers]'")
trl = pytest.importorskip("trl", reason="needs the extra `peers`: pip install 'esscher[peers]'")

pytestmark = pytest.mark.usefixtures("x64", "torch64")

PROMPTS, GROUP, LONGEST, LIMIT = 3, 4, 7, 11
ROWS = PROMPTS * GROUP


class Batch:
    """Ragged rows in groups: log-probabilities of the policy, of the old one and of a reference, and rewards."""

    def __init__(self, seed, spread=0.4):
        rng = np.random.default_rng(seed)
        self.logp = -rng.exponential(size=(ROWS, LONGEST))
        self.old, self.ref = (self.logp - spread * rng.normal(size=(ROWS, LONGEST)) for _ in range(2))
        self.lengths = rng.integers(1, LONGEST + 1, ROWS)
        self.lengths[2] = LONGEST
        self.mask = np.arange(LONGEST) < self.lengths[:, None]
        self.rewards = rng.normal(size=(PROMPTS, GROUP))
        self.leaf = torch.tensor(self.logp, requires_grad=True)
        self.advantages = rng.normal(size=ROWS)
        self.arrays = tuple(map(jnp.asarray, (self.old, self.advantages, self.mask)))

    def given(self):
        """What `_compute_loss` reads, where advantages are given."""
        ones = torch.ones((ROWS, 1), dtype=torch.long)
        mask = torch.tensor(self.mask).long()
        return {
            "prompt_ids": ones, "prompt_mask": ones, "completion_ids": torch.ones_like(mask), "completion_mask": mask,
            "advantages": torch.tensor(self.advantages), "old_per_token_logps": torch.tensor(self.old),
            "ref_per_token_logps": torch.tensor(self.ref), "num_items_in_batch": mask.sum(),
        }  # fmt: skip


def trainer(kind, batch, *, args=None, rewards=None, **settings):
    """With TRL's defaults, as far as a loss reads them; its model gives the batch's log-probabilities."""
    config = getattr(trl, f"{kind}Config")
    default = lambda name: config.__dataclass_fields__[name].default  # noqa: E731
    names = [name for name in config.__dataclass_fields__ if name.startswith(("sapo_", "vespo_", "use_bias"))]
    arguments = {name: default(name) for name in names} | {"delta": None, "num_iterations": 1}
    # Generation is out of step with accumulation, so that the old log-probabilities are asked for.
    arguments |= {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": ROWS}
    arguments |= {"per_device_eval_batch_size": ROWS}
    same = {
        "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "max_completion_length": LIMIT,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token",
        "loss_type": "grpo", "scale_rewards": "group", "use_vllm": False, "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False, "num_generations": GROUP,
        "num_generations_eval": GROUP, "multi_objective_aggregation": "sum_then_normalize", "reward_funcs": [None],
        "reward_func_names": ["r"], "reward_weights": torch.ones(1), "environment_factories": None, "tools": None,
        "environments": None, "mask_truncated_completions": False, "pad_to_multiple_of": None, "num_iterations": 1,
        "_tokenizer": SimpleNamespace(pad_token_id=0), "normalize_advantages": False, "reward_clip_range": None,
        "_pending_extra_logs": {}, "_pending_metrics": {}, "ref_model": "reference", "log_multimodal": False,
    }  # fmt: skip
    out = make(f"trainer.{kind.lower()}_trainer", f"{kind}Trainer", args=arguments | (args or {}), **(same | settings))
    out.accelerator.num_processes, out.accelerator.process_index = 1, 0
    out.accelerator.reduce = lambda x, reduction: x
    deques = {name: deque() for name in ("prompt", "completion", "advantages")}
    out._logs = deques | {"rewards": defaultdict(deque), "extra": defaultdict(deque)}
    known = {"policy": batch.leaf, "reference": torch.tensor(batch.ref)}
    sampled = torch.tensor(batch.old)
    out._get_per_token_logps_and_entropies = lambda model, *_, **__: (
        known.get(model, sampled) if isinstance(model, str) else sampled,
        torch.zeros(ROWS, LONGEST),
        None,
    )
    completions = [[1] * n for n in batch.lengths]
    texts = ["x"] * ROWS
    generated = {
        "GRPO": ([[1]] * ROWS, completions, None, texts, None, {}, None, None),
        "RLOO": ([[1]] * ROWS, completions, texts),
    }
    out._generate = lambda prompts: generated[kind]
    scores = torch.tensor(batch.rewards if rewards is None else rewards).reshape(-1, 1)
    out._calculate_rewards = lambda *_: scores
    return out


def whole(kind, batch, **settings):
    """TRL's loss from the rewards on."""
    out = trainer(kind, batch, **settings)
    scored = out._generate_and_score_completions([{"prompt": "x"}] * ROWS)
    return out._compute_loss("policy", scored)


def divided(fraction):
    return fraction[0] / fraction[1]


DEFAULTS = {
    "GRPO": {
        "beta": 0.0, "epsilon": 0.2, "epsilon_high": None, "delta": None, "loss_type": "dapo", "scale_rewards": "group",
        "use_bias_correction_kl": True, "importance_sampling_level": "token", "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05, "vllm_importance_sampling_mode": "sequence_mask",
        "vllm_importance_sampling_clip_max": 3.0,
    },
    "RLOO": {"beta": 0.05, "epsilon": 0.2, "epsilon_high": None, "normalize_advantages": False, "num_generations": 2},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "expected"), DEFAULTS.items(), ids=DEFAULTS)
def test_defaults_are_those_of_the_page_on_conventions(kind, expected):
    fields = getattr(trl, f"{kind}Config").__dataclass_fields__
    assert {name: fields[name].default for name in expected} == expected


# --- losses on advantages that are given ------------------------------------------------------------------------------

CLIP = {"low": 0.2, "high": 0.2}
LOSSES = {
    "grpo": ({}, methods.ppo, CLIP, "seq-mean-token-mean"),
    "grpo, clip higher": ({"epsilon_high": 0.28}, methods.ppo, {"high": 0.28}, "seq-mean-token-mean"),
    "grpo, delta": ({"args": {"delta": 1.4}}, methods.ppo, {"dual": 1.4}, "seq-mean-token-mean"),
    "bnpo": ({"loss_type": "bnpo"}, methods.ppo, CLIP, "token-mean"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, methods.ppo, CLIP, "constant"),
    "dapo": ({"loss_type": "dapo"}, methods.ppo, CLIP, "token-mean"),
    "gspo": ({"importance_sampling_level": "sequence"}, methods.gspo, CLIP, "seq-mean-token-mean"),
    "luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"}, methods.gspo, CLIP, "seq-mean-token-sum",
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3}, methods.cispo, {"low": 0.0, "high": 1.3}, "token-mean",
    ),
    "sapo": ({"loss_type": "sapo"}, methods.sapo, {}, "seq-mean-token-mean"),
    "vespo": ({"loss_type": "vespo"}, methods.vespo, {}, "token-mean"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "method", "keywords", "how"), LOSSES.values(), ids=LOSSES)
def test_losses_on_given_advantages(settings, method, keywords, how):
    batch = Batch(0)
    old, a, mask = batch.arrays
    theirs = trainer("GRPO", batch, **settings)._compute_loss("policy", batch.given())
    length = LIMIT if how == "constant" else None
    agree(
        theirs,
        batch.leaf,
        lambda logp: divided(tokens.aggregate(method(logp, old, a, mask, **keywords), mask, how, length=length)),
    )


@pytest.mark.parametrize("corrected", [True, False], ids=["with the ratio", "without"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_divergence_in_the_loss(level, corrected):
    batch = Batch(1)
    old, a, mask = batch.arrays
    settings = {"beta": 0.3, "importance_sampling_level": level, "args": {"use_bias_correction_kl": corrected}}
    theirs = trainer("GRPO", batch, **settings)._compute_loss("policy", batch.given())
    method, level = (methods.ppo, "token") if level == "token" else (methods.gspo, "geometric")

    def ours(logp):
        ratio = jnp.exp(ratios.log_ratio(logp, old, mask, level=level)) if corrected else None
        penalty = methods.kl_penalty(logp, jnp.asarray(batch.ref), mask, beta=0.3, ratio=ratio)
        return divided(tokens.aggregate(method(logp, old, a, mask, **CLIP) + penalty, mask, "seq-mean-token-mean"))

    agree(theirs, batch.leaf, ours)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_correction_for_the_sampler_multiplies_the_loss(level):
    """`ref` plays the engine that sampled; TRL masks weights of whole sequences above 3, by default."""
    batch = Batch(2)
    old, a, mask = batch.arrays
    settings = {"limit": 1.5, "level": level, "cut": "mask" if level == "sequence" else "truncate"}
    weight = ratios.importance_weight(old, jnp.asarray(batch.ref), mask, **settings)
    shaped = np.array(weight if level == "token" else weight[:, :1])
    kept = np.asarray(mask)
    assert (np.asarray(weight)[kept] == (0 if level == "sequence" else 1.5)).any()
    out = trainer("GRPO", batch, use_vllm=True, vllm_importance_sampling_correction=True)
    theirs = out._compute_loss("policy", {**batch.given(), "importance_sampling_ratio": torch.tensor(shaped)})

    def ours(logp):
        loss = losses.policy_gradient(logp, old, a, mask, link=ppo_link(), weight=weight)
        return divided(tokens.aggregate(loss, mask, "seq-mean-token-mean"))

    agree(theirs, batch.leaf, ours)


def test_tokens_of_a_micro_batch_or_of_all():
    """TRL's "bnpo" is the mean of its parts' means; "dapo" and ours do not depend on the parts."""
    batch = Batch(3)
    old, a, mask = batch.arrays
    ours = lambda rows: tokens.aggregate(  # noqa: E731
        methods.ppo(jnp.asarray(batch.logp)[rows], old[rows], a[rows], mask[rows]), mask[rows], "token-mean"
    )
    parts = [slice(0, 5), slice(5, None)]
    summed = [sum(x) for x in zip(*map(ours, parts), strict=True)]
    np.testing.assert_allclose(divided(summed), divided(ours(slice(None))), rtol=1e-12)
    theirs = trainer("GRPO", batch, loss_type="dapo")._compute_loss("policy", batch.given()).item()
    np.testing.assert_allclose(divided(summed), theirs, rtol=1e-12)
    local = np.mean([divided(ours(rows)) for rows in parts])
    assert abs(local - theirs) > 1e-3


def test_rows_without_tokens_count_in_trl_and_not_here():
    """As of truncated answers that are masked: the numerator is one, TRL divides it by all rows."""
    batch = Batch(9)
    batch.mask[4:6] = False
    old, a, mask = *batch.arrays[:2], jnp.asarray(batch.mask)
    theirs = trainer("GRPO", batch)._compute_loss("policy", batch.given())
    assert tokens.aggregate(jnp.asarray(batch.logp), mask, "seq-mean-token-mean")[1] == ROWS - 2
    ours = lambda logp: tokens.aggregate(methods.ppo(logp, old, a, mask), mask, "seq-mean-token-mean")[0]  # noqa: E731
    agree(theirs, batch.leaf, lambda logp: ours(logp) / ROWS)


# --- from rewards -----------------------------------------------------------------------------------------------------


def method(function, **keywords):
    def ours(batch, rewards, logp):
        old, _, mask = batch.arrays
        return divided(function(rewards, logp, old, mask, **keywords))

    return ours


WHOLE = {
    "grpo": ({}, method(group_methods.grpo, eps=1e-4)),
    "bnpo": ({"loss_type": "bnpo"}, method(group_methods.grpo, eps=1e-4, how="token-mean")),
    "dapo": (
        {"loss_type": "dapo", "epsilon_high": 0.28}, method(group_methods.grpo, eps=1e-4, how="token-mean", high=0.28),
    ),
    "dapo, all groups mixed": (
        {"loss_type": "dapo", "epsilon_high": 0.28}, method(group_methods.dapo, eps=1e-4),
    ),
    "lite ppo": ({"loss_type": "dapo", "scale_rewards": "batch"}, method(group_methods.lite_ppo)),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, method(group_methods.dr_grpo, length=LIMIT)),
}  # fmt: skip
REWARDS = {
    "as they are": lambda r: r,
    "some missing": lambda r: np.where(np.arange(ROWS).reshape(r.shape) % 5 == 1, np.nan, r),
}


@pytest.mark.parametrize("change", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize(("settings", "ours"), WHOLE.values(), ids=WHOLE)
def test_whole_methods(settings, ours, change):
    batch = Batch(4)
    rewards = change(batch.rewards)
    theirs = whole("GRPO", batch, rewards=rewards, **settings)
    agree(theirs, batch.leaf, lambda logp: ours(batch, jnp.asarray(rewards), logp))


def test_a_reference_in_grpo():
    batch = Batch(5)
    theirs = whole("GRPO", batch, beta=0.3, args={"use_bias_correction_kl": False})
    ours = method(group_methods.grpo, eps=1e-4, logp_ref=jnp.asarray(batch.ref), beta=0.3)
    agree(theirs, batch.leaf, lambda logp: ours(batch, jnp.asarray(batch.rewards), logp))


@pytest.mark.parametrize("change", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo(beta, change):
    batch = Batch(6, spread=0.1)
    rewards = change(batch.rewards)
    theirs = whole("RLOO", batch, beta=beta, rewards=rewards)
    ours = method(group_methods.rloo, logp_ref=jnp.asarray(batch.ref) if beta else None, beta=beta)
    agree(theirs, batch.leaf, lambda logp: ours(batch, jnp.asarray(rewards), logp))


def test_normalised_advantages_of_rloo():
    """`normalize_advantages`: our scale "batch" of what the leave-one-out baseline left."""
    batch = Batch(7, spread=0.1)
    theirs = whole("RLOO", batch, normalize_advantages=True)
    left = adv.group_advantage(jnp.asarray(batch.rewards), center="loo", scale="none").reshape(1, ROWS)
    a = adv.group_advantage(left, eps=1e-4)[0]
    old, _, mask = batch.arrays

    def ours(logp):
        loss = losses.policy_gradient(logp, old, a, mask, level="sequence")
        return divided(tokens.aggregate(loss, mask, "seq-mean-token-mean"))

    agree(theirs, batch.leaf, ours)


def test_a_group_of_one_teaches_nothing():
    """By TRL's rule for evaluation; verl would take the reward itself."""
    batch = Batch(8)
    for kind, center in (("GRPO", "mean"), ("RLOO", "loo")):
        out = trainer(kind, batch, num_generations_eval=1)
        scored = out._generate_and_score_completions([{"prompt": "x"}] * ROWS)
        ours = adv.group_advantage(jnp.asarray(batch.rewards).reshape(ROWS, 1), center=center, eps=1e-4)
        np.testing.assert_array_equal(scored["advantages"], ours[:, 0])
