"""Pure JAX functions that move a distribution to its exponential tilt, p*(x) ∝ p(x) exp(r(x)/beta).

The rooms are imported one by one (`from esscher.objectives import score`), so that a user of one pays for no other.
"""

__version__ = "0.1.0"
