"""The one place where what callers hand to a model is checked.

B batch, N tokens, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from evo.core.bound import Batch
from evo.core.documents import Documents
from evo.core.ends import Ends
from evo.core.order import Order
from evo.core.part import Part
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
    model: Evo,
    tokens: Tensor,
    prompt_length: int | Tensor | None = None,
    lengths: Tensor | None = None,
    suffix_length: int | Tensor | None = None,
    documents: Tensor | None = None,
) -> Batch:
    """The batch of (B, N) tokens, of which the first `prompt_length` (int or (B,)) are prompt and `lengths` (B,) are present; of these the
    last `suffix_length` (int or (B,)) are suffix. `documents` (B, N) says which document each token belongs to.
    """
    check_tokens(model, tokens)
    size, device, look = tokens.shape[1], tokens.device, looks(model)
    end = (
        torch.full((len(tokens),), size, device=device)
        if lengths is None
        else as_lengths("lengths", lengths, tokens, 1, look=look)
    )
    prompt = as_lengths("prompt_length", 0 if prompt_length is None else prompt_length, tokens, 0, look=look)
    order = None
    if suffix_length is not None:
        suffix = as_lengths("suffix_length", suffix_length, tokens, 0, look=look)
        if look and bool((prompt + suffix > end).any()):
            raise ValueError(
                f"prompts of {prompt.tolist()} and suffixes of {suffix.tolist()} tokens do not fit sequences of {end.tolist()}; "
                "they must not overlap"
            )
        order = Order.of(size, model.bos_slots, prompt, end, suffix)
    apart = None if documents is None else as_documents(documents, tokens, model.bos_slots)
    if apart is not None and order is not None:
        apart, order = apart.read_in(order, prompt)
    present = torch.arange(size, device=device) < end[:, None]
    return Batch(tokens=tokens, present=present, prompt=prompt, end=end, order=order, documents=apart)


def as_documents(documents: Tensor, tokens: Tensor, bos: int) -> Documents:
    """The documents of (B, N) tokens, from ids of the same shape."""
    if documents.dtype != torch.int64 or documents.shape != tokens.shape or documents.device != tokens.device:
        raise ValueError(
            f"documents must be int64 ids of shape {tuple(tokens.shape)} on {tokens.device}, "
            f"got {documents.dtype} {tuple(documents.shape)} on {documents.device}"
        )
    return Documents.of(documents, bos)


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
    """What is scored, bool (B, N): of the tokens that are coded, those that a mask of the same shape names."""
    if loss_mask is None:
        return batch.coded
    if loss_mask.dtype != torch.bool or loss_mask.shape != batch.tokens.shape:
        raise ValueError(
            f"loss_mask must be bool of shape {tuple(batch.tokens.shape)}, got {loss_mask.dtype} {tuple(loss_mask.shape)}"
        )
    return loss_mask & batch.coded


def as_part(part: Part | None, batch: Batch, scored: Tensor) -> Part:
    """The part of a step's batch that (B, N) tokens are, of which `scored`, bool (B, N), are scored; None is a whole batch."""
    size = len(batch.tokens)
    if part is None:
        return Part(rows=range(size), total=size, scored=scored.sum())
    if len(part.rows) != size or len(set(part.rows)) != size or not 0 <= min(part.rows) <= max(part.rows) < part.total:
        raise ValueError(
            f"part has rows {tuple(part.rows)} of {part.total}; "
            f"{size} sequences need as many different rows of the whole batch, in [0, {part.total})"
        )
    if part.scored.dim() if isinstance(part.scored, Tensor) else part.scored < 0:
        raise ValueError(f"part has scored {part.scored}; it is how many tokens the whole batch scores, one number")
    return part


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


def as_prompt(
    model: Evo,
    prompt: Tensor,
    lengths: Tensor | None,
    most: int | Sequence[int] | Tensor,
    fewest: int | Sequence[int] | Tensor,
    stop: int | Sequence[int] | Sequence[Sequence[int]] | None,
) -> tuple[Tensor | None, Ends]:
    """The lengths (B,) of a prompt (B, P), where P may be 0, and the ends of what is to be written behind it."""
    check_tokens(model, prompt, "prompt", minimum=0)
    ends = as_ends(model, len(prompt), most, fewest, stop)
    new = max(ends.most)
    if prompt.shape[1] + new > model.context:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} tokens and {new} new ones do not fit the model's context of {model.context}: "
            "shorten the prompt, ask for fewer tokens, or build the model with a larger context; "
            "in a batch the longest prompt and the longest answer must fit together"
        )
    return None if lengths is None else as_lengths("lengths", lengths, prompt, 0), ends


def as_ends(
    model: Evo,
    batch: int,
    most: int | Sequence[int] | Tensor,
    fewest: int | Sequence[int] | Tensor,
    stop: int | Sequence[int] | Sequence[Sequence[int]] | None,
) -> Ends:
    """Where each of `batch` sequences ends, from what is said of all of them or of each."""
    longest, shortest = _counts("max_new_tokens", most, batch), _counts("min_new_tokens", fewest, batch)
    vocab_size, stops = model.latent_space.vocab_size, _stops(stop, batch)
    for row in range(batch):
        if longest[row] < 1:
            raise ValueError(f"max_new_tokens is {longest[row]}; ask for at least 1")
        if not 0 <= shortest[row] <= longest[row]:
            raise ValueError(
                f"min_new_tokens is {shortest[row]} and max_new_tokens {longest[row]}; needed 0 <= min_new_tokens <= max_new_tokens"
            )
        if any(not isinstance(token, int) or not 0 <= token < vocab_size for token in stops[row]):
            raise ValueError(f"stop is {stop!r}; it needs ids in [0, {vocab_size}), or None for no stop")
        if shortest[row] > 1 and len(set(stops[row])) == vocab_size:
            raise ValueError(
                f"min_new_tokens is {shortest[row]} and every token of the vocabulary stops: nothing could come first"
            )
    return Ends(most=longest, fewest=shortest, stop=stops)


def _counts(name: str, value: int | Sequence[int] | Tensor, batch: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * batch
    if isinstance(value, Tensor) and (value.dim() != 1 or value.is_floating_point()):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; it needs one int, or ({batch},)"
        )
    counts = tuple(value.tolist() if isinstance(value, Tensor) else value)
    if len(counts) != batch or not all(isinstance(each, int) for each in counts):
        raise ValueError(f"{name} is {counts}; a batch of {batch} sequences needs one int for all, or {batch} of them")
    return counts


def _stops(stop: int | Sequence[int] | Sequence[Sequence[int]] | None, batch: int) -> tuple[tuple[int, ...], ...]:
    if stop is None:
        return ((),) * batch
    given = [stop] if isinstance(stop, int) else list(stop)
    if given and not any(isinstance(each, int) for each in given):
        if len(given) != batch:
            raise ValueError(
                f"stop has {len(given)} sets; a batch of {batch} sequences needs one of each, or ids for all"
            )
        return tuple(tuple(cast("Sequence[int]", each)) for each in given)
    if not given:
        raise ValueError("stop is empty; it needs ids, or None for no stop")
    return (tuple(cast("list[int]", given)),) * batch


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
