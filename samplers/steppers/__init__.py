"""Solvers of the reverse process, one function each: `schedule -> Stepper`.

They are written with the data term and the noise term of a prediction apart, so that guidance may differ between the
two (CFG++). With `lam = log(alpha / sigma)` a step from `t` to `s` has `h = lam(s) - lam(t) > 0`.
"""

from esscher.samplers.steppers.ddim import ancestral, ddim
from esscher.samplers.steppers.dpm_solver import dpm_solver_1, dpm_solver_2, dpm_solver_3
from esscher.samplers.steppers.euler import edm_stochastic, euler, heun
from esscher.samplers.steppers.multistep import dpm_solver_pp_2m, sde_dpm_solver_pp_2m
from esscher.samplers.steppers.unipc import unipc

__all__ = [
    "ancestral",
    "ddim",
    "dpm_solver_1",
    "dpm_solver_2",
    "dpm_solver_3",
    "dpm_solver_pp_2m",
    "edm_stochastic",
    "euler",
    "heun",
    "sde_dpm_solver_pp_2m",
    "unipc",
]
