"""TRL's chunked head on given hidden states, for comparisons; needs torch and trl."""

import types
from typing import Any

import numpy as np

__all__ = ["model"]


def model(hidden: np.ndarray, unembedding: np.ndarray, chunk: int | None, device: str = "cpu") -> Any:
    """A torch module whose call gives log-probabilities of labels, as TRL's functions ask of a model.

    Args:
      hidden: `[B, T + 1, D]`, of which the last place predicts nothing; a parameter.
      unembedding: `[D, V]`; a parameter, transposed.
      chunk: entries of the vocabulary in a tile; `None` for TRL's unchunked form.
      device: torch's.
    """
    import torch
    from trl.trainer import utils

    class Model(torch.nn.Module):
        """Hidden states under a head."""

        def __init__(self):
            super().__init__()
            self.states = torch.nn.Parameter(torch.tensor(hidden))
            self.head = torch.nn.Linear(*unembedding.shape, bias=False)
            self.head.weight = torch.nn.Parameter(torch.tensor(unembedding.T).contiguous())
            self.config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace())

        def base_model(self, **_):
            return types.SimpleNamespace(last_hidden_state=self.states)

        def get_output_embeddings(self):
            return self.head

        def forward(self, labels, **_):
            logp = utils.selective_log_softmax(self.head(self.states[:, :-1]), labels[:, 1:].clamp(min=0))
            return utils.FusedCausalLMOutput(log_probs=logp.masked_fill(labels[:, 1:] == -100, 0))

    made = Model().to(device)
    if chunk:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = chunk  # TRL has no argument for it
        utils.add_fused_lm_head(made)
    return made
