"""How latents move along a vector field: one `integrate`, one file per method."""

from .ancestral import Ancestral
from .base import FixedStep, Solver, integrate
from .euler import Euler
from .exponential import Exponential
from .exponential_multistep import ExponentialMultistep
from .heun import Heun
from .midpoint import Midpoint
from .protocols import Callback, Field, NoiseSchedule
from .rk4 import RK4
from .runge_kutta import ExplicitRungeKutta
from .solution import Solution, SolverError, Trajectory
from .torch_diffeq import TorchDiffEq

__all__ = [
    "RK4",
    "Ancestral",
    "Callback",
    "Euler",
    "ExplicitRungeKutta",
    "Exponential",
    "ExponentialMultistep",
    "Field",
    "FixedStep",
    "Heun",
    "Midpoint",
    "NoiseSchedule",
    "Solution",
    "Solver",
    "SolverError",
    "TorchDiffEq",
    "Trajectory",
    "integrate",
]
