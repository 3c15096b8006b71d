"""Evo: language models between autoregression and diffusion, as a component library.

Every token starts at a noise level of its own, between a realised word (0: autoregression) and pure noise (1: diffusion), and
is refined along one flow. `Evo` is the composed model; its parts live in `evo.core`, `evo.schedules`, `evo.solvers` and `evo.heads`.
"""

from evo._version import __version__
from evo.core import Evo, EvoConfig, Objective, evaluate

__all__ = ["Evo", "EvoConfig", "Objective", "__version__", "evaluate"]
