"""The one place where what callers hand to a model is checked.

B batch, N tokens, P prompt tokens.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

import torch
from torch import Tensor

from evo.core.answers import described
from evo.core.bound import Batch
from evo.core.documents import Documents
from evo.core.ends import Ends
from evo.core.objective import DEFAULT_OBJECTIVE, Objective
from evo.core.order import Order
from evo.core.part import Part
from evo.schedules import Path
from evo.solvers import Ancestral, FixedStep, Solver, TorchDiffEq

if TYPE_CHECKING:
    from evo.core.model import Evo


Lengths = int | Sequence[int] | Tensor
"""How many, of all sequences or of each (B,)."""

Stop = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None
"""Ids that end a sequence: for all, or B sets of them."""


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
            f"{name} must be (batch, length) with at least 1 sequence{' and 1 token in each' if minimum else ''}, got "
            f"{tuple(tokens.shape)}" + ("; ids.unsqueeze(0) makes a batch of one sequence" if tokens.dim() == 1 else "")
        )
    if tokens.shape[1] > model.context:
        raise ValueError(
            f"{name}: sequences of {tokens.shape[1]} tokens, the model's context is {model.context}: "
            "shorten them, or build the model with a larger context"
        )
    if tokens.device != model.bos.device:
        raise ValueError(f"{name}: ids on {tokens.device}, the model on {model.bos.device}: move one to the other")
    if tokens.numel() and looks(model):
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= model.latent_space.vocab_size:
            vocab_size = model.latent_space.vocab_size
            raise ValueError(
                f"{name}: id {low if low < 0 else high} is unknown; ids of this model lie in [0, {vocab_size}): use the tokenizer "
                "that it was made for, or build it with a larger vocab_size"
            )


def as_batch(
    model: Evo,
    tokens: Tensor,
    prompt_length: Lengths | None = None,
    lengths: Lengths | None = None,
    suffix_length: Lengths | None = None,
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
    needed = f"documents must be int64 ids of shape {tuple(tokens.shape)} on {tokens.device}"
    if not isinstance(documents, Tensor):
        raise TypeError(f"{needed}, got {type(documents).__name__}; convert with torch.tensor(documents)")
    if documents.dtype != torch.int64 or documents.shape != tokens.shape or documents.device != tokens.device:
        raise ValueError(f"{needed}, got {documents.dtype} {tuple(documents.shape)} on {documents.device}")
    return Documents.of(documents, bos)


def as_int(name: str, value: Any) -> int:
    """A whole number of any integer type; raises TypeError for anything else, truth values among it."""
    if not isinstance(value, bool) and not (isinstance(value, Tensor) and value.dtype == torch.bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} is {described(value)}; it needs a whole number, such as 4")


def as_count(name: str, value: Any) -> int:
    """A whole number of 1 or more; raises TypeError or ValueError for anything else."""
    count = as_int(name, value)
    if count < 1:
        raise ValueError(f"{name} is {count}; it needs at least 1")
    return count


def check_called(name: str, value: object, call: str, example: str) -> None:
    """Raise TypeError unless a part can be called; its class or its name is no part."""
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{name} is {described(value)}; it needs an object to be called {call}, such as {example}")


def check_path(path: Path) -> None:
    """Raise TypeError for what is no path."""
    if not isinstance(path, Path):
        raise TypeError(f"path is {described(path)}; it needs a path, such as evo.schedules.early_stop")


def as_rows(name: str, lengths: Lengths | None) -> int | Tensor | None:
    """A list of whole numbers as a tensor (B,) int64; everything else as it is. Raises TypeError for a list of anything else."""
    if isinstance(lengths, Sequence):
        return torch.tensor([as_int(name, each) for each in lengths], dtype=torch.int64)
    return lengths


def as_lengths(name: str, lengths: Lengths, tokens: Tensor, low: int, *, look: bool = True) -> Tensor:
    """Lengths (B,) int64 in [low, N], from one for all or one for each sequence; values of tensors are looked at on request."""
    size, given = tokens.shape[1], as_rows(name, lengths)
    if not isinstance(given, Tensor):
        count = as_int(name, given)
        if not low <= count <= size:
            raise ValueError(f"{name} must lie in [{low}, {size}], got {count}")
        return torch.full((len(tokens),), count, device=tokens.device)
    if given.dtype != torch.int64 or given.shape != tokens.shape[:1]:
        raise ValueError(f"{name} must be int64 of shape ({len(tokens)},), got {given.dtype} {tuple(given.shape)}")
    if look and bool(((given < low) | (given > size)).any()):
        raise ValueError(f"{name} must lie in [{low}, {size}], got {given.tolist()}")
    return given.to(tokens.device)


def as_mask(loss_mask: Tensor | None, batch: Batch) -> Tensor:
    """What is scored, bool (B, N): of the tokens that are coded, those that a mask of the same shape names."""
    if loss_mask is None:
        return batch.coded
    needed = f"loss_mask must be bool of shape {tuple(batch.tokens.shape)}"
    if not isinstance(loss_mask, Tensor):
        raise TypeError(f"{needed}, got {type(loss_mask).__name__}; convert with torch.tensor(loss_mask)")
    if loss_mask.dtype != torch.bool or loss_mask.shape != batch.tokens.shape:
        raise ValueError(f"{needed}, got {loss_mask.dtype} {tuple(loss_mask.shape)}")
    return loss_mask & batch.coded


def as_objective(objective: Objective | None) -> Objective:
    """What training adds; None is `Objective()`."""
    if objective is None:
        return DEFAULT_OBJECTIVE
    if not isinstance(objective, Objective):
        raise TypeError(f"objective is {described(objective)}; it needs an `Objective`, or None for Objective()")
    return objective


def as_part(part: Part | None, batch: Batch, scored: Tensor) -> Part:
    """The part of a step's batch that (B, N) tokens are, of which `scored`, bool (B, N), are scored; None is a whole batch."""
    size = len(batch.tokens)
    if part is None:
        return Part(rows=range(size), total=size, scored=scored.sum())
    if not isinstance(part, Part):
        raise TypeError(f"part is {described(part)}; it needs a `Part`, or None for a whole batch")
    if len(part.rows) != size or len(set(part.rows)) != size or not 0 <= min(part.rows) <= max(part.rows) < part.total:
        raise ValueError(
            f"part has rows {tuple(part.rows)} of {part.total}; "
            f"{size} sequences need as many different rows of the whole batch, in [0, {part.total})"
        )
    if part.scored.dim() if isinstance(part.scored, Tensor) else part.scored < 0:
        raise ValueError(f"part has scored {part.scored}; it is how many tokens the whole batch scores, one number")
    return part


def as_levels(levels: float | Tensor | None, shape: torch.Size, like: Tensor, *, look: bool = True) -> Tensor | None:
    """Levels of a shape (B, N), in [0, 1], float32 or wider, from one for all or from (B, N), (B, 1) or (1, N) of them; None stays None."""
    if levels is None:
        return None
    dtype, (rows, columns) = torch.promote_types(like.dtype, torch.float32), shape
    if not isinstance(levels, Tensor):
        if isinstance(levels, bool) or not isinstance(levels, Real):
            raise TypeError(
                f"levels is {described(levels)}; it needs None, one number, or a tensor of shape {tuple(shape)}"
            )
        if not 0 <= levels <= 1:
            raise ValueError(f"levels must lie in [0, 1] (1 is noise, 0 a realised word), got {levels}")
        return torch.full(shape, float(levels), dtype=dtype, device=like.device)
    fits = levels.dim() == 2 and levels.shape[0] in (rows, 1) and levels.shape[1] in (columns, 1)
    if not levels.is_floating_point() or not fits or levels.device != like.device:
        raise ValueError(
            f"levels must be None, one number, or a floating-point tensor on {like.device}, of shape {tuple(shape)}, ({rows}, 1) for one a "
            f"sequence, or (1, {columns}) for one a position, got {levels.dtype} {tuple(levels.shape)} on {levels.device}"
        )
    wrong = ~((levels >= 0) & (levels <= 1))
    if look and bool(wrong.any()):
        raise ValueError(f"levels must lie in [0, 1] (1 is noise, 0 a realised word), got {levels[wrong][0].item()}")
    return levels.to(dtype).expand(shape).contiguous()


def as_prompt(
    model: Evo,
    prompt: Tensor,
    lengths: Lengths | None,
    most: Lengths,
    fewest: Lengths,
    stop: Stop,
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
    most: Lengths,
    fewest: Lengths,
    stop: Stop,
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
        if any(not 0 <= token < vocab_size for token in stops[row]):
            raise ValueError(f"stop is {stop!r}; it needs ids in [0, {vocab_size}), or None for no stop")
        if shortest[row] > 1 and len(set(stops[row])) == vocab_size:
            raise ValueError(
                f"min_new_tokens is {shortest[row]} and every token of the vocabulary stops: nothing could come first"
            )
    return Ends(most=longest, fewest=shortest, stop=stops)


def _counts(name: str, value: Lengths, batch: int) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        if value.dim() != 1 or value.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; it needs one int, or ({batch},)"
            )
        value = cast("list[int]", value.tolist())
    if not isinstance(value, Sequence):
        return (as_int(name, value),) * batch
    counts = tuple(as_int(name, each) for each in value)
    if len(counts) != batch:
        raise ValueError(f"{name} is {counts}; a batch of {batch} sequences needs one int for all, or {batch} of them")
    return counts


def _stops(stop: Stop, batch: int) -> tuple[tuple[int, ...], ...]:
    if stop is None:
        return ((),) * batch
    given = stop.tolist() if isinstance(stop, Tensor) else stop
    given = [given] if isinstance(given, SupportsIndex) else given
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"stop is {stop!r}; it needs one id, ids, or {batch} sets of ids, one for each sequence")
    if not given:
        raise ValueError("stop is empty; it needs ids, or None for no stop")
    if any(isinstance(each, SupportsIndex) for each in given):
        return (tuple(as_int("an id of stop", cast("int", each)) for each in given),) * batch
    if len(given) != batch:
        raise ValueError(f"stop has {len(given)} sets; a batch of {batch} sequences needs one of each, or ids for all")
    return tuple(tuple(as_int("an id of stop", each) for each in cast("Sequence[int]", ids)) for ids in given)


def as_row_solver(solver: Solver, max_steps: int) -> Solver:
    """A solver for one row of a plan of `max_steps`, at least 1: of a fixed-step method one that makes one step a row."""
    if not isinstance(solver, Solver):
        raise TypeError(f"solver is {described(solver)}; it needs a solver, such as evo.solvers.Euler()")
    if isinstance(solver, TorchDiffEq) and not solver.adaptive:
        _check_steps(solver.steps, max_steps)
        return solver.with_steps(1)
    if isinstance(solver, Ancestral) and solver.generator is not None:
        raise ValueError(
            "the solver has a generator of its own, and each sequence a stream that it is to draw from: leave it out of Ancestral"
        )
    if isinstance(solver, FixedStep):
        _check_steps(solver.steps, max_steps)
    return solver


def _check_steps(steps: int | None, max_steps: int) -> None:
    if steps not in (None, max_steps):
        raise ValueError(
            f"the solver has steps={steps} and max_steps is {max_steps}; a fixed-step solver takes one step "
            "a row of the plan: leave its steps unset"
        )
