"""Decoding of language models: sampling with transforms of the logits, beams, speculation."""

from esscher.samplers.decoding.beams import (
    Beams,
    StochasticBeams,
    beam_search,
    log_inclusion_weights,
    stochastic_beam_search,
)
from esscher.samplers.decoding.generation import Generation, generate, greedy
from esscher.samplers.decoding.speculative import DraftCounts, speculative_accept, speculative_generate
from esscher.samplers.decoding.transforms import (
    logit_bias,
    min_p,
    repetition_penalty,
    stateless,
    temperature,
    token_mask,
    top_k,
    top_p,
    typical_p,
)

__all__ = [
    "Beams",
    "DraftCounts",
    "Generation",
    "StochasticBeams",
    "beam_search",
    "generate",
    "greedy",
    "log_inclusion_weights",
    "logit_bias",
    "min_p",
    "repetition_penalty",
    "speculative_accept",
    "speculative_generate",
    "stateless",
    "stochastic_beam_search",
    "temperature",
    "token_mask",
    "top_k",
    "top_p",
    "typical_p",
]
