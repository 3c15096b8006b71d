"""Lossless speculation: the flow guesses what the causal half is going to write, and one causal pass checks the whole guess.

A round writes at level 0 behind a text whose last token has not been read yet:

1. One pass reads that token and looks at the next k + 1 places as noise. The token speaks of the first place, which is drawn as ever;
   the places speak of themselves, and are guessed, if asked for in further steps down the flow.
2. One pass reads the first token and the k guesses. Each speaks of the token behind it, which is drawn as ever. As long as what is drawn is
   what was guessed, the next draw is right too; the first that differs is itself right, and what was read behind it is forgotten.

Every token written is drawn by the prior from the causal logits behind the tokens before it, by the number that is its position's
due. So it is the token that plain generation draws, whatever was guessed. That is rejection sampling with a point for a proposal
(Leviathan et al. 2023): a guess x is accepted with probability p(x), and what comes in its place is distributed as p without x. What is
guessed is the token that the flow finds most probable. (A guess drawn by the number that will check it agrees for certain where flow and
causal half do, but the flow, which does not know what comes between, is the flatter of the two: it agreed half as often.)

B sequences being written, k guesses, M new tokens, V vocabulary, D latent dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evo.core.answers import logits_of, tokens_of
from evo.core.contract import as_count
from evo.core.draws import Draws
from evo.core.ends import Ends
from evo.core.masks import Causal, Window
from evo.core.prompted import Prompted
from evo.core.sketching import Run
from evo.heads import Prior


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How to guess tokens for the causal half to check. It changes how fast a text is written, not the text.

    A round of `steps` + 1 passes writes at least two tokens, and at most `run` + 2.

    Args:
        run: the most tokens guessed in a round, at least 1. After a round it is twice what was accepted, and two more, up to this.
        steps: evaluations of the flow, at even distances from level 1 down, at least 1.
        causal: guess by the parallel sketch, in which a place sees only those before it, and not by the flow. That is one evaluation.
    """

    run: int = 8
    steps: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("run", "steps"):
            as_count(name, getattr(self, name))
        if self.causal and self.steps > 1:
            raise ValueError(
                f"steps is {self.steps} and causal is True; a parallel sketch is one evaluation: leave steps at 1, or "
                "causal out for the flow"
            )


def speculate(
    state: Prompted, draws: Draws, ends: Ends, prior: Prior, how: Speculation, accepted: list[list[int]]
) -> Iterator[Run]:
    """Write at level 0 behind what `state` has read, handing out tokens round by round; `accepted` takes those of each sequence.

    Raises:
        ValueError: for logits that are not finite.
    """
    embeddings = state.denoiser.embeddings
    device, most = embeddings.device, max(ends.most)
    noise, uniform = draws.take(most, embeddings)
    writer = _Writer(noise, uniform[..., 0], ends, prior, how)
    rows, written, hopes = list(range(len(noise))), [0] * len(noise), [how.run] * len(noise)
    last = noise[:, :0]
    while rows:
        # Besides the guesses a round writes one token before and one behind them, and only the latter need not be read.
        room = max(ends.most[row] - written[row] for row in rows) - 2
        if state.cache.limit is not None:
            # Who is ahead of the others guesses no further than the cache goes; nobody needs its last slot for a guess, and where some
            # have a suffix, it lies behind the last position of those that have none.
            room = min(room, state.cache.limit - state.cache.length - last.shape[1] - 2)
        count = max(0, min(max(hopes[row] for row in rows), room))
        starts = [written[row] for row in rows]
        drawn, agreed, finite = writer.round(state, last, rows, starts, count)
        found = torch.cat([drawn, agreed, finite.long()], 1).tolist()
        if not all(each[-1] for each in found):
            raise ValueError(
                "the network gave NaN or infinite logits while speculating; look for such values in its weights"
            )
        matches = [each[-2] for each in found]
        state.forget(torch.tensor([count - each for each in matches]))
        staying = []
        for place, (row, each, right) in enumerate(zip(rows, found, matches, strict=True)):
            tokens = each[: right + 2]
            end = ends.end(row, written[row], tokens)
            tokens = tokens[:end]
            accepted[row].append(min(right, len(tokens) - 1))
            yield Run(row=row, place=written[row], tokens=tokens, levels=[0.0] * len(tokens), last=end is not None)
            written[row] += len(tokens)
            hopes[row] = min(how.run, 2 * right + 2)
            if end is None:
                staying.append(place)
        agreed = agreed[:, 0]
        if len(staying) < len(rows):
            rows = [rows[place] for place in staying]
            if not rows:
                return
            chosen = torch.tensor(staying, device=device)
            state.select(chosen)
            drawn, agreed = drawn[chosen], agreed[chosen]
        last = embeddings[drawn.gather(1, agreed[:, None] + 1)].to(noise.dtype)


class _Writer:
    """One round at a time, for those sequences that have not ended.

    Args:
        noise: (B, M, D) standard normal.
        uniform: (B, M) in [0, 1).
    """

    def __init__(self, noise: Tensor, uniform: Tensor, ends: Ends, prior: Prior, how: Speculation) -> None:
        self.noise, self.uniform, self.prior, self.how = noise, uniform, prior, how
        self.banned = ends.banned(0, noise.device)

    def round(
        self, state: Prompted, last: Tensor, rows: list[int], starts: list[int], count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Guess `count` tokens behind the next one, and check them. `state` has then read the next token and all guesses.

        Args:
            last: (A, n, D) what was written last and has not been read, n at most 1.
            rows: A sequences of the batch.
            starts: new tokens that each has.
            count: k.

        Returns:
            The tokens drawn, (A, k + 2), of which so many guesses, (A, 1), are right, and whether all logits were finite, (A, 1).
        """
        device, embeddings = self.noise.device, state.denoiser.embeddings
        sequence, start = torch.tensor([rows, starts], device=device)[..., None]
        places = start + torch.arange(count + 2, device=device)
        # What would stand behind the longest answer is drawn too, by any number, and never handed out.
        held = places.clamp(max=self.noise.shape[1] - 1)
        noise, uniform = self.noise[sequence, held], self.uniform[sequence, held]

        def allowed(logits: Tensor, here: slice) -> Tensor:
            return logits if self.banned is None else self.banned(logits, sequence, places[:, here])

        def draw(logits: Tensor, here: slice) -> Tensor:
            flat = allowed(logits, here).flatten(0, 1)
            return tokens_of(self.prior, flat, uniform[:, here].flatten()).view(logits.shape[:2])

        level = noise.new_zeros(last.shape[:2])
        mask = Causal() if self.how.causal else Window(state.cache.lengths + last.shape[1])
        hidden = state.look_ahead(last, level, noise[:, :-1], mask)
        spoken = state.speak().unsqueeze(1)
        guesses = first = draw(spoken, slice(0, 1))
        if count:
            own = logits_of(state.model.readout, hidden[:, 1:], embeddings)
            if not self.how.causal:
                own = self._flow(state, noise[:, 1:-1], own, embeddings[first].to(noise.dtype))
            guesses = torch.cat([first, allowed(own, slice(1, -1)).argmax(-1)], 1)
        read = state.read(embeddings[guesses].to(noise.dtype), noise.new_zeros(guesses.shape))
        logits = logits_of(state.model.readout, read, embeddings)
        drawn = torch.cat([first, draw(logits, slice(1, None))], 1)
        agreed = (drawn[:, 1:-1] == guesses[:, 1:]).long().cumprod(1).sum(1, keepdim=True)
        finite = spoken.isfinite().flatten(1).all(1) & logits.isfinite().flatten(1).all(1)
        return drawn, agreed, finite.unsqueeze(1)

    def _flow(self, state: Prompted, noise: Tensor, logits: Tensor, first: Tensor) -> Tensor:
        """Log p(v|z) of the places to guess, (A, k, V), at the end of a few steps down the flow, which starts from noise (A, k, D).

        The steps are DDIM's (Song et al. 2021): x̂ with the noise that it implies, at the next level.

        Args:
            logits: what the network says of the noise, (A, k, V).
            first: the latent of the first place, (A, 1, D), which is a word from the first step on.
        """
        denoiser, field = state.denoiser, state.field()
        schedule, level = denoiser.schedule, torch.ones_like(noise[..., 0])
        latents = schedule.noise(level).unsqueeze(-1) * noise
        for step in range(1, self.how.steps):
            clean = denoiser(logits, latents, level).latents
            noise = schedule.noise_from_denoised(latents, clean, level)
            level = torch.full_like(level, 1 - (1 - schedule.t_min) * step / self.how.steps)
            latents = schedule.noised(clean, noise, level)
            estimate = F.pad(clean, (0, 0, 1, 0)) if field.self_conditioned else None
            logits = field.network(torch.cat([first, latents], 1), F.pad(level, (1, 0)), estimate)[:, 1:]
        return denoiser.log_posterior(logits, latents, level)
