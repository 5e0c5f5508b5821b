"""Solvers of the reverse process, one function each: `schedule -> Stepper`.

They are written with the data term and the noise term of a prediction apart, so that guidance may differ between the
two (CFG++). With `lam = log(alpha / sigma)` a step from `t` to `s` has `h = lam(s) - lam(t) > 0`.
"""

from esscher.samplers.steppers.ddim import ancestral, ddim
from esscher.samplers.steppers.euler import edm_stochastic, euler, heun

__all__ = ["ancestral", "ddim", "edm_stochastic", "euler", "heun"]
