"""A sweep is the grid of its values, and each member is the single run with those values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import sweeps
from esscher.core.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Hyper:
    lr: tuple[float, ...] = (0.1,)
    clip: tuple[float, ...] = (1.0,)
    decay: tuple[float, ...] = (0.9,)


def test_a_single_run_has_scalars_and_no_members_axis():
    sweep = sweeps.grid(Hyper())
    assert not sweep.swept
    assert {name: value.shape for name, value in sweep.values.items()} == {"lr": (), "clip": (), "decay": ()}


def test_several_values_span_their_grid_in_order():
    sweep = sweeps.grid(Hyper(lr=(0.1, 0.2), decay=(0.8, 0.9, 1.0)))
    np.testing.assert_allclose(sweep.values["lr"], [0.1, 0.1, 0.1, 0.2, 0.2, 0.2])
    np.testing.assert_allclose(sweep.values["decay"], [0.8, 0.9, 1.0] * 2)
    np.testing.assert_allclose(sweep.values["clip"], np.ones(6))
    assert sweep.labels[4] == "lr=0.2 decay=0.9"


def test_a_member_equals_the_single_run_with_its_values():
    def run(hyper, x):
        return jnp.sin(hyper["lr"] * x) / hyper["clip"] + hyper["decay"]

    hyper = Hyper(lr=(0.1, 0.2), clip=(1.0, 3.0))
    sweep, x = sweeps.grid(hyper), jnp.arange(4.0)
    together = jax.jit(sweeps.lift(run, sweep, (0, None)))(sweep.values, x)
    for index, (lr, clip) in enumerate([(0.1, 1.0), (0.1, 3.0), (0.2, 1.0), (0.2, 3.0)]):
        single = sweeps.grid(Hyper(lr=(lr,), clip=(clip,)))
        np.testing.assert_allclose(together[index], sweeps.lift(run, single, (0, None))(single.values, x), rtol=1e-6)


def test_labels_tell_values_apart_that_differ_late():
    assert sweeps.grid({"lr": (1.0, 1.0000001)}).labels == ("lr=1", "lr=1.0000001")


@pytest.mark.parametrize("values", [(0.1, 0.1), (float("nan"),)])
def test_values_that_are_equal_or_none_are_refused(values):
    with pytest.raises(UsageError, match=r"--hyper.lr needs numbers, each of them once, got"):
        sweeps.grid({"lr": values})


def test_members_that_do_not_split_over_the_devices_are_refused():
    with pytest.raises(UsageError, match="3 sweep members do not split over sweep=2"):
        sweeps.grid(Hyper(lr=(1.0, 2.0, 3.0)), divisor=2)
    with pytest.raises(UsageError, match=r"--hyper.lr needs at least one value"):
        sweeps.grid(Hyper(lr=()))
