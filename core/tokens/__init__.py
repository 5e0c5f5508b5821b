"""Log-probabilities of tokens, masked reductions, segments: what every loss on sequences stands on."""

from esscher.core.tokens.linear import (
    TokenStatistics,
    linear_token_kl,
    linear_token_logps,
    linear_token_statistics,
)
from esscher.core.tokens.logps import sequence_logp, shared_prefix_sequence_logp, token_entropy, token_logps
from esscher.core.tokens.reductions import (
    How,
    aggregate,
    masked_mean,
    masked_quantile,
    masked_rank,
    masked_var,
    masked_whiten,
)
from esscher.core.tokens.segments import (
    segment_broadcast,
    segment_ends,
    segment_mean,
    segment_positions,
    segment_scatter,
    segment_sum,
)

__all__ = [
    "How",
    "TokenStatistics",
    "aggregate",
    "linear_token_kl",
    "linear_token_logps",
    "linear_token_statistics",
    "masked_mean",
    "masked_quantile",
    "masked_rank",
    "masked_var",
    "masked_whiten",
    "segment_broadcast",
    "segment_ends",
    "segment_mean",
    "segment_positions",
    "segment_scatter",
    "segment_sum",
    "sequence_logp",
    "shared_prefix_sequence_logp",
    "token_entropy",
    "token_logps",
]
