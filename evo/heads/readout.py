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
        bias: whether there is bias(v).
    """

    def __init__(self, width: int, dim: int, vocab_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        # Small enough that an untrained model says nearly nothing, whatever the radius of the embeddings.
        nn.init.normal_(self.linear.weight, std=0.1 * width**-0.5)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Hidden states (..., W) and embeddings (V, D) -> logits (..., V), float32 or wider."""
        query = self.linear(hidden.to(self.linear.weight.dtype))
        logits = query @ embeddings.to(query.dtype).T
        if self.bias is not None:
            logits = logits + self.bias
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class TiedReadout(nn.Module):
    """Context logits <h, E(v)> of a pretrained model whose output and input embeddings are one, read off latents that begin with a·E(v).

    Args:
        width: W of the hidden states, and of E(v).
        scale: a.
    """

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.width, self.scale = width, scale

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Hidden states (..., W) and embeddings (V, D) -> logits (..., V), float32 or wider."""
        logits = (hidden / self.scale) @ embeddings[:, : self.width].to(hidden.dtype).T
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def extra_repr(self) -> str:
        return f"width={self.width}, scale={self.scale}"


class LinearReadout(nn.Module):
    """Context logits by a table of their own, <h, w(v)>.

    Args:
        width: W of the hidden states.
        vocab_size: V.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.linear.weight, std=0.1 * width**-0.5)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Hidden states (..., W) -> logits (..., V), float32 or wider; the embeddings are not needed."""
        logits = self.linear(hidden.to(self.linear.weight.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
