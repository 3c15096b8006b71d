"""Evo: a latent space, a backbone, a schedule and a head for progression times, composed.

B batch, N tokens, P prompt tokens, V vocabulary, D latent dimension, W width.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evo.core.bos import bos_slots
from evo.core.config import EvoConfig, preset
from evo.core.contract import as_batch, as_levels, as_mask, as_row_solver, check_tokens, looks
from evo.core.denoiser import Denoiser, VectorField
from evo.core.draws import Draws
from evo.core.editing import Edited, edit
from evo.core.evaluation import evaluating, measure
from evo.core.generation import Chunk, Generation, generate, stream
from evo.core.job import as_job
from evo.core.latent_space import Embeddings
from evo.core.masks import Causal, Window
from evo.core.objective import DEFAULT_OBJECTIVE, Objective, Output, training_step
from evo.core.prompted import Prompted
from evo.core.refinement import Request
from evo.core.serialization import load_pretrained, save_pretrained
from evo.core.transformer import Transformer
from evo.heads import Decoder, LinearDecoder, Prior, Readout, TimestepHead
from evo.schedules import Cosine, Path, Schedule, early_stop
from evo.solvers import Euler, Solver

# Tokens between two looks at what is being written where nobody waits for it: each look waits for the device, and a sequence that has
# ended is noticed at the next.
_UNWATCHED = 8


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
            state = Prompted(self, prompt, None, room=None)
        return state.field()

    def _own_logits(self, latents: Tensor, level: Tensor, estimate: Tensor | None = None) -> Tensor:
        return self.readout(self.refine(latents, level, estimate=estimate), self.latent_space.weight)

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int | Sequence[int] | Tensor,
        solver: Solver | None = None,
        plan: Path = early_stop,
        timestep_head: Callable[[Tensor, Tensor], Tensor] | None = None,
        prior: Prior | None = None,
        decoder: Decoder | None = None,
        max_steps: int = 20,
        top_p: float = 0.9,
        temperature: float = 0.7,
        window: int | None = None,
        lengths: Tensor | None = None,
        stop: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        min_new_tokens: int | Sequence[int] | Tensor = 0,
        refresh: int = 1,
        fidelity: float | None = None,
        trajectory: bool = False,
    ) -> Generation:
        """Write behind a prompt: sketch a window token by token, refine it along the flow, commit, go on with the next.

        What is said of the whole batch in `max_new_tokens`, `min_new_tokens`, `stop` and `generator` may be said of each sequence. A
        sequence that has ended leaves the batch. What is written of one does not depend on who else is in the batch, but for rounding:
        matrix products of other shapes may be summed in another order.

        Args:
            prompt: ids (B, P); P may be 0.
            max_new_tokens: the longest answer, int or (B,); M is the largest.
            solver: moves latents from one row of the plan to the next; None is `Euler()`. A fixed-step solver makes one step a row,
                an adaptive one integrates each row to its tolerance.
            plan: how levels fall, called `plan(levels, max_steps, t_min)`; `early_stop` is the paper's.
            timestep_head: levels from hidden state and context logits; None is the model's own.
            prior: draws a token from context logits (B, V) by a number in [0, 1) for each (B,); None is
                `NucleusPrior(top_p=..., temperature=...)`.
            decoder: takes a token from a refined latent; None is `LinearDecoder()`.
            max_steps: K, the steps that a token at level 1 receives.
            top_p, temperature: of the default prior; temperature 0 is greedy.
            window: tokens refined together; None is all of them, 1 is plain autoregression.
            lengths: (B,) lengths of right-padded prompts; None is all of P.
            stop: ids that end a sequence, or B sets of ids, one for each.
            generator: of everything drawn: one, or a sequence of B. Each gives one number for each of its sequences, which seeds that
                sequence's own stream; the same seed gives the same text.
            min_new_tokens: the shortest answer, int or (B,), a stop token included: before that stop tokens are not written. Equal to
                `max_new_tokens` it makes the length exact.
            refresh: every how many steps of a window all of it is computed; 1 is exact, more reuses keys and values of tokens that stand.
            fidelity: probability of its best entry from which a token is final before its steps are spent; None is never.
            trajectory: keep every row's levels and tokens.

        Raises:
            ValueError, TypeError: for a prompt or a setting that cannot be served, with the value and the remedy.
            ValueError: for weights that give NaN or infinity.
        """
        job = as_job(
            self,
            prompt,
            max_new_tokens,
            solver=solver,
            plan=plan,
            timestep_head=timestep_head,
            prior=prior,
            decoder=decoder,
            max_steps=max_steps,
            top_p=top_p,
            temperature=temperature,
            window=window,
            lengths=lengths,
            stop=stop,
            generator=generator,
            min_new_tokens=min_new_tokens,
            refresh=refresh,
            fidelity=fidelity,
            trajectory=trajectory,
            every=_UNWATCHED,
        )
        with evaluating(self):
            return generate(self, job)

    def stream(
        self, prompt: Tensor, max_new_tokens: int | Sequence[int] | Tensor, *, every: int = 1, **options: Any
    ) -> Generator[Chunk, None, None]:
        """What `generate` writes, as it becomes final; the chunks of a sequence, one behind another, are its tokens there.

        A token comes when it and everything before it in its sequence is final: where it was written at level 0, at once, else when its
        window has been refined. Closing the iterator (or letting go of it) frees all that it holds; between two chunks the model may
        be used for something else.

        Args:
            every: tokens that are sketched between two looks at them, each of which waits for the device.

        The options, and what is raised for them, are those of `generate`, all but `trajectory`; they are checked at once, not at the
        first chunk.
        """
        unknown = sorted(options.keys() - (_OPTIONS.keys() - {"trajectory"}))
        if unknown:
            raise TypeError(
                f"stream() takes no {', '.join(unknown)}; its options are those of generate, without trajectory"
            )
        job = as_job(self, prompt, max_new_tokens, **{**_OPTIONS, **options}, every=every)
        return stream(self, job)

    def edit(
        self,
        tokens: Tensor,
        levels: float | Tensor,
        prompt_length: int | Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        solver: Solver | None = None,
        plan: Path = early_stop,
        decoder: Decoder | None = None,
        max_steps: int = 20,
        refresh: int = 1,
        fidelity: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Edited:
        """Rewrite an existing text: noise chosen tokens to chosen levels, and let the flow make words of them, in view of all others.

        A token at level 0 comes back as it is. One at level 1 is written anew: where the schedule ends in pure noise, what it was leaves
        no trace. Between, the level says how much of a token is up for discussion.

        Args:
            tokens: ids (B, N), right-padded.
            levels: one level for all, or (B, N). Levels that are worth no step of `max_steps`, or at most the schedule's t_min, are 0.
            prompt_length: leading tokens that are prompt, int or (B,); they have level 0, and see no later token.
            lengths: (B,) tokens present in each sequence; None is all.
            solver, plan, decoder, max_steps, refresh, fidelity: as in `generate`; the window is all that follows the prompt.
            generator: of the noise; one for all or one for each sequence.

        Raises:
            ValueError, TypeError: for anything out of shape or range, with the value and the remedy.
        """
        batch = as_batch(self, tokens, prompt_length, lengths)
        chosen = as_levels(levels, batch, self.bos)
        if chosen is None:
            raise ValueError("levels is None; say which tokens to rewrite, by a level for all or (B, N) of them")
        request = Request(
            solver=as_row_solver(Euler() if solver is None else solver, max_steps),
            plan=plan,
            decoder=LinearDecoder() if decoder is None else decoder,
            max_steps=max_steps,
            window=tokens.shape[1],
            refresh=refresh,
            fidelity=fidelity,
        )
        with evaluating(self):
            return edit(self, batch, chosen, request, Draws.of(generator, len(tokens), tokens.device))

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


# The options of `Evo.generate` as it declares them, so that `Evo.stream` need not do so again.
_OPTIONS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(Evo.generate).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
