"""The choice of a backend, call by call, and its reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evo.core.backends.base import Backend, Call, needs_gradient
from evo.core.backends.flex import Flex
from evo.core.backends.sdpa import Sdpa
from evo.core.backends.xformers import Xformers
from evo.core.pattern import Pattern

SDPA = Sdpa()


@dataclass(frozen=True)
class Auto(Backend):
    """The first of several backends that can serve a call and gains something by it; the reference if there is none.

    Args:
        candidates: in order of preference.
        reference: serves whatever they do not.
    """

    candidates: tuple[Backend, ...] = (SDPA, Xformers(), Flex())
    reference: Backend = SDPA

    name: ClassVar[str] = "auto"

    def choose(self, call: Call) -> Backend:
        """The backend for a call."""
        for backend in self.candidates:
            if not backend.reasons_against(call) and backend.reason_for(call) is not None:
                return backend
        return self.reference

    def reasons_against(self, call: Call) -> tuple[str, ...]:
        return self.choose(call).reasons_against(call)

    def reason_for(self, call: Call) -> str | None:
        return self.choose(call).reason_for(call)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float = 0.0) -> Tensor:
        return self(q, k, v, pattern, dropout)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float = 0.0) -> Tensor:
        """As `Backend.__call__`; the choice is made once a pass."""
        asked = (self.name, q.dtype, q.device, q.shape[3], needs_gradient(q, k, v), dropout)
        chosen = pattern.once(asked, lambda: self.choose(Call.of(q, k, v, pattern, dropout)))
        return chosen.attend(q, k, v, pattern, dropout)


auto = Auto()


@dataclass(frozen=True)
class Explanation:
    """Why a call goes where it goes.

    Attributes:
        chosen: name of the backend that serves it.
        reasons: for each backend by name, whether it can serve the call, and the sentences that speak for or against it.
    """

    chosen: str
    reasons: dict[str, tuple[bool, tuple[str, ...]]]

    def __str__(self) -> str:
        lines = []
        for name, (able, sentences) in self.reasons.items():
            mark = "chosen" if name == self.chosen else "able" if able else "unable"
            lines.append(f"{name:10}{mark:8}{'; '.join(sentences)}")
        return "\n".join(lines)


def explain(call: Call, among: Auto = auto) -> Explanation:
    """Which backend `auto` picks for a call, and what speaks for or against each of them."""
    reasons = {}
    for backend in dict.fromkeys((*among.candidates, among.reference)):
        against = backend.reasons_against(call)
        reason = backend.reason_for(call) if not against else None
        reasons[backend.name] = (not against, against or (reason or "nothing is gained over the reference",))
    return Explanation(among.choose(call).name, reasons)
