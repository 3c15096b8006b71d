"""Evo: a latent space, a backbone, a schedule and a head for progression times, composed.

B batch, N tokens, P prompt tokens, V vocabulary, D latent dimension, W width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evo.core.bos import bos_slots
from evo.core.config import EvoConfig, preset
from evo.core.contract import as_batch, as_levels, as_mask, as_prompt, as_row_solver, as_stop, check_tokens, looks
from evo.core.denoiser import Denoiser, VectorField
from evo.core.evaluation import evaluating, measure
from evo.core.generation import Generation, generate
from evo.core.latent_space import Embeddings
from evo.core.masks import Causal, Window
from evo.core.objective import DEFAULT_OBJECTIVE, Objective, Output, training_step
from evo.core.prompted import Prompted
from evo.core.refinement import Request
from evo.core.serialization import load_pretrained, save_pretrained
from evo.core.transformer import Transformer
from evo.heads import Decoder, LinearDecoder, NucleusPrior, Readout, TimestepHead
from evo.schedules import Cosine, Path, Schedule, early_stop
from evo.solvers import Euler, Solver


class Evo(nn.Module):
    """A language model in which every token starts at a noise level of its own and is refined to a word.

    The same weights serve two halves: under a causal mask they sketch (output j speaks of token j+1), under a window mask they
    refine (every position of the window speaks of its own token).

    Args:
        latent_space: embeddings e(v), (V, D).
        backbone: latents (B, N, D) and levels (B, N) to hidden states (B, N, W), called like `Transformer`.
        schedule: the noise schedule; None is `Cosine()`.
        timestep_head: level of a token from the hidden state and context logits that speak of it; None is `TimestepHead(W)`.
        readout: context logits from hidden states (B, N, W) and embeddings (V, D); None is `Readout`, which shares the embeddings.
        bos: "attended" is a learned latent (D,) before the first token, which speaks of it and which every token sees; "detached", for
            networks pretrained without one, is a learned hidden state (W,) that speaks of the first token (evenly of all entries, at
            first) and that no token sees.
        config: what `save_pretrained` writes; None for a model composed by hand, which is loaded into a model composed alike.
    """

    def __init__(
        self,
        *,
        latent_space: Embeddings,
        backbone: Transformer,
        schedule: Schedule | None = None,
        timestep_head: nn.Module | None = None,
        readout: nn.Module | None = None,
        bos: str = "attended",
        config: EvoConfig | None = None,
    ) -> None:
        super().__init__()
        if latent_space.dim != backbone.dim:
            raise ValueError(
                f"the latent space has dimension {latent_space.dim}, the backbone takes {backbone.dim}; they must agree"
            )
        self.latent_space = latent_space
        self.backbone = backbone
        self.schedule = Cosine() if schedule is None else schedule
        self.timestep_head = TimestepHead(backbone.width) if timestep_head is None else timestep_head
        self.readout = (
            Readout(backbone.width, latent_space.dim, latent_space.vocab_size) if readout is None else readout
        )
        self.bos_slots = bos_slots(bos)
        if self.bos_slots:
            self.bos = nn.Parameter(torch.randn(latent_space.dim) * latent_space.radius * latent_space.dim**-0.5)
        else:
            self.bos = nn.Parameter(torch.zeros(backbone.width))
        self.config = config

    @classmethod
    def from_preset(cls, name: str, *, vocab_size: int, **overrides: Any) -> Evo:
        """A model of a named size with fresh weights; overrides are fields of `EvoConfig`.

        Raises:
            ValueError: for an unknown name or override, with the known ones.
        """
        return preset(name, vocab_size=vocab_size, **overrides).build()

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.backbone.positions - self.bos_slots

    # The two halves.

    def sketch(self, latents: Tensor, level: Tensor) -> Tensor:
        """The causal half: latents (B, N, D) at levels (B, N) -> hidden states (B, N, W); row i speaks of token i, from z_<i alone."""
        latents, level = self.behind_bos(latents[:, :-1], level[:, :-1])
        if self.bos_slots:
            return self.backbone(latents, level, mask=Causal())
        first = self.first_hidden(len(latents))
        return torch.cat([first, self.backbone(latents, level, mask=Causal())], 1) if level.shape[1] else first

    @property
    def self_conditioned(self) -> bool:
        """Whether refinement takes its own earlier estimate of the clean latents."""
        return self.backbone.self_conditioned

    def refine(
        self,
        latents: Tensor,
        level: Tensor,
        *,
        prompt: Tensor | None = None,
        end: Tensor | None = None,
        estimate: Tensor | None = None,
    ) -> Tensor:
        """The refining half: latents (B, N, D) at levels (B, N) -> hidden states (B, N, W); row i speaks of token i itself.

        Args:
            latents, level: prompt and window together.
            prompt: (B,) leading tokens that are prompt, None for none; their rows speak of the next token and see no window.
            end: (B,) tokens present, None for all.
            estimate: (B, N, D) an earlier estimate of the clean latents, for a network built with `self_conditioning`.
        """
        before = self.bos_slots
        index = torch.arange(latents.shape[1] + before, device=latents.device)
        begin = before if prompt is None else prompt + before
        own = index >= (begin if prompt is None else prompt[:, None] + before)
        mask = Window(begin, None if end is None else end + before)
        if estimate is not None:
            estimate = F.pad(estimate, (0, 0, before, 0))
        latents, level = self.behind_bos(latents, level)
        return self.backbone(latents, level, mask=mask, own=own, estimate=estimate)[:, before:]

    def behind_bos(self, latents: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, N, D) and levels (B, N) as the backbone reads them: with those of BOS before them, if it is attended."""
        if not self.bos_slots:
            return latents, level
        bos = self.bos.to(latents.dtype).expand(len(latents), 1, -1)
        return torch.cat([bos, latents], dim=1), F.pad(level, (1, 0))

    def first_hidden(self, batch: int) -> Tensor:
        """The hidden state (B, 1, W) of a detached BOS, which speaks of the first token."""
        return self.bos.expand(batch, 1, -1)

    # What callers use.

    def forward(
        self,
        tokens: Tensor,
        loss_mask: Tensor | None = None,
        levels: float | Tensor | None = None,
        prompt_length: int | Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        path: Path = early_stop,
        generator: torch.Generator | None = None,
        objective: Objective | None = None,
    ) -> Output:
        """The bound on -log p(tokens), and the loss.

        In training mode this is one stochastic step: levels explored, the integrand's weight capped, reconstruction from the evidence
        alone, and what the objective adds. In evaluation mode it is an unbiased estimate of the bound and nothing else.

        Args:
            tokens: ids, (B, N) int64.
            loss_mask: bool (B, N), what is scored; None is everything present. It says nothing about levels.
            levels: one level for all, (B, N), or None for those of the head.
            prompt_length: leading tokens that are prompt, int or (B,); they have level 0 and see no later token.
            lengths: (B,) tokens present in each right-padded sequence; None is all.
            path: how levels fall on the clock.
            generator: of all noise.
            objective: what training adds; None is `Objective()`.

        Raises:
            ValueError, TypeError: for anything out of shape or range, with the value and the remedy.
        """
        batch = as_batch(self, tokens, prompt_length, lengths)
        scored = as_mask(loss_mask, batch)
        chosen = as_levels(levels, batch, self.bos, look=looks(self))
        if self.training:
            refined = not isinstance(levels, (int, float)) or levels > self.schedule.t_min
            return training_step(
                self, batch, scored, chosen, path, generator, objective or DEFAULT_OBJECTIVE, refined=refined
            )
        return measure(self, batch, scored, chosen, path, generator, clock_values=1)

    def context_logits(self, tokens: Tensor) -> Tensor:
        """What an ordinary causal language model of these weights says: (B, N) -> (B, N, V); row i speaks of token i, from tokens < i."""
        check_tokens(self, tokens)
        embeddings = self.latent_space.weight
        latents = embeddings[tokens]
        hidden = self.sketch(latents, torch.zeros_like(latents[..., 0]))
        return self.readout(hidden, embeddings)

    @torch.no_grad()
    def log_prob(
        self,
        tokens: Tensor,
        levels: float | Tensor | None = 0.0,
        prompt_length: int | Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        path: Path = early_stop,
        clock_values: int = 8,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Minus the bound of each token, (B, N), in nats; exact at level 0, elsewhere from so many clock values a sequence."""
        batch = as_batch(self, tokens, prompt_length, lengths)
        chosen = as_levels(levels, batch, self.bos)
        with evaluating(self):
            return -measure(self, batch, batch.present, chosen, path, generator, clock_values).bound

    def vector_field(self, prompt: Tensor | None = None) -> VectorField:
        """The flow of a window behind a prompt (B, P): callable (latents (B, N, D), level (B, N)) -> velocity (B, N, D).

        The prompt is read once, here, and carries no gradient. Without one, windows of any batch size may follow.
        """
        if prompt is None:
            denoiser = Denoiser.of(self.latent_space, self.schedule)
            return VectorField(self._own_logits, denoiser, self.self_conditioned)
        check_tokens(self, prompt, "prompt", minimum=0)
        with torch.no_grad():
            state = Prompted(self, prompt, None, room=0)
        return state.field()

    def _own_logits(self, latents: Tensor, level: Tensor, estimate: Tensor | None = None) -> Tensor:
        return self.readout(self.refine(latents, level, estimate=estimate), self.latent_space.weight)

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        solver: Solver | None = None,
        plan: Path = early_stop,
        timestep_head: Callable[[Tensor, Tensor], Tensor] | None = None,
        prior: Callable[..., Tensor] | None = None,
        decoder: Decoder | None = None,
        max_steps: int = 20,
        top_p: float = 0.9,
        temperature: float = 0.7,
        window: int | None = None,
        lengths: Tensor | None = None,
        stop: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        trajectory: bool = False,
    ) -> Generation:
        """Write behind a prompt: sketch a window token by token, refine it along the flow, commit, go on with the next.

        Args:
            prompt: ids (B, P); P may be 0.
            max_new_tokens: M.
            solver: moves latents from one row of the plan to the next; None is `Euler()`. A fixed-step solver makes one step a row,
                an adaptive one integrates each row to its tolerance.
            plan: how levels fall, called `plan(levels, max_steps, t_min)`; `early_stop` is the paper's.
            timestep_head: levels from hidden state and context logits; None is the model's own.
            prior: draws a token from context logits (B, V); None is `NucleusPrior(top_p=..., temperature=...)`.
            decoder: takes a token from a refined latent; None is `LinearDecoder()`.
            max_steps: K, the steps that a token at level 1 receives.
            top_p, temperature: of the default prior; temperature 0 is greedy.
            window: tokens refined together; None is all of them, 1 is plain autoregression.
            lengths: (B,) lengths of right-padded prompts; None is all of P.
            stop: ids that end a sequence.
            generator: of everything drawn; the same seed gives the same text.
            trajectory: keep every row's levels and tokens.

        Raises:
            ValueError, TypeError: for a prompt or a setting that cannot be served, with the value and the remedy.
        """
        lengths = as_prompt(self, prompt, lengths, max_new_tokens)
        solver = as_row_solver(Euler() if solver is None else solver, max_steps)
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; it needs at least 1 token, or None for the whole answer")
        request = Request(
            max_new_tokens=max_new_tokens,
            solver=solver,
            plan=plan,
            timestep_head=self.timestep_head if timestep_head is None else timestep_head,
            prior=NucleusPrior(top_p=top_p, temperature=temperature) if prior is None else prior,
            decoder=LinearDecoder() if decoder is None else decoder,
            max_steps=max_steps,
            window=max_new_tokens if window is None else window,
            stop=as_stop(stop, self, prompt.device),
            generator=generator,
            trajectory=trajectory,
        )
        with evaluating(self):
            return generate(self, prompt, lengths, request)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write weights (safetensors) and `config.json` to a directory; a model already there is replaced at once, or not at all."""
        save_pretrained(self, path)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Evo:
        """The model of a directory, in evaluation mode.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, altered, of another version, or was composed by hand (see `load_weights`).
        """
        return load_pretrained(path)

    def load_weights(self, path: str | os.PathLike[str]) -> Evo:
        """Put the weights of a saved model into this one, which was composed alike; returns itself, in evaluation mode."""
        return load_pretrained(path, self)
