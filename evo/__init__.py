"""Evo: language models between autoregression and diffusion, as a component library.

Every token starts at a noise level of its own, between a realised word (0: autoregression) and pure noise (1: diffusion), and
is refined along one flow. `Evo` is the composed model; its parts live in `evo.core`, `evo.schedules`, `evo.solvers` and `evo.heads`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evo._version import __version__

if TYPE_CHECKING:
    from evo.core import Evo, EvoConfig, Objective, evaluate

__all__ = ["Evo", "EvoConfig", "Objective", "__version__", "evaluate"]

_ROOMS = ("core", "heads", "schedules", "solvers")


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and the help of the command line does without it.
    if name in _ROOMS:
        return import_module(f"evo.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module("evo.core"), name)
    return found
