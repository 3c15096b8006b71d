"""Noise schedules, the time change between diffusion and autoregression, and refinement plans."""

from __future__ import annotations

from .base import Schedule, check_levels
from .config import from_config
from .conversions import Conversions, interior
from .cosine import Cosine
from .information import InformationUniform, readable_information
from .learned import Learned
from .linear_vp import LinearVP
from .plans import Path, by_order, check_rows, early_stop, full, late_start, step_counts
from .rectified_flow import RectifiedFlow
from .shifted import Shifted
from .sigmoid import Sigmoid
from .time_change import TimeChange
from .variance_exploding import VarianceExploding

__all__ = [
    "Conversions",
    "Cosine",
    "InformationUniform",
    "Learned",
    "LinearVP",
    "Path",
    "RectifiedFlow",
    "Schedule",
    "Shifted",
    "Sigmoid",
    "TimeChange",
    "VarianceExploding",
    "by_order",
    "check_levels",
    "check_rows",
    "early_stop",
    "from_config",
    "full",
    "interior",
    "late_start",
    "readable_information",
    "step_counts",
]
