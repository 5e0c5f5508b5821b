"""A loss named on the command line is given what it asks for, or refused in one line that says what to do."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core.errors import UsageError
from esscher.experiments import preference as stage
from esscher.objectives import preference

B, T = 5, 7
LENGTHS = np.array([[3, 5, 2], [1, 7, 4], [6, 2, 3], [4, 4, 1], [7, 1, 5]])
MASK = jnp.asarray(np.arange(T) >= T - LENGTHS[..., None])
POLICY, REF = (-jax.random.exponential(jax.random.key(k), (B, 3, T)) for k in (0, 1))
SUMS = [jnp.where(MASK, x, 0).sum(-1) for x in (POLICY, REF)]
FOUR = [x[:, i] for x in SUMS for i in (0, 1)]
LENGTH = {"len_chosen": LENGTHS[:, 0], "len_rejected": LENGTHS[:, 1]}


def apply(path, *options, policy=POLICY, ref=REF):
    objective = stage.resolve(path, options)
    values = {name: jnp.float32(value[0]) for name, value in objective.numbers.items()}
    return stage.losses(objective, policy, ref, MASK, values)


@pytest.mark.parametrize(
    ("path", "options", "expected"),
    [
        ("dpo", (), lambda: preference.dpo(*FOUR)),
        ("esscher.objectives.preference.pairs.dpo", ("beta=0.7",), lambda: preference.dpo(*FOUR, beta=0.7)),
        (
            "ipo",
            ("normalize=true", "beta=0.5"),
            lambda: preference.ipo(*FOUR, **LENGTH, normalize=True, beta=0.5),
        ),
        ("f_dpo", ("kind=js",), lambda: preference.f_dpo(*FOUR, kind="js")),
        ("simpo", ("gamma=0.3",), lambda: preference.simpo(*FOUR[:2], **LENGTH, gamma=0.3)),
        ("rpo", (), lambda: preference.rpo(*FOUR, nll=-FOUR[0] / LENGTHS[:, 0])),
        (
            "ld_dpo",
            ("alpha=0.2",),
            lambda: preference.ld_dpo(
                *(x[:, i] for x in (POLICY, REF) for i in (0, 1)),
                chosen_mask=MASK[:, 0],
                rejected_mask=MASK[:, 1],
                alpha=0.2,
            ),
        ),
    ],
)
def test_a_loss_is_given_what_it_asks_for(path, options, expected):
    np.testing.assert_allclose(apply(path, *options), expected(), rtol=1e-5)


def test_without_normalize_ipo_takes_sums_though_lengths_are_given():
    np.testing.assert_allclose(apply("ipo", "normalize=false"), preference.ipo(*FOUR, normalize=False), rtol=1e-5)


def test_a_loss_of_single_responses_is_the_mean_of_the_two_with_a_baseline_from_other_prompts():
    baseline = max(0.0, float(jnp.mean(SUMS[0][:, 2] - SUMS[1][:, 2])))
    for shift in (0.0, 3.0):  # the baseline is clipped at 0 in one of the two
        moved = POLICY.at[:, 2].add(shift * MASK[:, 2] / LENGTHS[:, 2, None])
        base = max(0.0, float(jnp.mean(SUMS[0][:, 2] - SUMS[1][:, 2])) + shift)
        values = [
            preference.kto(SUMS[0][:, i], SUMS[1][:, i], label, kl_baseline=base, beta=0.3)
            for i, label in enumerate((1.0, 0.0))
        ]
        np.testing.assert_allclose(apply("kto", "beta=0.3", policy=moved), sum(values) / 2, rtol=1e-5)
    assert 0 < base != baseline


def test_losses_at_the_reference_are_their_known_constants():
    """Of the recipe that swaps nothing but the objective between runs."""
    known = {
        "dpo": np.log(2),
        "hinge": 1.0,
        "apo_zero": 1.0,
        "bco_pair": 2 * np.log(2),
        "nca_pair": 2 * np.log(2),
        "kto": 0.5,
    }
    for name, value in known.items():
        np.testing.assert_allclose(apply(name, policy=REF), value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(apply("ipo", "normalize=true", "beta=0.2", policy=REF), 0.25 / 0.2**2, rtol=1e-6)


def test_what_lies_outside_of_the_responses_has_neither_value_nor_gradient():
    def total(policy, name):
        return stage.losses(stage.resolve(name), policy, REF, MASK, {}).sum()

    for name in ("dpo", "simpo", "kto", "ld_dpo", "orpo"):
        gradient = jax.grad(total)(jnp.where(MASK, POLICY, jnp.nan), name)
        assert np.all(np.isfinite(gradient)), name
        assert np.all(np.asarray(gradient)[~MASK] == 0), name
        assert np.any(np.asarray(gradient)[:, :2] != 0), name


def test_a_function_of_the_users_own_is_found_where_the_command_was_started(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text(
        "def gap(policy_chosen, policy_rejected, *, scale):\n    return scale * (policy_rejected - policy_chosen)\n"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    np.testing.assert_allclose(apply("mine_alone.gap", "scale=2"), 2 * (FOUR[1] - FOUR[0]), rtol=1e-6)


def test_several_numbers_are_swept_and_words_are_not():
    objective = stage.resolve("f_dpo", ["beta=0.1,0.2", "kind=alpha", "alpha=0.5"])
    assert objective.numbers == {"beta": (0.1, 0.2), "alpha": (0.5,)}
    assert objective.fixed == {"kind": "alpha"}


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("dpoo", (), "esscher.objectives.preference has no function 'dpoo'; close: dpo"),
        ("nowhere.at.all", (), "there is no module 'nowhere.at' to import from here"),
        ("..dpo", (), "there is no module '.' to import from here"),
        ("esscher.objectives.preference.Link", (), "is no function of arrays"),
        ("dpo", ("gamma=1",), "dpo has no option 'gamma'; it has beta"),
        ("dpo", ("beta",), "--options must look like beta=0.1 or beta=0.05,0.1, got 'beta'"),
        ("dpo", ("policy_chosen=1",), "dpo has no option 'policy_chosen'"),
        (
            "odpo",
            (),
            "--objective odpo needs margin: give a number or a word by --options margin=...; what is known",
        ),
        ("logistic_link", (), "needs z"),
        ("math.pi", (), "math has no function 'pi'"),
        ("f_dpo", ("kind=nope",), "--objective f_dpo: kind must be reverse_kl, forward_kl, js, alpha or chi2_kl"),
        ("dpo", ("beta=true",), "--options: beta of dpo must be a number, got True"),
        ("dpo", ("beta=0.1,x",), "--options: beta of dpo must be a number, got '0.1,x'"),
    ],
)
def test_what_a_user_got_wrong_is_one_line(path, options, message):
    with pytest.raises(UsageError) as error:
        stage.resolve(path, options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_one_for_each_pair_is_refused(tmp_path, monkeypatch):
    (tmp_path / "total_alone.py").write_text("def total(policy_chosen):\n    return policy_chosen.sum()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"total_alone.total: gives \(\) for 2 pairs; it must give one loss each"):
        stage.resolve("total_alone.total")
