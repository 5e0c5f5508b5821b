"""The named preference methods: on pairs, on single responses, on tokens."""

import inspect

import jax
import jax.numpy as jnp
from laws.harness import Example

from esscher.objectives.preference import anchored, links, pair_scores, pair_terms, pairs, reference_free

POLICY_CHOSEN, POLICY_REJECTED, REF_CHOSEN, REF_REJECTED = -20 + 4 * jax.random.normal(jax.random.key(0), (4, 8))
LENGTHS = {"len_chosen": 1 + jnp.arange(8) % 5 * 7, "len_rejected": 3 + jnp.arange(8) % 3 * 6}
NLL = {"nll": jnp.linspace(0.5, 2.0, 8)}
UNIT = jnp.linspace(0.1, 0.8, 8)
PAIR = {
    "policy_chosen": POLICY_CHOSEN,
    "policy_rejected": POLICY_REJECTED,
    "ref_chosen": REF_CHOSEN,
    "ref_rejected": REF_REJECTED,
}
FLOWING = ("policy_", "kl_rejected", "nll")  # what has a gradient, of the arrays


def method(function, example="", *, flowing=FLOWING, arrays=(), stopped=(), modes=(), pair=PAIR, **hyper):
    """Of a method on pairs: arrays of numbers per example, those without gradient, modes, and scalars."""
    given = {name: value for name, value in pair.items() if name in inspect.signature(function).parameters}
    arrays, stopped, modes = dict(arrays), dict(stopped), dict(modes)
    arguments = given | arrays | stopped | {name: jnp.asarray(value) for name, value in hyper.items()}
    constants = tuple(name for name in arguments if name.startswith("ref_") or name in stopped)
    flows = [name for name in given | arrays if name.startswith(flowing) and name not in constants]
    return Example(
        name=function.__name__ + example,
        function=lambda **arguments: function(**arguments, **modes),
        arguments=arguments,
        covers=(function,),
        hyperparameters=tuple(hyper),
        differentiable=(*flows, *(name for name in hyper if name not in constants)),
        constants=constants,
        batch=(*given, *arrays, *stopped),
    )


def single(function, **hyper):
    """Of a method on single responses, whose baseline, if it has one, is a constant."""
    fixed = tuple(name for name in hyper if "baseline" in name)
    return Example(
        name=function.__name__,
        function=function,
        arguments={
            "policy": POLICY_CHOSEN, "reference": REF_CHOSEN, "desirable": jnp.arange(8) % 3 / 2,
            **{name: jnp.asarray(value) for name, value in hyper.items()},
        },
        covers=(function,),
        hyperparameters=tuple(hyper),
        differentiable=("policy", *(name for name in hyper if name not in fixed)),
        constants=("reference", *fixed),
        batch=("policy", "reference", "desirable"),
    )  # fmt: skip


def sft(phi):
    return Example(
        name=f"f_sft[{phi}]",
        function=lambda policy, reference, beta: anchored.f_sft(policy, reference, phi=phi, beta=beta),
        arguments={"policy": POLICY_CHOSEN, "reference": REF_CHOSEN, "beta": jnp.asarray(0.05)},
        covers=(anchored.f_sft,),
        hyperparameters=("beta",),
        differentiable=("policy", "beta"),
        constants=("reference",),
        batch=("policy", "reference"),
    )


TOKENS = -jnp.exp(jax.random.normal(jax.random.key(1), (4, 8, 6)))
MASK = (jnp.arange(6) < 2 + jnp.arange(8)[:, None] % 4).astype(jnp.float32)
TOKEN_PAIR = {
    "policy_chosen": TOKENS[0],
    "policy_rejected": TOKENS[1, :, :5],
    "ref_chosen": TOKENS[2],
    "ref_rejected": TOKENS[3, :, :5],
}


def tokenwise(function, example="", references=True, **hyper):
    """Of a method on pairs of token log-probabilities."""
    pair = {name: value for name, value in TOKEN_PAIR.items() if references or name.startswith("policy_")}
    return Example(
        name=function.__name__ + example,
        function=function,
        arguments={
            **pair, "chosen_mask": MASK, "rejected_mask": MASK[::-1, 1:],
            **{name: jnp.asarray(value) for name, value in hyper.items()},
        },
        covers=(function,),
        hyperparameters=tuple(hyper),
        differentiable=("policy_chosen", "policy_rejected", *hyper),
        constants=tuple(name for name in pair if name.startswith("ref_")),
        masks={f"{side}_mask": tuple(name for name in pair if name.endswith(side)) for side in ("chosen", "rejected")},
        batch=(*pair, "chosen_mask", "rejected_mask"),
    )  # fmt: skip


def token_loss(function, name, values, differentiable, constants, **hyper):
    """Of a loss of each token."""
    return Example(
        name=function.__name__,
        function=function,
        arguments={
            "logp": TOKENS[0], name: values, "mask": MASK,
            **{name: jnp.asarray(value) for name, value in hyper.items()},
        },
        covers=(function,),
        hyperparameters=tuple(hyper),
        differentiable=("logp", *differentiable),
        constants=constants,
        masks={"mask": ("logp", name)},
        batch=("logp", name, "mask"),
    )  # fmt: skip


PREVIOUS = {"previous_chosen": POLICY_REJECTED[::-1], "previous_rejected": POLICY_CHOSEN[::-1]}
DIVERGENCES = {"kl_chosen": jnp.linspace(0.3, 3.0, 8), "kl_rejected": jnp.linspace(2.0, 0.1, 8)}
SPANS = {"policy_chosen_span": POLICY_REJECTED / 3, "policy_edited_span": POLICY_CHOSEN / 3}
REF_SPANS = {"ref_chosen_span": REF_REJECTED / 3, "ref_edited_span": REF_CHOSEN / 3}
WEIGHTS = {"weight_chosen": UNIT, "weight_rejected": UNIT[::-1]}
VALUES = {"value_chosen": 2 * UNIT, "value_rejected": UNIT[::-1]}
RATES = {"win_rate_chosen": UNIT, "win_rate_rejected": UNIT[::-1]}
CALIBRATION = {"policy_calibration": POLICY_REJECTED[::-1]}
REF_CALIBRATION = {"ref_calibration": REF_CHOSEN[::-1]}

EXAMPLES = [
    method(pairs.policy_scores, arrays=LENGTHS),
    method(pairs.log_ratios),
    method(pairs.log_ratios, "[per token]", arrays=LENGTHS),
    method(pairs.dpo, beta=0.1),
    method(pairs.dpo, "[beta by pair]", arrays={"beta": UNIT}),
    method(pairs.cdpo, beta=0.1, flip_prob=0.1),
    method(pairs.rdpo, beta=0.1, flip_prob=0.1),
    method(pairs.soft_dpo, stopped={"label_prob": UNIT}, beta=0.1),
    method(pairs.dno, stopped=RATES, beta=0.1),
    method(pairs.odpo, stopped={"margin": UNIT}, beta=0.1),
    method(pairs.step_apo, stopped=VALUES, beta=0.1),
    method(pairs.r_dpo, arrays=LENGTHS, beta=0.1, alpha=0.01),
    method(pairs.gpo, modes={"link": links.savage_link}, beta=0.1),
    method(pairs.hinge, beta=0.1),
    method(pairs.ipo, modes={"normalize": False}, beta=0.1),
    method(pairs.ipo, "[per token]", arrays=LENGTHS, modes={"normalize": True}, beta=0.1),
    method(pairs.discopop, beta=0.05, tau=0.05),
    method(pairs.exo_pair, beta=0.1),
    method(pair_scores.length_normalized_dpo, arrays=LENGTHS, beta=5.0),
    method(pair_scores.dpo_gamma, gamma=0.5, beta=0.1),
    method(pair_scores.inpo, stopped=PREVIOUS, eta=0.05, ratio=0.3),
    method(pair_scores.flex_dpo, beta_chosen=0.2, beta_rejected=0.05),
    method(pair_scores.dpop, beta=0.1, penalty=5.0),
    method(pair_scores.tdpo1, arrays=DIVERGENCES, flowing=("policy_", "kl_"), beta=0.1),
    method(
        pair_scores.tdpo2,
        arrays={"kl_rejected": DIVERGENCES["kl_rejected"]},
        stopped={"kl_chosen": DIVERGENCES["kl_chosen"]},
        beta=0.1,
        alpha=0.5,
    ),
    *(
        method(pair_scores.f_dpo, f"[{kind}]", modes={"kind": kind}, beta=0.1)
        for kind in ("reverse_kl", "forward_kl", "js", "chi2_kl")
    ),
    method(pair_scores.f_dpo, "[alpha]", modes={"kind": "alpha"}, beta=0.1, alpha=0.5),
    method(pair_scores.chi_po, beta=0.05, clip=6.0),
    tokenwise(pair_scores.ld_dpo, beta=0.1, alpha=0.5),
    tokenwise(pair_scores.contrastive_preference, "[reference]", beta=0.1, bias=0.5, discount=0.9),
    tokenwise(pair_scores.contrastive_preference, references=False, beta=0.1, bias=0.5, discount=0.9),
    method(pair_terms.wpo, stopped=WEIGHTS, beta=0.01),
    method(pair_terms.beta_dpo, stopped={"beta": UNIT, "keep": jnp.arange(8) % 3 / 2}),
    method(pair_terms.mm_dpo, arrays=NLL, stopped={"beta": UNIT}, nll_weight=0.25),
    method(pair_terms.rpo, arrays=NLL, beta=0.01, eta=0.005),
    method(pair_terms.iterative_rpo, arrays={"len_chosen": LENGTHS["len_chosen"]}, beta=0.1, alpha=1.0),
    *(
        method(
            pair_terms.vpo,
            f"[{attitude}]",
            arrays=CALIBRATION,
            stopped=REF_CALIBRATION,
            modes={"attitude": attitude},
            beta=0.1,
            alpha=0.01,
        )
        for attitude in ("optimistic", "pessimistic")
    ),
    method(pair_terms.xpo, arrays={"policy_exploration": POLICY_REJECTED}, beta=0.1, alpha=0.01),
    method(pair_terms.rise, arrays={**SPANS, **NLL}, stopped=REF_SPANS, beta=0.1, alpha=0.5),
    method(reference_free.slic, arrays=NLL, delta=1.0, nll_weight=0.1),
    method(reference_free.cpo, arrays=NLL, beta=0.1, nll_weight=1.0, flip_prob=0.1),
    method(reference_free.simpo, arrays=LENGTHS, beta=2.5, gamma=1.375),
    method(reference_free.alphapo, arrays=LENGTHS, beta=2.5, gamma=0.1, alpha=0.25),
    method(reference_free.orpo, arrays={**LENGTHS, **NLL}, beta=0.1),
    method(anchored.bco_pair, beta=0.1),
    single(anchored.bco, baseline=0.05, beta=0.1, undesirable_weight=0.7),
    method(anchored.nca_pair, beta=0.01),
    single(anchored.kto, kl_baseline=0.4, beta=0.1, desirable_weight=1.3, undesirable_weight=0.7),
    method(anchored.apo_zero, beta=0.1),
    single(anchored.apo_zero_unpaired, beta=0.1, desirable_weight=1.3, undesirable_weight=0.7),
    method(anchored.apo_down, beta=0.1),
    method(anchored.sppo, stopped=RATES, beta=0.05, factor=0.5),
    method(anchored.cal_dpo, beta=0.05),
    method(anchored.redi, arrays=LENGTHS, alpha=0.8, gamma=0.5),
    sft("identity"),
    sft("chi2"),
    sft("hellinger"),
    token_loss(anchored.unlikelihood, "desirable", MASK[::-1] / 2, ("alpha",), ("desirable",), alpha=0.6),
    token_loss(
        anchored.advantage_weighted_nll,
        "advantage",
        TOKENS[1],
        ("beta", "weight_max"),
        ("advantage",),
        beta=2.0,
        weight_max=0.8,
    ),
    Example(
        name="kto_baseline",
        function=anchored.kto_baseline,
        arguments={"policy_mismatched": POLICY_CHOSEN, "ref_mismatched": POLICY_CHOSEN - UNIT},
        covers=(anchored.kto_baseline,),
        constants=("policy_mismatched", "ref_mismatched"),
        batch=("policy_mismatched", "ref_mismatched"),
        output_axis=None,
        independent=False,
        bad={"whole numbers": ("policy_mismatched", jnp.arange(8))},
    ),
]
