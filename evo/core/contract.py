"""The one place where what callers hand to a model is checked.

B batch, N tokens, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo.core.bound import Batch
from evo.solvers import FixedStep, Solver, TorchDiffEq

if TYPE_CHECKING:
    from evo.core.model import Evo


def looks(model: Evo) -> bool:
    """Whether values of tensors are checked: always, but where a compiler reads along, which must not ask for them, and in training on
    an accelerator, where the host would wait for the device.
    """
    if torch.compiler.is_compiling():
        return False
    return not model.training or model.bos.device.type == "cpu"


def check_tokens(model: Evo, tokens: Tensor, name: str = "tokens", minimum: int = 1) -> None:
    """Ids (B, N) of the model's vocabulary that fit its context, B >= 1 and N >= minimum."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        what = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(
            f"{name} must be an int64 tensor of ids, got {what}; convert with torch.tensor(ids, dtype=torch.int64)"
        )
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < minimum:
        raise ValueError(
            f"{name} must be (batch, length) with at least 1 sequence and {minimum} token(s) in each, got {tuple(tokens.shape)}"
        )
    if tokens.shape[1] > model.context:
        raise ValueError(
            f"{name} have {tokens.shape[1]} tokens, the model's context is {model.context}: "
            "shorten them, or build the model with a larger context"
        )
    if tokens.device != model.bos.device:
        raise ValueError(f"{name} are on {tokens.device}, the model on {model.bos.device}: move one to the other")
    if tokens.numel() and looks(model):
        low, high = tokens.min().item(), tokens.max().item()
        if low < 0 or high >= model.latent_space.vocab_size:
            raise ValueError(
                f"id {low if low < 0 else high} among the {name}; ids of this model lie in [0, {model.latent_space.vocab_size})"
            )


def as_batch(
    model: Evo, tokens: Tensor, prompt_length: int | Tensor | None = None, lengths: Tensor | None = None
) -> Batch:
    """The batch of (B, N) tokens, of which the first `prompt_length` (int or (B,)) are prompt and `lengths` (B,) are present."""
    check_tokens(model, tokens)
    size, device, look = tokens.shape[1], tokens.device, looks(model)
    end = (
        torch.full((len(tokens),), size, device=device)
        if lengths is None
        else as_lengths("lengths", lengths, tokens, 1, look=look)
    )
    prompt = as_lengths("prompt_length", 0 if prompt_length is None else prompt_length, tokens, 0, look=look)
    return Batch(tokens=tokens, present=torch.arange(size, device=device) < end[:, None], prompt=prompt, end=end)


def as_lengths(name: str, lengths: int | Tensor, tokens: Tensor, low: int, *, look: bool = True) -> Tensor:
    """Lengths (B,) int64 in [low, N], from one for all or one for each sequence; values of tensors are looked at on request."""
    size = tokens.shape[1]
    if isinstance(lengths, int):
        if not low <= lengths <= size:
            raise ValueError(f"{name} must lie in [{low}, {size}], got {lengths}")
        return torch.full((len(tokens),), lengths, device=tokens.device)
    if lengths.dtype != torch.int64 or lengths.shape != tokens.shape[:1]:
        raise ValueError(f"{name} must be int64 of shape ({len(tokens)},), got {lengths.dtype} {tuple(lengths.shape)}")
    if look and bool(((lengths < low) | (lengths > size)).any()):
        raise ValueError(f"{name} must lie in [{low}, {size}], got {lengths.tolist()}")
    return lengths.to(tokens.device)


def as_mask(loss_mask: Tensor | None, batch: Batch) -> Tensor:
    """What is scored, bool (B, N): of the tokens present, those that a mask of the same shape names."""
    if loss_mask is None:
        return batch.present
    if loss_mask.dtype != torch.bool or loss_mask.shape != batch.tokens.shape:
        raise ValueError(
            f"loss_mask must be bool of shape {tuple(batch.tokens.shape)}, got {loss_mask.dtype} {tuple(loss_mask.shape)}"
        )
    return loss_mask & batch.present


def as_levels(levels: float | Tensor | None, batch: Batch, like: Tensor, *, look: bool = True) -> Tensor | None:
    """Levels (B, N) in [0, 1], float32 or wider, from one for all or one for each token; None stays None."""
    if levels is None:
        return None
    dtype, shape = torch.promote_types(like.dtype, torch.float32), batch.tokens.shape
    if not isinstance(levels, Tensor):
        if not 0 <= levels <= 1:
            raise ValueError(f"levels must lie in [0, 1] (1 is noise, 0 a realised word), got {levels}")
        return torch.full(shape, float(levels), dtype=dtype, device=like.device)
    if not levels.is_floating_point() or levels.shape != shape or levels.device != like.device:
        raise ValueError(
            f"levels must be None, one number, or a floating-point tensor of shape {tuple(shape)} on {like.device}, "
            f"got {levels.dtype} {tuple(levels.shape)} on {levels.device}"
        )
    wrong = ~((levels >= 0) & (levels <= 1))
    if look and bool(wrong.any()):
        raise ValueError(f"levels must lie in [0, 1] (1 is noise, 0 a realised word), got {levels[wrong][0].item()}")
    return levels.to(dtype)


def as_prompt(model: Evo, prompt: Tensor, lengths: Tensor | None, max_new_tokens: int) -> Tensor | None:
    """The lengths (B,) of a prompt (B, P) that leaves room for `max_new_tokens`; P may be 0."""
    check_tokens(model, prompt, "prompt", minimum=0)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    if prompt.shape[1] + max_new_tokens > model.context:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} tokens and {max_new_tokens} new ones do not fit the model's context of {model.context}: "
            "shorten the prompt, ask for fewer tokens, or build the model with a larger context"
        )
    return None if lengths is None else as_lengths("lengths", lengths, prompt, 0)


def as_stop(stop: int | Sequence[int] | None, model: Evo, device: torch.device) -> Tensor | None:
    """Stop tokens as a tensor of ids; None for none."""
    if stop is None:
        return None
    ids = [stop] if isinstance(stop, int) else list(stop)
    wrong = [token for token in ids if not 0 <= token < model.latent_space.vocab_size]
    if wrong or not ids:
        raise ValueError(f"stop is {stop!r}; it needs ids in [0, {model.latent_space.vocab_size}), or None for no stop")
    return torch.tensor(ids, dtype=torch.int64, device=device)


def as_row_solver(solver: Solver, max_steps: int) -> Solver:
    """A solver for one row of a plan of at least one step: of a fixed-step method one that makes one step a row."""
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; a token at level 1 needs at least 1 step")
    if isinstance(solver, TorchDiffEq) and not solver.adaptive:
        _check_steps(solver.steps, max_steps)
        return solver.with_steps(1)
    if isinstance(solver, FixedStep):
        _check_steps(solver.steps, max_steps)
    return solver


def _check_steps(steps: int | None, max_steps: int) -> None:
    if steps not in (None, max_steps):
        raise ValueError(
            f"the solver has steps={steps} and max_steps is {max_steps}; a fixed-step solver takes one step "
            "a row of the plan: leave its steps unset"
        )
