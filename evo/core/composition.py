"""What a model is made of, in words: the kind and the options of each of its modules, to be compared when weights change hands."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

_PLAIN = (bool, int, float, str)
# What trained weights do not depend on: dropout, how long a sequence may be, and which kernel computes attention.
_FREE = ("training", "dropout", "positions", "attention")

_SAME = "the same tensor as "


def composition(module: nn.Module) -> dict[str, str]:
    """Of each module in `module`, by name, its class and options; and of each tensor that has two names, which one it is.

    An option is an attribute that is a number, a string, a dataclass, or a tuple or list of these, and a buffer that is not saved. Private
    ones are left out, and what may change: dropout, the number of positions, the backend of attention. Nothing here depends on the values
    of weights.
    """
    found = {name: _described(part) for name, part in module.named_modules()}
    return found | {name: _SAME + first for name, first in shared_tensors(module).items()}


def shared_tensors(module: nn.Module) -> dict[str, str]:
    """The names under which `state_dict` has a tensor once more, each with the name under which it comes first."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in module.state_dict(keep_vars=True).items()}
    return {name: kept for name, kept in names.items() if name != kept}


def second_names(composed: Mapping[str, str]) -> list[str]:
    """The names of tensors that a composition has under an earlier one."""
    return [name for name, what in composed.items() if what.startswith(_SAME)]


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """A few of the places in which two compositions differ, as a sentence; empty where they do not."""
    wrong = [
        f"{name or 'the model'} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    return "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")


def _described(module: nn.Module) -> str:
    kind = type(module)
    # A class of one's own may have the name of one of ours.
    name = f"evo.{kind.__qualname__}" if kind.__module__.startswith("evo.") else kind.__qualname__
    if isinstance(module, _DropoutNd):
        return name
    options = {
        key: repr(value)
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in _FREE and key != "config" and _is_option(value)
    }
    kept = module._non_persistent_buffers_set
    options |= {key: _digest(buffer) for key, buffer in module._buffers.items() if buffer is not None and key in kept}
    return f"{name}({', '.join(f'{key}={value}' for key, value in sorted(options.items()))})"


def _is_option(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_option, value))
    if is_dataclass(value) and not isinstance(value, type):
        entries = (getattr(value, entry.name) for entry in fields(value))
        return all(entry is None or _is_option(entry) for entry in entries)
    return isinstance(value, _PLAIN)


def _digest(buffer: Tensor) -> str:
    """Of the values of a buffer in float32, on whatever device and in whatever precision it is held."""
    return hashlib.sha256(buffer.detach().cpu().float().numpy().tobytes()).hexdigest()[:12]
