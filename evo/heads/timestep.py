"""At which noise level should the next token be sketched?

Every head here is called as `head(hidden, context_logits) -> levels`: hidden states (..., W) and context logits (..., V) of the
position that speaks of a token, levels (...) in [0, 1] of that token, float32 or as wide as the logits. It sees nothing of the token
itself.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimestepHead(nn.Module):
    """The learned progression time: a two-layer MLP with GELU and a sigmoid (paper, appendix 7.1).

    An optimizer such as Adam moves every weight by about its rate whatever the size of the gradient, and a level that is to become 0 or 1
    has a long way to go in its logit. So the logit is `gain` times what the MLP gives.

    Args:
        width: W of the hidden states.
        hidden: of the MLP; None is width // 4.
        initial_level: the level every token gets before training, in (0, 1).
        gain: of the logit, above 0; 1 is the plain MLP.
    """

    def __init__(self, width: int, hidden: int | None = None, initial_level: float = 0.5, gain: float = 10.0) -> None:
        super().__init__()
        if not 0 < initial_level < 1:
            raise ValueError(
                f"initial_level is {initial_level}; a sigmoid reaches only levels strictly between 0 and 1"
            )
        if not 0 < gain < math.inf:
            raise ValueError(f"gain is {gain}; it must be finite and above 0")
        self.gain = float(gain)
        hidden = max(1, width // 4) if hidden is None else hidden
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, math.log(initial_level / (1 - initial_level)) / gain)

    def forward(self, hidden: Tensor, context_logits: Tensor) -> Tensor:
        """(..., W), (..., V) -> levels (...) in [0, 1], float32 or wider; of the logits only the dtype is used."""
        logit = self.outer(F.gelu(self.inner(hidden.to(self.inner.weight.dtype)))).squeeze(-1)
        return (self.gain * logit.to(_level_dtype(context_logits))).sigmoid()

    def extra_repr(self) -> str:
        return f"gain={self.gain:g}"


class FixedTimestep(nn.Module):
    """The same level for every token: 0 is autoregression, 1 is diffusion.

    Args:
        value: the level, in [0, 1].
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        if not 0 <= value <= 1:
            raise ValueError(f"value is {value}; a level lies in [0, 1]")
        self.value = float(value)

    def forward(self, hidden: Tensor, context_logits: Tensor) -> Tensor:
        """(..., W), (..., V) -> levels (...), all of them `value`."""
        return context_logits.new_full(context_logits.shape[:-1], self.value, dtype=_level_dtype(context_logits))

    def extra_repr(self) -> str:
        return f"value={self.value}"


class EntropyTimestep(nn.Module):
    """The paper's heuristic: the less the context says of a token, the higher its level.

    t = ((H(pi) / ln V - low) / (high - low)) clamped to [0, 1], then raised to `power`: a monotone map of the entropy H of the
    context distribution pi.

    Args:
        low, high: the relative entropies that are mapped to level 0 and level 1, 0 <= low < high <= 1.
        power: above 0; below 1 lifts the levels between.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, power: float = 1.0) -> None:
        super().__init__()
        if not (0 <= low < high <= 1 and power > 0):
            raise ValueError(f"low {low}, high {high}, power {power}: needed 0 <= low < high <= 1 and power > 0")
        self.low, self.high, self.power = low, high, power

    def forward(self, hidden: Tensor, context_logits: Tensor) -> Tensor:
        """(..., W), (..., V) -> levels (...) in [0, 1]."""
        log_p = context_logits.log_softmax(-1, dtype=_level_dtype(context_logits))
        p = log_p.exp()
        # A logit of -inf is a token that cannot come; it has no share in the entropy.
        entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
        relative = entropy / math.log(context_logits.shape[-1])
        share = ((relative - self.low) / (self.high - self.low)).clamp(0, 1)
        # A power below 1 is infinitely steep at 0; there its gradient is 0, as that of the clamp is.
        positive = share > 0
        return torch.where(positive, share.where(positive, 1.0) ** self.power, 0.0)

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}, power={self.power}"


def _level_dtype(context_logits: Tensor) -> torch.dtype:
    """That of the logits, float32 at least: bfloat16 has 128 levels between 0.5 and 1."""
    return torch.promote_types(context_logits.dtype, torch.float32)
