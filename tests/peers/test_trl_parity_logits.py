"""As test_trl_parity, from logits: TRL's losses without a reference, of rewards, and of pairs that are generated."""

import importlib.util
from collections import defaultdict
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from peers.test_trl_parity import BETA, FLIP, ROWS, SMOOTH, VOCABULARY, LogitModel, agree, inputs, make, sequences

from esscher.core import tokens
from esscher.objectives import preference
from esscher.objectives.preference import hinge_link, pairwise, squared_link

torch = pytest.importorskip("torch", reason="needs the extra `peers`: pip install 'esscher[peers]'")
trl = pytest.importorskip("trl", reason="needs the extra `peers`: pip install 'esscher[peers]'")

pytestmark = pytest.mark.usefixtures("x64")


def scored(rng, kinds):
    """Sequences with logits, and how ours turn these into log-probabilities of each kind of response, and lengths."""
    x = sequences(rng, kinds)
    x.logits, x.mask = rng.normal(size=(*x.ids.shape, VOCABULARY)), x.response[:, 1:]
    x.logp = lambda logits: tokens.token_logps(logits[:, :-1], x.ids[:, 1:])
    x.sums = lambda logits: jnp.split(tokens.sequence_logp(x.logp(logits), x.mask), kinds)
    lengths = np.split(x.mask.sum(1), kinds)
    x.lengths = {"len_chosen": lengths[0], "len_rejected": lengths[1]}
    return x


def nll(x, logits, rows, mask):
    """TRL's likelihood is a mean over tokens of the batch."""
    total, count = tokens.aggregate(-x.logp(logits)[rows], mask[rows], "token-mean")
    return total / count


def of_pairs(x):
    """A batch for CPO and ORPO: either side is as wide as its longest."""
    batch = {}
    for name, rows in (("chosen", slice(ROWS)), ("rejected", slice(ROWS, None))):
        width = x.attention[rows].any(0).sum()
        parts = {"input_ids": x.ids, "attention_mask": x.attention, "labels": np.where(x.response, x.ids, -100)}
        batch |= {f"{name}_{key}": torch.tensor(part[rows, :width]) for key, part in parts.items()}
    assert batch["chosen_labels"].shape != batch["rejected_labels"].shape
    return batch


GAMMA, ALPHA = 0.5, 0.25
TARGET = squared_link(0.5 / BETA)  # `ipo`'s beta is only in its target
SCORES = preference.policy_scores
ALPHA_SCORES = lambda s, n: [preference.box_cox_score(a, ALPHA) for a in SCORES(*s, **n)]  # noqa: E731
# TRL's name, what is not its default, ours without the likelihood. `ipo` and `simpo` take means over tokens, `sigmoid`
# and `hinge` sums, and AlphaPO's `alpha` reshapes whatever it is; `simpo_gamma` is in units of reward, as ours.
CPO = {
    "simpo": ("simpo", {}, lambda s, n: preference.simpo(*s, **n, beta=BETA, gamma=GAMMA)),
    "simpo, noisy": (
        "simpo", SMOOTH, lambda s, n: pairwise(*SCORES(*s, **n), beta=BETA, margin=GAMMA, flip_prob=FLIP)
    ),
    "alphapo": (
        "simpo", {"alpha": ALPHA}, lambda s, n: preference.alphapo(*s, **n, beta=BETA, gamma=GAMMA, alpha=ALPHA)
    ),
    "sigmoid": ("sigmoid", {}, lambda s, n: preference.cpo(*s, nll=0.0, beta=BETA)),
    "sigmoid, noisy": ("sigmoid", SMOOTH, lambda s, n: preference.cpo(*s, nll=0.0, beta=BETA, flip_prob=FLIP)),
    "sigmoid, alpha": ("sigmoid", {"alpha": ALPHA}, lambda s, n: pairwise(*ALPHA_SCORES(s, {}), beta=BETA)),
    "hinge": ("hinge", {}, lambda s, n: pairwise(*s, beta=BETA, link=hinge_link)),
    "hinge, beta of 1": ("hinge", {"beta": 1.0}, lambda s, n: preference.slic(*s, nll=0.0)),
    "ipo": ("ipo", {}, lambda s, n: pairwise(*SCORES(*s, **n), beta=1.0, link=TARGET)),
    "ipo, alpha": ("ipo", {"alpha": ALPHA}, lambda s, n: pairwise(*ALPHA_SCORES(s, n), beta=1.0, link=TARGET)),
}  # fmt: skip


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize(("loss_type", "settings", "ours"), CPO.values(), ids=CPO)
def test_cpo(loss_type, settings, ours, weight):
    x = scored(np.random.default_rng(7), 2)
    defaults = {"beta": BETA, "label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": GAMMA, "pad_token_id": 0}
    attributes = defaults | settings | {"loss_type": loss_type, "cpo_alpha": weight}
    trainer, model = make("experimental.cpo.cpo_trainer", "CPOTrainer", **attributes), LogitModel(x.logits)

    def total(logits):
        return ours(x.sums(logits), x.lengths).mean() + weight * nll(x, logits, slice(ROWS), x.mask)

    agree(trainer.compute_loss(model, of_pairs(x)), model.states, total)


def test_cpo_is_one_call_with_its_likelihood():
    x = scored(np.random.default_rng(8), 2)
    attributes = {"beta": BETA, "label_smoothing": FLIP, "alpha": 0.0, "loss_type": "sigmoid", "pad_token_id": 0}
    trainer = make("experimental.cpo.cpo_trainer", "CPOTrainer", cpo_alpha=0.3, **attributes)
    model = LogitModel(x.logits)

    def ours(logits):
        likelihood = nll(x, logits, slice(ROWS), x.mask)
        return preference.cpo(*x.sums(logits), nll=likelihood, beta=BETA, nll_weight=0.3, flip_prob=FLIP).mean()

    agree(trainer.compute_loss(model, of_pairs(x)), model.states, ours)


def test_orpo():
    """The likelihood is of prompt and response, and the odds are in float32."""
    x = scored(np.random.default_rng(9), 2)
    model = LogitModel(x.logits)
    trainer = make("experimental.orpo.orpo_trainer", "ORPOTrainer", beta=BETA, padding_value=0)

    def ours(logits):
        likelihood = nll(x, logits, slice(ROWS), x.attention[:, 1:])
        return preference.orpo(*x.sums(logits), **x.lengths, nll=likelihood, beta=BETA).mean()

    agree(trainer.compute_loss(model, of_pairs(x)), model.states, ours, tolerance=1e-6)


# TRL's name, ours without the likelihood, which is that of a third, gold response: no reference, and `ipo` and `tpo-l`
# (SimPO) on means over tokens.
TPO = {
    "sigmoid": ("sigmoid", {}, lambda s, n: preference.cpo(*s, nll=0.0, beta=BETA)),
    "sigmoid, noisy": ("sigmoid", SMOOTH, lambda s, n: preference.cpo(*s, nll=0.0, beta=BETA, flip_prob=FLIP)),
    "hinge": CPO["hinge"],
    "ipo": CPO["ipo"],
    "tpo-l": ("tpo-l", {}, CPO["simpo"][2]),
    "tpo-l, noisy": ("tpo-l", SMOOTH, CPO["simpo, noisy"][2]),
}


@pytest.mark.parametrize("weight", [0.0, 0.6])
@pytest.mark.parametrize(("loss_type", "settings", "ours"), TPO.values(), ids=TPO)
def test_tpo(loss_type, settings, ours, weight):
    kinds = 3 if weight else 2
    x = scored(np.random.default_rng(10), kinds)
    attributes = {"beta": BETA, "label_smoothing": 0.0, "tpo_l_gamma": GAMMA, "loss_type": loss_type} | settings
    trainer = make("experimental.tpo.tpo_trainer", "TPOTrainer", tpo_alpha=weight, **attributes)
    model = LogitModel(x.logits)

    def total(logits):
        gold = nll(x, logits, slice(2 * ROWS, None), x.mask) if weight else 0.0
        return ours(x.sums(logits)[:2], x.lengths).mean() + weight * gold

    agree(trainer.compute_loss(model, inputs(x)), model.states, total)


# --- on pairs that the policy generates -------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [None, 1.5])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_online_dpo(loss_type, penalty):
    """A whole step with its rewards; only the sampling is replaced. `ipo` is of sums, unlike DPOTrainer's."""
    rng = np.random.default_rng(11)
    width, lengths = 9, np.array([9, 1, 4, 6, 2, 5, 3, 9, 8, 1, 7, 4])
    mask = (np.arange(width) < lengths[:, None]).astype(int)
    ids = np.where(mask, rng.integers(2, VOCABULARY, mask.shape), 0)
    ids[::3, 0] = 1  # ends, for the penalty
    prompt_mask = np.tile((np.arange(3) >= np.array([0, 2, 1, 0, 1, 2])[:, None]).astype(int), (2, 1))
    prompt_ids = np.where(prompt_mask, rng.integers(2, VOCABULARY, prompt_mask.shape), 0)
    rewards = rng.integers(0, 3, 2 * ROWS).astype(float)
    rewards[:ROWS] = rewards[ROWS:] + np.array([1, -1, 0, 1, -2, 0])  # ties: the first is chosen
    logits = rng.normal(size=(2, 2 * ROWS, 3 + width, VOCABULARY))
    model, reference = map(LogitModel, logits)
    args = {
        "loss_type": loss_type, "missing_eos_penalty": penalty, "use_vllm": False, "torch_empty_cache_steps": None,
        "optim": "adamw_torch", "n_gpu": 1, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    trainer = make(
        "experimental.online_dpo.online_dpo_trainer", "OnlineDPOTrainer", args=args, ref_model=reference, _beta=BETA,
        reward_funcs=[lambda **_: rewards.tolist()], reward_processing_classes=[None], reward_weights=None,
        state=SimpleNamespace(global_step=0), stats=defaultdict(list), eos_token_ids=[1], max_length=100,
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)),
        _generate=lambda *_: (*map(torch.tensor, (prompt_ids, prompt_mask, ids, mask)), None),
    )  # fmt: skip
    theirs = trainer.training_step(model, {"prompt": ["a"] * ROWS})

    first, second = np.split(rewards - (penalty or 0) * ~(ids == 1).any(1), 2)
    swapped = first < second
    logp = lambda logits: tokens.sequence_logp(tokens.token_logps(logits[:, 2:-1], ids), mask)  # noqa: E731
    ref = jnp.split(logp(jnp.asarray(logits[1])), 2)

    def ours(logits):
        pi = jnp.split(logp(logits), 2)
        h = [jnp.where(swapped, x[1 - i], x[i]) for x in (pi, ref) for i in range(2)]
        loss = (
            preference.dpo
            if loss_type == "sigmoid"
            else lambda *h, beta: preference.ipo(*h, beta=beta, normalize=False)
        )
        return loss(*h, beta=BETA).mean()

    agree(theirs, model.states, ours)


# --- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [None, 0.4])
def test_reward_model(margin):
    """RewardTrainer's loss is a pair's, of scores that are rewards."""
    rewards = torch.tensor(np.random.default_rng(12).normal(size=(2 * ROWS, 1)), requires_grad=True)
    trainer = make("trainer.reward_trainer", "RewardTrainer", args={"center_rewards_coefficient": None})
    batch = {} if margin is None else {"margin": torch.full((ROWS,), margin, dtype=torch.float64)}
    theirs = trainer.compute_loss(lambda **_: SimpleNamespace(logits=rewards), batch)
    agree(theirs, rewards, lambda r: pairwise(*jnp.split(r[:, 0], 2), beta=1.0, margin=margin or 0.0).mean())


# --- what TRL no longer has -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "ours"), [("bco", "bco"), ("xpo", "xpo"), ("nash_md", "nash_md")])
def test_trainers_that_trl_dropped(module, ours):
    if any(importlib.util.find_spec(f"trl.{room}.{module}") for room in ("experimental", "trainer")):
        pytest.fail(f"TRL {trl.__version__} has {module} again: compare it with preference.{ours}")
    pytest.skip(f"TRL {trl.__version__} has no {module} trainer, so there is nothing of its own to run")
