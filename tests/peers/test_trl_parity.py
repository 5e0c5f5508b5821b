"""TRL's own code, run on ragged batches, gives the preference losses that ours give, and their gradients.

Its trainers are made without their `__init__`, with the attributes that their losses read, and a model whose
log-probabilities or logits are given. Both sides compute in float64, except where TRL casts to float32 whatever it is
given; TRL's scalar is the batch's mean of ours unless a case says otherwise.
"""

import contextlib
import importlib
import math
import os
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import tokens
from esscher.objectives import preference
from esscher.objectives.preference import divergence_score, hinge_link, listwise_softmax, pairwise, squared_link

torch = pytest.importorskip("torch", reason="needs the extra `peers`: pip install 'esscher[peers]'")
trl = pytest.importorskip("trl", reason="needs the extra `peers`: pip install 'esscher[peers]'")

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytestmark = pytest.mark.usefixtures("x64", "torch64")

BETA, FLIP, TAU, VOCABULARY, ROWS = 0.7, 0.1, 0.05, 13, 6
SINGLE = 5e-6  # of float32


@pytest.fixture
def torch64():
    """TRL makes some constants in torch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# --- what stands in for TRL's training loop ---------------------------------------------------------------------------


def trl_module(name):
    return importlib.import_module(f"trl.{name}")


def make(module, name, *, args=None, **attributes):
    """A trainer without its `__init__`, on one CPU."""
    trainer = object.__new__(getattr(trl_module(module), name))
    same = lambda x: x  # noqa: E731
    accelerator = {"device": torch.device("cpu"), "gather": same, "gather_for_metrics": same}
    accelerator |= {"autocast": contextlib.nullcontext, "backward": lambda loss: loss.backward()}
    arguments = {"gradient_checkpointing_kwargs": None, "device": "cpu", "discopop_tau": TAU} | (args or {})
    vars(trainer).update(
        accelerator=SimpleNamespace(**accelerator),
        args=SimpleNamespace(**arguments),
        model=SimpleNamespace(training=False, is_gradient_checkpointing=False),
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        _peft_has_been_casted_to_bf16=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _stored_metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        **attributes,
    )
    return trainer


class TokenModel:
    """What TRL's fused head gives for log-probabilities of tokens that are given, one array for each width."""

    def __init__(self, *logps, log_collision=None):
        self.logps = {x.shape[1]: x for x in logps}
        self.log_collision = log_collision

    def __call__(self, *, labels, fused_lm_head, **_):
        assert fused_lm_head
        kept = labels[:, 1:] != -100
        zero = torch.zeros(kept.shape)
        collision = zero if self.log_collision is None else torch.where(kept, self.log_collision, 0)
        logp = torch.where(kept, self.logps[kept.shape[1]], 0)
        output = trl_module("trainer.utils").FusedCausalLMOutput
        return output(
            log_probs=logp, entropy=zero, log_sum_sq_probs=collision, mean_logits=zero, is_top1=torch.zeros_like(kept)
        )


class LogitModel(torch.nn.Module):
    """Logits are its parameter: hidden states under a head that is the identity."""

    def __init__(self, logits):
        super().__init__()
        self.states = torch.nn.Parameter(torch.tensor(logits))
        self.head = torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False, dtype=self.states.dtype)
        self.head.weight = torch.nn.Parameter(torch.eye(VOCABULARY, dtype=self.states.dtype), requires_grad=False)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def base_model(self, **_):
        return SimpleNamespace(last_hidden_state=self.states)

    def get_output_embeddings(self):
        return self.head

    def forward(self, *_, **__):
        return SimpleNamespace(logits=self.states)


def sequences(rng, kinds=1, longest=11):
    """Prompts with `kinds` responses each, ragged, as `ids`, `attention`, `response`, `[kinds ROWS, S]`, and lists."""
    draw = lambda n: rng.integers(1, VOCABULARY, n).tolist()  # noqa: E731
    prompts = [draw(n) for n in rng.integers(1, 4, ROWS)]
    lengths = rng.integers(1, longest, (kinds, ROWS))
    lengths[0, :2], prompts[1] = (1, longest), draw(3)  # the width is that of prompt and response 1
    responses = [[draw(n) for n in row] for row in lengths]
    ids, attention, response = np.zeros((3, kinds * ROWS, 3 + longest), int)
    for i, (prompt, answer) in enumerate((p, a) for row in responses for p, a in zip(prompts, row, strict=True)):
        n, end = len(prompt), len(prompt) + len(answer)
        ids[i, :end], attention[i, :end], response[i, n:end] = prompt + answer, 1, 1
    return SimpleNamespace(ids=ids, attention=attention, response=response, prompts=prompts, responses=responses)


def inputs(x):
    parts = {"input_ids": x.ids, "attention_mask": x.attention, "completion_mask": x.response}
    return {name: torch.tensor(part) for name, part in parts.items()}


def agree(theirs, leaf, ours, *, tolerance=1e-9):
    """`theirs` is a scalar of torch that depends on `leaf`, `ours` a function of the same array."""
    if leaf.grad is None:
        theirs.backward()
    value, gradient = jax.jit(jax.value_and_grad(ours))(jnp.asarray(leaf.detach().double().numpy()))
    assert value.dtype == gradient.dtype == jnp.float64
    np.testing.assert_allclose(value, theirs.item(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=tolerance, atol=tolerance)
    assert np.abs(gradient).max() > 1e-4


# --- DPOTrainer -------------------------------------------------------------------------------------------------------


class Pairs:
    """A batch for DPOTrainer, by TRL's own collator, and what ours take of it."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        x = sequences(rng, 2)
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        examples = [dict(zip(names, parts, strict=True)) for parts in zip(x.prompts, *x.responses, strict=True)]
        self.inputs = trl_module("trainer.dpo_trainer").DataCollatorForPreference(pad_token_id=0).torch_call(examples)
        for name, array in inputs(x).items():
            np.testing.assert_array_equal(self.inputs[name], array)
        self.mask = x.response[:, 1:]
        self.logp = -rng.gamma(1.0, 0.6, self.mask.shape)
        self.ref = self.logp + 0.5 * rng.normal(size=self.mask.shape)
        self.log_collision = -rng.uniform(0.2, 1.5, self.mask.shape)

    def split(self, logp):
        """Sums of both responses under both models, and further what methods ask for."""
        chosen, rejected = jnp.split(logp, 2)
        ref_chosen, ref_rejected = jnp.split(jnp.asarray(self.ref), 2)
        masks = np.split(self.mask, 2)
        four = (chosen, rejected, ref_chosen, ref_rejected)
        sums = [tokens.sequence_logp(x, m) for x, m in zip(four, (*masks, *masks), strict=True)]
        weights = preference.wpo_weight(logp, jnp.asarray(self.log_collision), self.mask)
        lengths = dict(zip(("len_chosen", "len_rejected"), (m.sum(1) for m in masks), strict=True))
        return sums, SimpleNamespace(tokens=four, masks=masks, lengths=lengths, weights=jnp.split(weights, 2))

    def trl(self, loss_types, *, dtype=torch.float64, precompute=False, **settings):
        """DPOTrainer's loss, and the log-probabilities it depends on."""
        leaf = torch.tensor(self.logp, dtype=dtype, requires_grad=True)
        defaults = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "label_smoothing": 0.0}
        defaults |= {"loss_weights": [1.0] * len(loss_types), "ld_alpha": None, "use_weighting": False}
        reference = TokenModel(torch.tensor(self.ref, dtype=dtype))
        trainer = make(
            "trainer.dpo_trainer", "DPOTrainer", ref_model=reference, precompute_ref_logps=precompute, beta=BETA,
            loss_types=loss_types, **(defaults | settings),
        )  # fmt: skip
        batch = dict(self.inputs)
        if precompute:
            names = ("ref_chosen_logps", "ref_rejected_logps")
            batch |= dict(zip(names, trainer.compute_ref_log_probs(reference, batch), strict=True))
        return trainer.compute_loss(TokenModel(leaf, log_collision=torch.tensor(self.log_collision)), batch), leaf


def token_mean(x):
    """TRL's `sft` is the mean over all tokens of the batch, not over sequences."""
    total, count = tokens.aggregate(-x.tokens[0], x.masks[0], "token-mean")
    return total / count


SMOOTH = {"label_smoothing": FLIP}
# TRL's name, what is not its default, ours. `ipo`'s and `sigmoid_norm`'s log-ratios are means over tokens; there is no
# half in `sppo_hard`; label smoothing is no argument of `sigmoid`.
DPO = {
    "sigmoid": ("sigmoid", {}, lambda h, x: preference.dpo(*h, beta=BETA)),
    "hinge": ("hinge", {}, lambda h, x: preference.hinge(*h, beta=BETA)),
    "ipo": ("ipo", {}, lambda h, x: preference.ipo(*h, beta=BETA, normalize=True, **x.lengths)),
    "exo_pair": ("exo_pair", {"label_smoothing": 1e-3}, lambda h, x: preference.exo_pair(*h, beta=BETA)),
    "exo_pair, noisy": ("exo_pair", SMOOTH, lambda h, x: preference.exo_pair(*h, beta=BETA, flip_prob=FLIP)),
    "nca_pair": ("nca_pair", {}, lambda h, x: preference.nca_pair(*h, beta=BETA)),
    "robust": ("robust", SMOOTH, lambda h, x: preference.rdpo(*h, beta=BETA, flip_prob=FLIP)),
    "bco_pair": ("bco_pair", {}, lambda h, x: preference.bco_pair(*h, beta=BETA)),
    "sppo_hard": ("sppo_hard", {}, lambda h, x: preference.sppo(*h, beta=BETA, factor=1.0)),
    "aot": ("aot", {}, lambda h, x: preference.aot_paired(*h, beta=BETA)),
    "aot, noisy": ("aot", SMOOTH, lambda h, x: preference.aot_paired(*h, beta=BETA, flip_prob=FLIP)),
    "aot_unpaired": ("aot_unpaired", {}, lambda h, x: preference.aot_unpaired(*h, beta=BETA)),
    "aot_unpaired, noisy": (
        "aot_unpaired", SMOOTH, lambda h, x: preference.aot_unpaired(*h, beta=BETA, flip_prob=FLIP)
    ),
    "apo_zero": ("apo_zero", {}, lambda h, x: preference.apo_zero(*h, beta=BETA)),
    "apo_down": ("apo_down", {}, lambda h, x: preference.apo_down(*h, beta=BETA)),
    "discopop": ("discopop", {}, lambda h, x: preference.discopop(*h, beta=BETA, tau=TAU)),
    "sft": ("sft", {}, lambda h, x: token_mean(x)),
    "sigmoid_norm": ("sigmoid_norm", {}, lambda h, x: preference.length_normalized_dpo(*h, beta=BETA, **x.lengths)),
    # A coefficient of 1 is the limit, which TRL takes itself and our `divergence_score` refuses.
    "alpha of 1": (
        "sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        lambda h, x: preference.f_dpo(*h, beta=BETA, kind="reverse_kl"),
    ),
    "weighted": (
        "sigmoid", {"use_weighting": True},
        lambda h, x: preference.wpo(*h, beta=BETA, weight_chosen=x.weights[0], weight_rejected=x.weights[1]),
    ),
    # The product of any loss and the weights; not of `hinge` and `sft`, where TRL multiplies in place what torch needs.
    "ipo, weighted": (
        "ipo", {"use_weighting": True},
        lambda h, x: x.weights[0] * x.weights[1] * preference.ipo(*h, beta=BETA, normalize=True, **x.lengths),
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("loss_type", "settings", "ours"), DPO.values(), ids=DPO)
def test_dpo(loss_type, settings, ours, seed):
    pairs = Pairs(seed)
    agree(*pairs.trl([loss_type], **settings), lambda logp: ours(*pairs.split(logp)).mean())


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_dpo_with_tokens_beyond_the_shorter_response_weighted(alpha, precompute):
    pairs = Pairs(2)

    def ours(logp):
        _, x = pairs.split(logp)
        masks = dict(zip(("chosen_mask", "rejected_mask"), x.masks, strict=True))
        return preference.ld_dpo(*x.tokens, **masks, beta=BETA, alpha=alpha).mean()

    agree(*pairs.trl(["sigmoid"], ld_alpha=alpha, precompute=precompute), ours)


def test_dpo_of_several_losses_is_their_weighted_sum():
    pairs = Pairs(3)

    def ours(logp):
        h, x = pairs.split(logp)
        parts = preference.dpo(*h, beta=BETA).mean(), preference.bco_pair(*h, beta=BETA).mean(), token_mean(x)
        return 0.8 * parts[0] + 0.2 * parts[1] + 1.5 * parts[2]

    agree(*pairs.trl(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5], precompute=True), ours)


# Ours, TRL's name, and TRL's constant: its scores are f'(u) with f'(1) = 0, ours leave out what cancels in a difference
# of sums, but not in one of means over tokens. The alpha divergence raises a KeyError in float64.
DIVERGENCES = {
    "forward_kl": ("forward_kl", 1.0, torch.float64),
    "js": ("js_divergence", math.log(2), torch.float64),
    "alpha": ("alpha_divergence", -1 / (0.5 - 1), torch.float32),
}
EXO = [math.log1p(-FLIP), math.log(FLIP)]
OF_SCORES = {
    "sigmoid": lambda s: pairwise(*s, beta=BETA),
    "hinge": lambda s: pairwise(*s, beta=BETA, link=hinge_link),
    "robust": lambda s: pairwise(*s, beta=BETA, flip_prob=FLIP, mode="unbiased"),
    "discopop": lambda s: pairwise(*s, beta=BETA, link=preference.discopop_link(TAU)),
    "exo_pair": lambda s: listwise_softmax(BETA * jnp.stack(s, -1), jnp.array([EXO] * ROWS), direction="reverse"),
    "ipo": lambda s: pairwise(*s, beta=1.0, link=squared_link(0.5 / BETA)),
    "sigmoid_norm": lambda s: pairwise(*s, beta=BETA),
}


@pytest.mark.parametrize("loss_type", OF_SCORES)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_dpo_of_other_divergences(kind, loss_type):
    pairs, (name, constant, dtype) = Pairs(4), DIVERGENCES[kind]
    alpha = 0.5 if kind == "alpha" else None

    def ours(logp):
        h, x = pairs.split(logp)
        if loss_type == "sigmoid":
            return preference.f_dpo(*h, beta=BETA, kind=kind, alpha=alpha).mean()
        s = [divergence_score(h, kind, alpha=alpha) + constant for h in preference.log_ratios(*h)]
        if loss_type in ("ipo", "sigmoid_norm"):
            s = [preference.per_token(s, n) for s, n in zip(s, x.lengths.values(), strict=True)]
        return OF_SCORES[loss_type](s).mean()

    theirs = pairs.trl([loss_type], f_divergence_type=name, label_smoothing=FLIP, dtype=dtype)
    agree(*theirs, ours, tolerance=1e-9 if dtype == torch.float64 else SINGLE)


def test_dpo_through_the_head_that_trl_fuses():
    """From logits: the log-probabilities, and `log sum_v p_v^2` of the weights, are TRL's too, in float32."""
    pairs, utils = Pairs(5), trl_module("trainer.utils")
    ids = pairs.inputs["input_ids"].numpy()
    logits = np.random.default_rng(5).normal(size=(2, *ids.shape, VOCABULARY)).astype(np.float32)
    model, reference = map(LogitModel, logits)
    for x in (model, reference):
        utils.add_fused_lm_head(x, outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    trainer = make(
        "trainer.dpo_trainer", "DPOTrainer", ref_model=reference, precompute_ref_logps=False, beta=BETA,
        loss_types=["sigmoid"], loss_weights=[1.0], ld_alpha=None, use_weighting=True, f_divergence_type="reverse_kl",
    )  # fmt: skip

    def ours(logits):
        pairs.log_collision = jax.nn.logsumexp(2 * jax.nn.log_softmax(logits[:, :-1]), -1)
        h, x = pairs.split(tokens.token_logps(logits[:, :-1], ids[:, 1:]))
        return preference.wpo(*h, beta=BETA, weight_chosen=x.weights[0], weight_rejected=x.weights[1]).mean()

    pairs.ref = tokens.token_logps(jnp.asarray(logits[1], jnp.float64)[:, :-1], ids[:, 1:])
    agree(trainer.compute_loss(model, pairs.inputs), model.states, ours, tolerance=SINGLE)


# --- KTOTrainer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[1, 0, 0, 1, 1, 0], [1] * ROWS, [0] * ROWS], ids=["both", "good", "bad"])
@pytest.mark.parametrize("shift", [0.4, -0.4], ids=["divergent", "clipped"])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type, shift, labels):
    rng = np.random.default_rng(6)
    x, other = sequences(rng), sequences(rng, longest=8)  # `other`: mismatched responses
    mask, other_mask = x.response[:, 1:], other.response[:, 1:]
    logp, ref = -rng.gamma(1.0, 0.6, (2, *mask.shape))
    other_ref = -rng.gamma(1.0, 0.6, other_mask.shape)
    other_logp = other_ref + shift
    leaf, other_leaf = torch.tensor(logp, requires_grad=True), torch.tensor(other_logp, requires_grad=True)
    trainer = make(
        "trainer.kto_trainer", "KTOTrainer", ref_model=TokenModel(torch.tensor(ref), torch.tensor(other_ref)),
        precompute_ref_logps=False, calculate_KL=loss_type == "kto", loss_type=loss_type, beta=BETA,
        desirable_weight=1.2, undesirable_weight=0.7,
    )  # fmt: skip
    batch = {**inputs(x), **{f"KL_{k}": v for k, v in inputs(other).items()}, "label": torch.tensor(labels).bool()}

    h_other = (tokens.sequence_logp(jnp.asarray(x), other_mask) for x in (other_logp, other_ref))
    kl = preference.kto_baseline(*h_other)
    assert (kl > 0) == (shift > 0)

    def ours(logp):
        h = [tokens.sequence_logp(jnp.asarray(x), mask) for x in (logp, ref)]
        weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7, "beta": BETA}
        if loss_type == "apo_zero_unpaired":
            return preference.apo_zero_unpaired(*h, jnp.array(labels), **weights).mean()
        return preference.kto(*h, jnp.array(labels), kl_baseline=kl, **weights).mean()

    agree(trainer.compute_loss(TokenModel(leaf, other_leaf), batch), leaf, ours)
    assert other_leaf.grad is None  # TRL's baseline is a constant too
