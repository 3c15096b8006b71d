"""Chance, dealt out sequence by sequence and position by position.

B batch, n tokens, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evo.core.chance import check_generators

# Positions that numbers are drawn for at a time: a call to a generator costs as much as many numbers.
_RUN = 64
# Turns the seed of a stream into that of its other; any pattern of bits would do.
_APART = 0x9E3779B9
# Between the seeds of streams that are numbered; any odd number would do.
_STRIDE = 0x85EBCA6B


class Draws:
    """Random numbers for a batch: each sequence has a stream of its own, and each position of it the numbers that are its due.

    What is written at a position can then depend neither on who else is in the batch nor on how the text is divided into windows.

    Args:
        generators: one a sequence, all on one device.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = list(generators)
        self._noise: Tensor | None = None
        self._uniform: Tensor | None = None

    @classmethod
    def of(
        cls, generator: torch.Generator | Sequence[torch.Generator] | None, batch: int, device: torch.device
    ) -> Draws:
        """Streams for `batch` sequences, seeded by one number each from their own generator, or from the one of all (None is torch's own).

        A caller's generator moves by these numbers only, whatever becomes of the text.

        Raises:
            TypeError, ValueError: for anything else, or a sequence of generators that are not `batch`.
        """
        check_generators(generator, batch)
        if generator is None or isinstance(generator, torch.Generator):
            seeds = _seeds(generator, batch)
        else:
            seeds = [seed for each in generator for seed in _seeds(each, 1)]
        return cls([torch.Generator(device).manual_seed(seed) for seed in seeds])

    def apart(self) -> Draws:
        """Other streams for the same sequences, as good as independent of these, which stay where they are."""
        return Draws(
            [torch.Generator(each.device).manual_seed(each.initial_seed() ^ _APART) for each in self._generators]
        )

    def numbered(self, number: int, rows: Sequence[int]) -> list[torch.Generator]:
        """For each of these sequences a stream begun anew, as good as independent of all others and of those of any other number."""
        chosen = [self._generators[row] for row in rows]
        return [
            torch.Generator(each.device).manual_seed(each.initial_seed() + _STRIDE * (number + 1)) for each in chosen
        ]

    def take(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """For the next `count` positions of each sequence, standard normal noise (B, n, D) and numbers in [0, 1), (B, n, 2).

        `like` (..., D) gives D, device, and the dtype: its own or float32, whichever is wider.
        """
        noise, uniform = self._noise, self._uniform
        missing = count - (0 if noise is None else noise.shape[1])
        if missing > 0:
            fresh = self._fresh(-(-missing // _RUN), like)
            noise, uniform = (
                new if old is None else torch.cat([old, new], 1)
                for old, new in zip((noise, uniform), fresh, strict=True)
            )
        assert noise is not None
        assert uniform is not None
        self._noise, self._uniform = noise[:, count:], uniform[:, count:]
        return noise[:, :count], uniform[:, :count]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences, in this order."""
        self._generators = [self._generators[row] for row in rows]
        if self._noise is not None and self._uniform is not None:
            index = torch.tensor(rows, device=self._noise.device)
            self._noise, self._uniform = self._noise[index], self._uniform[index]

    def _fresh(self, runs: int, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype, batch = torch.promote_types(like.dtype, torch.float32), len(self._generators)
        noise = torch.empty(batch, runs, _RUN, like.shape[-1], dtype=dtype, device=like.device)
        uniform = torch.empty(batch, runs, _RUN, 2, dtype=dtype, device=like.device)
        for row, generator in enumerate(self._generators):
            for run in range(runs):
                noise[row, run].normal_(generator=generator)
                uniform[row, run].uniform_(generator=generator)
        return noise.flatten(1, 2), uniform.flatten(1, 2)


def _seeds(generator: torch.Generator | None, count: int) -> list[int]:
    device = "cpu" if generator is None else generator.device
    return torch.empty(count, dtype=torch.int64, device=device).random_(generator=generator).tolist()
