"""From a hidden state to what it says of a token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Readout(nn.Module):
    """Context logits that share the embeddings of the latent space: <linear(h), e(v)> + bias(v).

    Embeddings on a sphere cannot carry how frequent a token is in their length, so the bias does.

    Args:
        width: W of the hidden states.
        dim: D of the embeddings.
        vocab_size: V.
    """

    def __init__(self, width: int, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        # Small enough that an untrained model says nearly nothing, whatever the radius of the embeddings.
        nn.init.normal_(self.linear.weight, std=0.1 * width**-0.5)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Hidden states (..., W) and embeddings (V, D) -> logits (..., V), float32 or wider."""
        query = self.linear(hidden.to(self.linear.weight.dtype))
        logits = query @ embeddings.to(query.dtype).T + self.bias
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
