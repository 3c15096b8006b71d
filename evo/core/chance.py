"""What one call of the model draws: for all its sequences at once, or for each from a generator of its own.

B batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Chance:
    """Random numbers for the B sequences of a call.

    Args:
        generator: one for all, None for torch's own, or a sequence of B. With a sequence, what is drawn for a sequence depends on its own
            generator alone: the same numbers, bit for bit, in whatever batch it sits.
        batch: B.
        common: draws what all sequences share; None is `generator` if it is one, else torch's own.

    Raises:
        TypeError, ValueError: for anything else, or a sequence of generators that are not B.
    """

    def __init__(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        batch: int,
        common: torch.Generator | None = None,
    ) -> None:
        check_generators(generator, batch)
        if generator is None or isinstance(generator, torch.Generator):
            common = generator if common is None else common
        self._generator = generator
        self._batch = batch
        self._common = common

    def take(self, places: Sequence[int]) -> Chance:
        """What draws for the sequences at the given places alone."""
        generator = self._generator
        if generator is not None and not isinstance(generator, torch.Generator):
            generator = [generator[place] for place in places]
        return Chance(generator, len(places), self._common)

    def normal(self, *shape: int, like: Tensor) -> Tensor:
        """Standard normal noise (B, *shape), on the device of `like`, in its dtype or float32, whichever is wider."""
        # Not `randn`, which with a generator takes no lengths that torch.compile keeps symbolic; the numbers are the same.
        dtype = torch.promote_types(like.dtype, torch.float32)
        drawn = torch.empty(self._batch, *shape, device=like.device, dtype=dtype)
        for values, generator in self._sources(drawn):
            values.normal_(generator=generator)
        return drawn

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """Numbers in [0, 1), (B, *shape), with the dtype and on the device of `like`."""
        drawn = torch.empty(self._batch, *shape, device=like.device, dtype=like.dtype)
        for values, generator in self._sources(drawn):
            values.uniform_(generator=generator)
        return drawn

    def shared(self, like: Tensor) -> Tensor:
        """One number in [0, 1) for all sequences, (1,), with the dtype and on the device of `like`."""
        return torch.empty(1, device=like.device, dtype=like.dtype).uniform_(generator=self._common)

    def _sources(self, drawn: Tensor) -> list[tuple[Tensor, torch.Generator | None]]:
        """What is to be filled, and by which generator."""
        if self._generator is None or isinstance(self._generator, torch.Generator):
            return [(drawn, self._generator)]
        return list(zip(drawn.unbind(), self._generator, strict=True))


def check_generators(generator: torch.Generator | Sequence[torch.Generator] | None, batch: int) -> None:
    """One for all, None, or a sequence of `batch`; raises TypeError or ValueError for anything else."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, Sequence) or not all(isinstance(each, torch.Generator) for each in generator):
        raise TypeError(
            f"generator is {generator!r}; it needs a torch.Generator, such as torch.Generator().manual_seed(0), one for all or "
            "one for each sequence, or None"
        )
    if len(generator) != batch:
        raise ValueError(f"generator has {len(generator)} of them; {batch} sequences need one for all, or {batch}")
