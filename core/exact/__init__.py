"""Testbeds whose tilts are known exactly: what samplers and objectives are scored against."""

from esscher.core.exact import gaussians, quadrature
from esscher.core.exact.mixtures import GaussianMixture

__all__ = ["GaussianMixture", "gaussians", "quadrature"]
