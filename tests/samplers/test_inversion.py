"""Inversion undoes DDIM: exactly where the noise terms do not depend on the state, to first order elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.core.contracts import Prediction
from esscher.samplers import guidance, integrate, invert, steppers

pytestmark = pytest.mark.usefixtures("x64")

EDM, COSINE, VP = schedules.edm(), schedules.cosine(), schedules.vp_linear()


def round_trip(predictor, x, times, schedule):
    up = invert(predictor, x, times, schedule)
    return integrate(jax.random.key(0), steppers.ddim(schedule), predictor, up, times)


def known_noise(level, schedule):
    """A predictor whose noise term depends on time but not on the state."""

    def predict(x, t):
        t = t[:, None]
        noise = jnp.broadcast_to(level * jnp.cos(3 * t), x.shape)
        return Prediction((x - schedule.sigma(t) * noise) / schedule.alpha(t), noise)

    return predict


@pytest.mark.parametrize("guide", [guidance.cfg, guidance.cfg_plus_plus])
@pytest.mark.parametrize(("schedule", "t_max"), [(EDM, 5.0), (COSINE, 0.9)], ids=["edm", "cosine"])
def test_a_round_trip_is_exact_where_noise_terms_do_not_depend_on_the_state(guide, schedule, t_max):
    predictor = guide(known_noise(1.3, schedule), known_noise(-0.4, schedule), 0.6)
    x, times = jnp.array([[0.4, -2.0], [1.0, 0.3]]), schedules.uniform_times(4, t_max)
    np.testing.assert_allclose(round_trip(predictor, x, times, schedule), x, rtol=1e-12)
    middle = times[:3]  # nor need the grid reach the data
    np.testing.assert_allclose(round_trip(predictor, x, middle, schedule), x, rtol=1e-12)


def test_inversion_follows_the_exact_flow_upwards_at_first_order(line):
    x, errors = jnp.linspace(-1.5, 2.5, 7)[:, None], []
    truth = line.flow(COSINE, x, 0.1, 0.9)
    for n in (64, 128):
        times = schedules.log_snr_times(n, COSINE, 0.9, 0.1)
        up = jax.jit(lambda x, times: invert(line.predictor(COSINE), x, times, COSINE))(x, times)
        errors.append(float(jnp.abs(up - truth).max()))
    assert errors[1] < 0.03
    assert 0.85 < np.log2(errors[0] / errors[1]) < 1.2


def test_cfg_plus_plus_inverts_as_cfg_does_at_the_weight_it_equals(line):
    """With swapped roles the way up is that of CFG at w_t = l / (1 - e^-h), as the way down is: on one grid, one error.

    So what makes CFG++ invertible is that its equivalent weight shrinks to l as the steps grow.
    """
    cond, uncond = line._replace(weights=jnp.array([0.01, 0.99])).predictor(VP), line.predictor(VP)
    times = schedules.log_snr_times(3, VP, 1.0, 0.01)  # all steps have the same h
    h = float(jnp.diff(VP.log_snr_half(times))[0])
    x = jnp.linspace(-1.5, 2.5, 5)[:, None]
    ups = [
        invert(predictor, x, times, VP)
        for predictor in (
            guidance.cfg_plus_plus(cond, uncond, 0.6),
            guidance.cfg(cond, uncond, 0.6 / -np.expm1(-h)),
        )
    ]
    np.testing.assert_allclose(*ups, rtol=1e-9)


def test_cfg_plus_plus_inverts_where_cfg_does_not(line):
    """Ten steps up and down again, at the weights the paper calls comparable (l = 0.2, 0.6 and w = 2.5, 7.5).

    Two well separated classes, one of them asked for, data from both, whose spread is 1: CFG++ misses the data by less
    than 0.25 and 0.75, CFG by 2.5 and 7.5, more than eight times as much.
    """
    classes = line._replace(
        weights=jnp.array([0.5, 0.5]), means=jnp.array([-1.0, 1.0]), variances=jnp.array([0.05, 0.05])
    )
    only_second = type(line)(jnp.ones(1), classes.means[1:], classes.variances[1:])
    cond, uncond = only_second.predictor(VP), classes.predictor(VP)
    x, times = classes.sample(jax.random.key(0), 200), schedules.uniform_times(10)

    @jax.jit
    def error(guide_all, w, x):
        plain, plus = (guide(cond, uncond, w) for guide in (guidance.cfg, guidance.cfg_plus_plus))
        predictor = lambda x, t: jax.tree.map(lambda a, b: jnp.where(guide_all, a, b), plain(x, t), plus(x, t))  # noqa: E731
        return jnp.sqrt(jnp.mean((round_trip(predictor, x, times, VP) - x) ** 2))

    for w, weight_plus, bound in ((2.5, 0.2, 0.25), (7.5, 0.6, 0.75)):
        cfg, cfg_plus_plus = error(True, w, x), error(False, weight_plus, x)
        assert cfg > 2.0
        assert cfg_plus_plus < bound
        assert cfg > 8 * cfg_plus_plus


def test_from_pure_noise_the_round_trip_is_as_near_as_from_a_little_below(line):
    """The step up to `alpha = 0` leaves the state as it is."""
    x, predictor = jnp.linspace(-1.5, 2.5, 5)[:, None], line.predictor(COSINE)
    errors = []
    for t_max in (1.0, 0.999):
        times = schedules.uniform_times(20, t_max)
        np.testing.assert_allclose(invert(predictor, x, times[:2], COSINE), x, atol=0.0 if t_max == 1.0 else 0.01)
        errors.append(np.abs(jax.jit(lambda times: round_trip(predictor, x, times, COSINE))(times) - x).max())
    assert errors[0] < 1.1 * errors[1]


def test_bad_input_is_rejected(line):
    predictor, x = line.predictor(COSINE), jnp.zeros((2, 1))
    with pytest.raises(ValueError, match="times must be strictly decreasing"):
        invert(predictor, x, jnp.array([0.0, 0.5, 0.9]), COSINE)
    with pytest.raises(ValueError, match="x must be of a floating type, got int"):
        invert(predictor, x.astype(int), jnp.array([0.9, 0.0]), COSINE)
    with pytest.raises(ValueError, match=r"predictor must return a Prediction\(data, noise\), got tuple"):
        invert(lambda x, t: (x, x), x, [0.9, 0.0], COSINE)
