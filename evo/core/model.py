"""Evo: a latent space, a backbone, a schedule and a head for progression times, composed.

B batch, N tokens, P prompt tokens, V vocabulary, D latent dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from evo.core.answers import logits_of
from evo.core.chance import Chance
from evo.core.config import preset
from evo.core.contract import (
    Lengths,
    Stop,
    as_batch,
    as_count,
    as_levels,
    as_mask,
    as_objective,
    as_part,
    as_row_solver,
    check_path,
    check_tokens,
    looks,
)
from evo.core.denoiser import Denoiser, VectorField
from evo.core.draws import Draws
from evo.core.editing import Edited, edit
from evo.core.evaluation import evaluating, measure
from evo.core.generation import Chunk, Generation, generate, stream
from evo.core.infilling import as_infill
from evo.core.job import as_job, as_options
from evo.core.network import Network
from evo.core.objective import Objective, Output, training_step
from evo.core.part import Part
from evo.core.prompted import Prompted
from evo.core.refinement import Request
from evo.core.serialization import load_pretrained, save_pretrained
from evo.core.speculation import Speculation
from evo.heads import Decoder, LinearDecoder, Prior
from evo.schedules import Path, early_stop
from evo.solvers import Euler, Solver

# Tokens between two looks at what is being written where nobody waits for it: each look waits for the device, and a sequence that has
# ended is noticed at the next.
_UNWATCHED = 8


class Evo(Network):
    """A language model in which every token starts at a noise level of its own and is refined to a word.

    It is composed of the parts that `Network` takes, by name: `Evo(latent_space=..., backbone=..., schedule=...)`; or `from_preset`
    composes it.
    """

    @classmethod
    def from_preset(cls, name: str, *, vocab_size: int, **overrides: Any) -> Evo:
        """A model of a named size with fresh weights; overrides are fields of `EvoConfig`.

        Raises:
            ValueError: for an unknown name or override, with the known ones.
        """
        return preset(name, vocab_size=vocab_size, **overrides).build()

    def forward(
        self,
        tokens: Tensor,
        loss_mask: Tensor | None = None,
        levels: float | Tensor | None = None,
        prompt_length: Lengths | None = None,
        *,
        lengths: Lengths | None = None,
        suffix_length: Lengths | None = None,
        documents: Tensor | None = None,
        path: Path = early_stop,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        objective: Objective | None = None,
        part: Part | None = None,
    ) -> Output:
        """The bound on -log p(tokens), and the loss.

        In training mode this is one stochastic step: levels explored, the integrand's weight capped, reconstruction from the evidence
        alone, and what the objective adds. In evaluation mode it is an unbiased estimate of the bound and nothing else.

        Args:
            tokens: ids, (B, N) int64.
            loss_mask: bool (B, N), what is scored; None is everything present. It says nothing about levels.
            levels: one level for all, a tensor (B, N), (B, 1) or (1, N) of them, or None for those of the head.
            prompt_length: leading tokens that are prompt, int or (B,); they have level 0 and see no later token.
            lengths: (B,) tokens present in each right-padded sequence; None is all.
            suffix_length: of these, the trailing ones that are clean context on the right, int or (B,). They have level 0, see the prompt
                and one another, and are seen by the window in both halves. They have no bits and are never scored: the bits of the
                window bound -log p(window | prompt, suffix), of which what a suffix costs is no part.
            documents: ids (B, N) int64 of documents packed into a sequence, one behind another. None sees another, in either half, and each
                token has the bits that it would have if its document were alone. None is one document a sequence.
            path: how levels fall on the clock.
            generator: of all noise: one, or a sequence of B. With a sequence, each sequence's noise comes from its own generator alone,
                the same bit for bit in whatever batch it sits.
            objective: what training adds; None is `Objective()`.
            part: which part of a step's batch these sequences are; None is a whole batch. Losses of all parts add up to that of the
                whole, and so do gradients, if each sequence has a generator of its own, and dropout is off.

        Raises:
            ValueError, TypeError: for anything out of shape or range, with the value and the remedy.
        """
        batch = as_batch(self, tokens, prompt_length, lengths, suffix_length, documents)
        scored = as_mask(loss_mask, batch)
        chosen = as_levels(levels, tokens.shape, self.bos, look=looks(self))
        part = as_part(part, batch, scored)
        check_path(path)
        chance = Chance(generator, len(tokens), part.common)
        if self.training:
            refined = not isinstance(levels, (int, float)) or levels > self.schedule.t_min
            asked = as_objective(objective)
            return training_step(self, batch, scored, chosen, path, chance, part, asked, refined=refined)
        return measure(self, batch, scored, chosen, path, chance, part, clock_values=1)

    def context_logits(self, tokens: Tensor) -> Tensor:
        """What an ordinary causal language model of these weights says: (B, N) -> (B, N, V); row i speaks of token i, from tokens < i."""
        check_tokens(self, tokens)
        embeddings = Denoiser.of(self.latent_space, self.schedule).embeddings
        latents = embeddings[tokens]
        hidden = self.sketch(latents, torch.zeros_like(latents[..., 0]))
        return logits_of(self.readout, hidden, embeddings)

    @torch.no_grad()
    def log_prob(
        self,
        tokens: Tensor,
        levels: float | Tensor | None = 0.0,
        prompt_length: Lengths | None = None,
        *,
        lengths: Lengths | None = None,
        suffix_length: Lengths | None = None,
        documents: Tensor | None = None,
        path: Path = early_stop,
        clock_values: int = 8,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Minus the bound of each token, (B, N), in nats; exact at level 0, elsewhere from so many clock values a sequence, at least 1.

        Raises:
            ValueError, TypeError: for anything out of shape or range, with the value and the remedy.
        """
        clock_values = as_count("clock_values", clock_values)
        check_path(path)
        batch = as_batch(self, tokens, prompt_length, lengths, suffix_length, documents)
        chosen = as_levels(levels, tokens.shape, self.bos)
        with evaluating(self):
            chance, part = Chance(generator, len(tokens)), as_part(None, batch, batch.present)
            return -measure(self, batch, batch.present, chosen, path, chance, part, clock_values).bound

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
        return logits_of(self.readout, self.refine(latents, level, estimate=estimate), self.latent_space.weight)

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: Lengths,
        solver: Solver | None = None,
        plan: Path = early_stop,
        timestep_head: Callable[[Tensor, Tensor], Tensor] | None = None,
        prior: Prior | None = None,
        decoder: Decoder | None = None,
        max_steps: int = 20,
        top_p: float = 0.9,
        temperature: float = 0.7,
        window: int | None = None,
        lengths: Lengths | None = None,
        stop: Stop = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        min_new_tokens: Lengths = 0,
        refresh: int = 1,
        fidelity: float | None = None,
        stride: int = 1,
        speculation: Speculation | None = None,
        trajectory: bool = False,
        levels: float | Tensor | None = None,
    ) -> Generation:
        """Write behind a prompt: sketch a window token by token, refine it along the flow, commit, go on with the next.

        What is said of the whole batch in `max_new_tokens`, `min_new_tokens`, `stop` and `generator` may be said of each sequence. A
        sequence that has ended leaves the batch. What is written of one does not depend on who else is in the batch, but for rounding
        (matrix products of other shapes may be summed in another order), and but for an adaptive solver, which chooses its steps for all. A
        level that is worth no step of `max_steps`, or at most the schedule's t_min, is 0: such a token is written autoregressively.

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
            max_steps: K, the steps that a token at level 1 receives; one at level t receives K·t, rounded down.
            top_p, temperature: of the default prior; temperature 0 is greedy.
            window: tokens refined together; None is all of them, 1 is plain autoregression.
            lengths: (B,) lengths of right-padded prompts; None is all of P.
            stop: an id or ids that end a sequence, or B sets of ids, one for each.
            generator: of everything drawn: one, or a sequence of B. Each gives one number for each of its sequences, which seeds that
                sequence's own stream; the same seed gives the same text.
            min_new_tokens: the shortest answer, int or (B,), a stop token included: before that stop tokens are not written. Equal to
                `max_new_tokens` it makes the length exact.
            refresh: every how many steps of a window all of it is computed; 1 is exact, more reuses keys and values of tokens that stand.
            fidelity: probability of its best entry from which a token is final before its steps are spent; None is never.
            stride: tokens sketched in one pass, each but the first in ignorance of those between; 1 is the plain sketch, and `window` at
                level 1 diffusion.
            speculation: write at level 0, the same text in fewer passes: the flow guesses, the causal half checks. None is not to guess.
            trajectory: keep every row's levels and tokens.
            levels: of the new tokens, instead of those of a head: one for all, or a tensor (B, M), (B, 1) or (1, M) of them.

        Raises:
            ValueError, TypeError: for a prompt or a setting that cannot be served, with the value and the remedy.
            ValueError: for weights that give NaN or infinity, a head that gives no levels, or a prior or decoder that gives no ids.
            SolverError: for an adaptive solver that cannot go on.
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
            stride=stride,
            speculation=speculation,
            levels=levels,
            every=_UNWATCHED,
        )
        with evaluating(self):
            return generate(self, job)

    def stream(
        self, prompt: Tensor, max_new_tokens: Lengths, *, every: int = 1, **options: Any
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
        job = as_job(
            self, prompt, max_new_tokens, **as_options(self.generate, "stream", options, {"trajectory"}), every=every
        )
        return stream(self, job)

    def infill(
        self,
        prefix: Tensor,
        suffix: Tensor,
        length: Lengths | None = None,
        *,
        max_length: Lengths | None = None,
        min_length: Lengths = 0,
        prefix_lengths: Lengths | None = None,
        suffix_lengths: Lengths | None = None,
        **options: Any,
    ) -> Generation:
        """Write between a prefix and a suffix, in view of both: what `generate` does, with clean context on the right.

        Both halves of the network see the suffix, so that any level serves, from plain autoregression (`levels=0`) to pure noise
        (`levels=1`, which needs no sketch). Prefix and suffix are read once. A model has to be trained for it, see
        `suffix_length` of `forward`. Behind a detached BOS the first token of an empty prefix is sketched without sight of the suffix.

        Args:
            prefix, suffix: ids (B, P) and (B, S), right-padded; either may be empty.
            length: tokens between them, int or (B,).
            max_length: instead of `length`, the most tokens there may be. The suffix stands behind so many places; a text that a stop token
                ends earlier leaves the rest of them empty.
            min_length: beside `max_length`, the fewest, a stop token included.
            prefix_lengths, suffix_lengths: (B,) tokens present in each; None is all.

        The options, and what is raised for them, are those of `generate`, all but `lengths` and `min_new_tokens`.

        Returns:
            What was written between the two, and nothing else.

        Raises:
            ValueError, TypeError: for texts or a setting that cannot be served, with the value and the remedy.
        """
        given = as_options(self.generate, "infill", options, {"lengths", "min_new_tokens"}) | {"every": _UNWATCHED}
        job = as_infill(self, prefix, suffix, length, max_length, min_length, prefix_lengths, suffix_lengths, given)
        with evaluating(self):
            return generate(self, job)

    def edit(
        self,
        tokens: Tensor,
        levels: float | Tensor,
        prompt_length: Lengths | None = None,
        *,
        lengths: Lengths | None = None,
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
            levels: one level for all, or a tensor (B, N), (B, 1) or (1, N) of them. Levels that are worth no step of `max_steps`, or at
                most the schedule's t_min, are 0.
            prompt_length: leading tokens that are prompt, int or (B,); they have level 0, and see no later token.
            lengths: (B,) tokens present in each sequence; None is all.
            solver, plan, decoder, max_steps, refresh, fidelity: as in `generate`; the window is all that follows the prompt. The plan is
                made of all levels (B, N): an order (`by_order`) has N entries, one for each token of the text, prompt included.
            generator: of the noise; one for all or one for each sequence.

        Raises:
            ValueError, TypeError: for anything out of shape or range, with the value and the remedy.
            ValueError: for weights that give NaN or infinity, or a decoder that gives no ids.
            SolverError: for an adaptive solver that cannot go on.
        """
        batch = as_batch(self, tokens, prompt_length, lengths)
        chosen = as_levels(levels, tokens.shape, self.bos)
        if chosen is None:
            raise ValueError("levels is None; say which tokens to rewrite, by a level for all or (B, N) of them")
        max_steps = as_count("max_steps", max_steps)
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
