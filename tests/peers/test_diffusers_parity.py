"""The solvers end where diffusers' do, driven by the same network under EDM's preconditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import schedules
from esscher.models import preconditioning
from esscher.samplers import integrate, steppers

diffusers = pytest.importorskip("diffusers", reason="needs the extra `peers`: pip install 'esscher[peers]'")
torch = pytest.importorskip("torch", reason="needs the extra `peers`: pip install 'esscher[peers]'")

SIGMA_DATA = 0.6
START = 80.0 * np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def network(module, x, noise_level):
    """A bounded, asymmetric function of state and noise level, in NumPy's dialect of either library."""
    return module.tanh(1.3 * x + 0.2 * noise_level[:, None] - 0.1) - 0.2 * module.sin(x + 0.5)


def theirs(scheduler, n):
    scheduler.set_timesteps(n)
    x = torch.tensor(START)
    for t in scheduler.timesteps:
        out = network(torch, scheduler.scale_model_input(x, t), t.expand(5))
        x = scheduler.step(out, t, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize(
    ("stepper", "scheduler"),
    [(steppers.dpm_solver_pp_2m, "EDMDPMSolverMultistepScheduler"), (steppers.euler, "EDMEulerScheduler")],
)
def test_solver_ends_where_diffusers_does(stepper, scheduler, n):
    denoise = preconditioning.edm_denoiser(lambda _, x, level: network(jnp, x, level), SIGMA_DATA)
    schedule = schedules.edm()
    predictor = preconditioning.denoiser_predictor(lambda x, t: denoise(None, x, t), schedule)
    ours = integrate(jax.random.key(0), stepper(schedule), predictor, jnp.asarray(START), schedules.edm_times(n))
    peer = getattr(diffusers, scheduler)(sigma_min=0.002, sigma_max=80.0, sigma_data=SIGMA_DATA, rho=7.0)
    np.testing.assert_allclose(ours, theirs(peer, n), atol=2e-5)
