"""Windows to refine, and the dense computation that the gathered one is held to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from evo import Evo
from evo.core.denoiser import Denoiser, VectorField
from evo.core.prompted import Prompted
from evo.core.refinement import Request, SketchedWindow, Steps, refine
from evo.heads import LinearDecoder
from evo.schedules import Path, early_stop, step_counts
from evo.solvers import Euler, FixedStep, Solver


@dataclass(frozen=True, kw_only=True)
class Case:
    """Prompts (B, P) of `lengths` (B,), and noisy windows behind them."""

    prompt: Tensor
    lengths: Tensor
    sketch: SketchedWindow

    @classmethod
    def draw(
        cls,
        model: Evo,
        seed: int,
        *,
        batch: int = 3,
        size: int = 6,
        max_steps: int = 5,
        ragged: bool = True,
        levels: Tensor | None = None,
    ) -> Case:
        """Random tokens, noise and levels, exact 0s and 1s among them; with `ragged`, prompts and windows of different lengths.

        The numbers for decoders that draw are all different, so that a decoder can tell tokens apart by them.
        """
        draws = torch.Generator().manual_seed(seed)
        embeddings = model.latent_space.weight.detach()
        vocabulary, dim = embeddings.shape
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        prompt = torch.randint(0, vocabulary, (batch, 5), generator=draws)
        lengths = torch.randint(0, 6, (batch,), generator=draws) if ragged else torch.full((batch,), 5)
        length = torch.randint(0, size + 1, (batch,), generator=draws) if ragged else None
        if levels is None:
            levels = (1.4 * torch.rand(batch, size, generator=draws, dtype=torch.float64) - 0.2).clamp(0, 1)
            # Sequences that need much and sequences that need nothing.
            levels = levels * torch.rand(batch, 1, generator=draws, dtype=torch.float64).round(decimals=0)
        levels = levels.to(dtype)
        refined = (step_counts(levels, max_steps) >= 1) & (levels > model.schedule.t_min)
        if length is not None:
            refined &= torch.arange(size) < length[:, None]
        levels = torch.where(refined, levels, 0.0)
        tokens = torch.randint(0, vocabulary, (batch, size), generator=draws)
        noise = torch.randn(batch, size, dim, generator=draws, dtype=torch.float64).to(dtype)
        clean = embeddings[tokens].to(dtype)
        latents = torch.where(refined[..., None], model.schedule.noised(clean, noise, levels), clean)
        uniform = torch.arange(batch * size).reshape(batch, size) / (batch * size)
        sketch = SketchedWindow(tokens=tokens, latents=latents, levels=levels, uniform=uniform, length=length)
        return cls(prompt=prompt, lengths=lengths, sketch=sketch)

    def request(self, **options: object) -> Request:
        """How to refine these windows; Euler, early stop, 5 steps unless told otherwise."""
        usual = {
            "solver": Euler(),
            "plan": early_stop,
            "decoder": LinearDecoder(),
            "max_steps": 5,
            "window": self.sketch.tokens.shape[1],
            "trajectory": True,
        }
        return Request(**{**usual, **options})

    def state(self, model: Evo) -> Prompted:
        """The prompts, read."""
        with torch.no_grad():
            return Prompted(model, self.prompt, self.lengths, room=self.sketch.tokens.shape[1])

    def refined(self, model: Evo, **options: object) -> tuple[Tensor, int, Steps]:
        """What the library makes of it."""
        with torch.no_grad():
            tokens, nfe, steps = refine(self.state(model), self.sketch, self.request(**options))
        assert steps is not None
        return tokens, nfe, steps

    def alone(self, row: int) -> Case:
        """One of the sequences, without padding."""
        size, start = self.sketch.tokens.shape[1], int(self.lengths[row])
        end = size if self.sketch.length is None else int(self.sketch.length[row])
        sketch = self.sketch
        return Case(
            prompt=self.prompt[row : row + 1, :start],
            lengths=self.lengths[row : row + 1],
            sketch=SketchedWindow(
                tokens=sketch.tokens[row : row + 1, :end],
                latents=sketch.latents[row : row + 1, :end],
                levels=sketch.levels[row : row + 1, :end],
                uniform=sketch.uniform[row : row + 1, :end],
                length=None,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Watched(LinearDecoder):
    """A decoder that remembers what it was told of each token, by the token's number."""

    seen: dict[float, Tensor] = field(default_factory=dict)

    def __call__(self, logits: Tensor, denoised: Tensor, embeddings: Tensor, uniform: Tensor) -> Tensor:
        self.seen.update(zip(uniform.tolist(), logits, strict=True))
        return super().__call__(logits, denoised, embeddings, uniform)

    def of(self, uniform: Tensor) -> Tensor:
        """The log-probabilities (N, V) that tokens of these numbers (N,) were decoded from, 0 where they were not."""
        nothing = torch.zeros_like(next(iter(self.seen.values())))
        return torch.stack([self.seen.get(number, nothing) for number in uniform.tolist()])


@dataclass(frozen=True, kw_only=True)
class Dense:
    """What the dense computation finds.

    Attributes:
        tokens: (N,).
        log_probs: (N, V), what each token was decoded from; 0 where it was not.
        nfe: evaluations.
        rows: rows in which something moves.
        steps: (N,) of them, those in which each token moved.
    """

    tokens: Tensor
    log_probs: Tensor
    nfe: int
    rows: int
    steps: Tensor


@torch.no_grad()
def dense(
    model: Evo, case: Case, solver: Solver, plan: Path = early_stop, max_steps: int = 5, fidelity: float | None = None
) -> Dense:
    """One sequence: every token of prompt and window, in every row in which something moves, without a cache."""
    assert isinstance(solver, FixedStep)
    assert len(case.prompt) == 1
    prompt, sketch = case.prompt, case.sketch
    before, count = prompt.shape[1], 0
    embeddings = model.latent_space.weight
    clean = embeddings[prompt].to(sketch.latents.dtype)
    estimate = None

    def network(latents: Tensor, level: Tensor, *_: object) -> Tensor:
        nonlocal count
        count += 1
        both, levels = torch.cat([clean, latents], 1), torch.cat([level.new_zeros(1, before), level], 1)
        given = None if estimate is None else torch.cat([torch.zeros_like(clean), estimate], 1)
        hidden = model.refine(both, levels, prompt=torch.tensor([before]), estimate=given)
        return model.readout(hidden[:, before:], embeddings)

    field = VectorField(network, Denoiser.of(model.latent_space, model.schedule))
    rows = plan(sketch.levels, max_steps, model.schedule.t_min)
    tokens, latents, memory = sketch.tokens, sketch.latents, None
    log_probs = torch.zeros(*tokens.shape, len(embeddings), dtype=latents.dtype)
    busy, steps = 0, torch.zeros_like(tokens)
    for row in range(max_steps):
        level, after = rows[:, row], rows[:, row + 1]
        moves = level != after
        if not moves.any():
            continue
        busy, steps = busy + 1, steps + moves
        first = field.denoise(latents, level)
        if fidelity is not None:
            settled = moves & (first.log_probs.exp().amax(-1) >= fidelity)
            rows = torch.cat([rows[:, : row + 1], rows[:, row + 1 :].masked_fill(settled[:, None], 0.0)], 1)
            after = rows[:, row + 1]
        lands = moves & (after == 0)
        if (moves & ~lands).any():
            moved, memory = solver.step(field, latents, level, torch.where(lands, level, after), memory)
            latents = torch.where((moves & ~lands)[..., None], moved, latents)
        log_probs = torch.where(lands[..., None], first.log_probs, log_probs)
        tokens = torch.where(lands, first.log_probs.argmax(-1), tokens)
        latents = torch.where(lands[..., None], embeddings[tokens].to(latents.dtype), latents)
        if model.self_conditioned:
            estimate = first.latents
    return Dense(tokens=tokens[0], log_probs=log_probs[0], nfe=count, rows=busy, steps=steps[0])
