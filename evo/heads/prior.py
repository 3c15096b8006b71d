"""Drawing a token from the context distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor


class Prior(Protocol):
    """What draws tokens: a function of logits (..., V) and one number in [0, 1) for each token (...), giving ids (...).

    Chance comes from outside, so that a token depends on its own logits and its own number, and on nothing else in its batch.
    """

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor: ...


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
        for name, value in (("top_p", self.top_p), ("temperature", self.temperature)):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} is {value!r}; it needs a number, such as 0.7")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        # Logits of float32 divided by less overflow, and what is drawn from infinities is any token.
        if self.temperature != 0 and not 1e-30 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy), or finite and at least 1e-30")

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
        _, kept, order = self._nucleus(logits)
        outside = torch.zeros_like(kept).scatter(-1, order, ~kept)
        return logits.masked_fill(outside, -torch.inf).log_softmax(-1)

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Logits (..., V) and numbers (...) in [0, 1) -> token ids (...), by inversion of the cumulative distribution."""
        for process in self.processors:
            logits = process(logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_p == 1:
            order, mass = None, logits.softmax(-1).cumsum(-1)
            total = mass[..., -1:]
        else:
            mass, kept, order = self._nucleus(logits)
            total = mass.masked_fill(~kept, 0.0).amax(-1, keepdim=True)
        # Strictly below the whole, also where the product is rounded up: the token found has a probability above 0.
        cut = torch.minimum(uniform.unsqueeze(-1) * total, total * (1 - torch.finfo(total.dtype).eps))
        # Counted, not searched for: of NaN, which nothing exceeds, that is still an id.
        found = (mass <= cut).sum(-1)
        return found if order is None else order.gather(-1, found.unsqueeze(-1)).squeeze(-1)

    def _nucleus(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens by falling probability: the mass of each with all before it, whether it is kept, and its id, (..., V) each."""
        probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
        mass = probs.cumsum(-1)
        # A token stays while those before it have not yet reached top_p; the first always does.
        return mass, mass - probs < self.top_p, order
