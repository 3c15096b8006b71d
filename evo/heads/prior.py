"""Drawing a token from the context distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NucleusPrior:
    """Nucleus sampling (Holtzman et al. 2020) of a token from logits (paper §2.4: p = .9, temperature .7).

    Args:
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1]; at least one token is kept.
        temperature: divides the logits, before the nucleus is cut; 0 takes the most probable token.
        processors: functions of logits (..., V) applied first, in order: bans and biases.
    """

    top_p: float = 0.9
    temperature: float = 0.7
    processors: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or positive and finite")

    def log_probs(self, logits: Tensor) -> Tensor:
        """The log of the distribution that is drawn from, in nats: (..., V) -> (..., V), -inf outside the nucleus."""
        for process in self.processors:
            logits = process(logits)
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
        logits = logits / self.temperature
        if self.top_p == 1:
            return logits.log_softmax(-1)
        sorted_probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
        # A token stays while those before it have not yet reached top_p; the first always does.
        dropped = sorted_probs.cumsum(-1) - sorted_probs >= self.top_p
        outside = torch.zeros_like(dropped).scatter(-1, order, dropped)
        return logits.masked_fill(outside, -torch.inf).log_softmax(-1)

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (..., V) -> token ids (...)."""
        if self.temperature == 0:
            for process in self.processors:
                logits = process(logits)
            return logits.argmax(-1)
        probs = self.log_probs(logits).exp()
        drawn = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
        return drawn.reshape(probs.shape[:-1])
