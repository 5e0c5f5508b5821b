"""Steering of diffusion models: samplers of the tilt that learn nothing.

`steering` (twists and potentials), `correctors` and `svdd` sample by weights, `tree` by search, on the `kernels` of a
model; `energy`, `universal`, `adaptive` and `forecasting` guide its predictions and steps; `discrete` and `anchored` do
the same for tokens, `simplex` between tokens and vectors; `restarts` keeps the best of several runs; `teleport` skips
steps, `adjoint` differentiates through them.
"""
