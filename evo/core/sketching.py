"""Sketching a window: token after token, or several in one pass, each at a level of its own.

B sequences of the window, A of them still being sketched, k tokens of one pass, N tokens of the window, V vocabulary, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evo.core.answers import levels_of, logits_of, outside, tokens_of, wrong_level
from evo.core.ends import Ends
from evo.core.masks import Causal
from evo.core.prompted import Prompted
from evo.heads import Prior
from evo.schedules import step_counts


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sketch: those arguments of `Evo.generate` that say so, checked.

    Attributes:
        timestep_head: levels from hidden states and context logits, where they are not given.
        prior: tokens from context logits.
        max_steps: K; a level that gets no step is 0.
        stride: tokens sketched in one pass.
        every: tokens between two looks of the host at what has been drawn.
    """

    timestep_head: Callable[[Tensor, Tensor], Tensor]
    prior: Prior
    max_steps: int
    stride: int
    every: int

    def refined(self, level: Tensor, t_min: float) -> Tensor:
        """Whether a token of this level gets any step."""
        return (step_counts(level, self.max_steps) >= 1) & (level > t_min)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Tokens of one sequence that have become final: its row in the window, the place of the first, ids, levels, whether it ends here."""

    row: int
    place: int
    tokens: list[int]
    levels: list[float]
    last: bool


class WindowSketch:
    """A window being sketched behind what `state` has read.

    A sequence that has ended is left out from the next look on. If nothing of it is to be refined, it leaves `state` too; else it stays
    there until refinement, and the others go on in a state of their own.

    Args:
        state: what precedes the window.
        noise: (B, N, D) standard normal.
        uniform: (B, N) in [0, 1).
        waiting: (B, N, D) standard normal and independent of `noise`: what the network sees where nothing is sketched yet. None for a
            stride of 1, where it sees no such place.
        given: (B, N) on the host, the levels of its tokens; None is to ask the head.
        ends: where the sequences end.
        start: new tokens before this window.
        how: how to sketch.

    Attributes:
        state: what precedes the sequences in `standing`, with the first `read` of their tokens.
        standing: rows of the window.
        tokens, latents, levels: (B, N) int64, (B, N, D) and (B, N); of them `size` columns are sketched.
        length: of each sequence, how many of its tokens are present.
        ended: of each, whether its last token is known.
        noisy: of each, whether anything is to be refined.
        shown: of each, how many tokens have been handed out.
        banned: what may not come in this window.
    """

    def __init__(
        self,
        state: Prompted,
        noise: Tensor,
        uniform: Tensor,
        waiting: Tensor | None,
        given: Tensor | None,
        ends: Ends,
        start: int,
        how: Sampling,
    ) -> None:
        batch, count = noise.shape[:2]
        self.state, self.ends, self.start, self.how = state, ends, start, how
        self.noise, self.uniform, self.waiting = noise, uniform, waiting
        self.standing, self.read, self.size = list(range(batch)), 0, 0
        self.tokens = torch.zeros(batch, count, dtype=torch.int64, device=noise.device)
        self.latents, self.levels = torch.zeros_like(noise), torch.zeros_like(noise[..., 0])
        self.length, self.shown = [count] * batch, [0] * batch
        self.ended, self.noisy = [False] * batch, [False] * batch
        self.banned = ends.banned(start, noise.device)
        schedule = state.denoiser.schedule
        self._t_min, self._given = schedule.t_min, None if given is None else given.to(noise)
        # Whether every token is final at once; and whether nothing of what is sketched remains: pure diffusion.
        self._still = given is not None and not how.refined(given, self._t_min).any()
        self._blind = given is not None and bool((given == 1).all() and schedule.signal(noise.new_ones(())) == 0)

    def run(self) -> Iterator[Run]:
        """Sketch the window, handing out what nothing can change any more, sequence by sequence in order.

        Raises:
            ValueError: for logits that are not finite, or a timestep head that gives no levels.
        """
        schedule = self.state.denoiser.schedule
        if self._blind:
            self.size, self.levels = self.tokens.shape[1], torch.ones_like(self.levels)
            self.latents = schedule.noised(self.latents, self.noise, self.levels)
            yield from self._look(self.standing, 0, self.tokens.tolist(), self.levels.tolist())
            return
        count, device = self.tokens.shape[1], self.tokens.device
        walker, active, rows, last = self.state, self.standing, torch.arange(len(self.standing), device=device), None
        while self.size < count and active:
            begin, until = self.size, min(self.size + self.how.every, count)
            columns = []
            while self.size < until:
                run = slice(self.size, min(self.size + self.how.stride, count))
                hidden, logits = self._speak(walker, last, run, rows)
                token, latent, level = self._draw(hidden, logits, run, rows)
                columns.append((token, latent, level, logits))
                last, self.size = (latent, level), run.stop
            if walker is self.state:
                self.read = self.size - columns[-1][0].shape[1]
            places, here = slice(None) if len(rows) == len(self.tokens) else rows, slice(begin, self.size)
            tokens, levels = (torch.cat([column[part] for column in columns], 1) for part in (0, 2))
            drawn, chosen = tokens.tolist(), levels.tolist()
            _check([column[3] for column in columns], chosen)
            self.tokens[places, here] = tokens
            if not self._still:
                self.latents[places, here] = torch.cat([column[1] for column in columns], 1)
                self.levels[places, here] = levels
            yield from self._look(active, begin, drawn, chosen)
            going = [place for place, row in enumerate(active) if not self.ended[row]]
            if going and len(going) < len(active):
                index = torch.tensor(going, device=device)
                if walker is self.state and not any(self.ended[row] and self.noisy[row] for row in active):
                    walker.select(index)
                    self.standing = [active[place] for place in going]
                else:
                    walker = walker.take(index)
                rows = rows[index]
                last = last and (last[0][index], last[1][index])
            active = [active[place] for place in going]

    def _speak(
        self, walker: Prompted, last: tuple[Tensor, Tensor] | None, run: slice, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (A, k, W) and context logits (A, k, V) of the places of a run, behind the latest tokens, which are read now.

        The first place is spoken of by the token before it, as in a plain sketch, the others, where there are any, by themselves.
        """
        if self.waiting is None:
            if last is not None:
                walker.read(*last)
            hidden = walker.hidden
        else:
            waiting = self._of(self.waiting, rows, run)
            latents, level = (waiting[:, :0], waiting[:, :0, 0]) if last is None else last
            own = walker.look_ahead(latents, level, waiting, Causal())
            hidden = torch.cat([walker.hidden, own[:, 1:]], 1)
        return hidden, logits_of(walker.model.readout, hidden, walker.denoiser.embeddings)

    def _draw(self, hidden: Tensor, logits: Tensor, run: slice, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (A, k), latents (A, k, D) and levels (A, k) of a run, from the hidden states (A, k, W) and logits (A, k, V) of it."""
        allowed = logits
        if self.banned is not None:
            allowed = self.banned(logits, rows[:, None], torch.arange(run.start, run.stop, device=rows.device))
        uniform = self._of(self.uniform, rows, run)
        token = tokens_of(self.how.prior, allowed.flatten(0, 1), uniform.flatten()).view_as(uniform)
        clean = self.state.denoiser.embeddings[token].to(self.noise.dtype)
        if self._still:
            return token, clean, torch.zeros_like(clean[..., 0])
        if self._given is None:
            level = levels_of(self.how.timestep_head, hidden, logits).to(clean.dtype)
        else:
            level = self._of(self._given, rows, run)
        refined = self.how.refined(level, self._t_min)
        # What is no level stays what it is, for the host to see.
        level = torch.where(refined | outside(level), level, 0.0)
        noised = self.state.denoiser.schedule.noised(clean, self._of(self.noise, rows, run), level)
        return token, torch.where(refined.unsqueeze(-1), noised, clean), level

    def _of(self, values: Tensor, rows: Tensor, run: slice) -> Tensor:
        columns = values[:, run]
        return columns if len(rows) == len(columns) else columns[rows]

    def _look(self, active: list[int], begin: int, tokens: list[list[int]], levels: list[list[float]]) -> Iterator[Run]:
        for row, drawn, noise in zip(active, tokens, levels, strict=True):
            live = [level > 0 for level in noise]
            end = self.ends.end(row, self.start + begin, drawn, [not each for each in live])
            if end is not None:
                self.length[row], self.ended[row] = begin + end, True
                drawn, noise, live = drawn[:end], noise[:end], live[:end]
            final = 0 if self.noisy[row] else [*live, True].index(True)
            self.noisy[row] |= any(live)
            if final:
                self.shown[row] += final
                last = self.ended[row] and not self.noisy[row]
                yield Run(row=row, place=begin, tokens=drawn[:final], levels=noise[:final], last=last)


def _check(logits: list[Tensor], levels: list[list[float]]) -> None:
    """Raise ValueError for logits (A, k, V) of runs, one behind another, that are not finite, or for what is no level."""
    # The latest tokens see all others: what is not finite anywhere has reached them.
    if all(0 <= level <= 1 for row in levels for level in row) and logits[-1].isfinite().all():
        return
    begin = 0
    for run in logits:
        if not run.isfinite().all():
            break
        end = begin + run.shape[1]
        if wrong := [level for row in levels for level in row[begin:end] if not 0 <= level <= 1]:
            raise wrong_level(wrong[0])
        begin = end
    raise ValueError("the network gave NaN or infinite logits while sketching; look for such values in its weights")
