"""Schedules by name: the one place where the name in a configuration becomes a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .base import Schedule, schedule_name
from .cosine import Cosine
from .information import InformationUniform
from .learned import Learned
from .linear_vp import LinearVP
from .rectified_flow import RectifiedFlow
from .shifted import Shifted
from .sigmoid import Sigmoid
from .variance_exploding import VarianceExploding

KNOWN: dict[str, Callable[..., Schedule]] = {
    schedule_name(kind): kind
    for kind in (
        Cosine,
        InformationUniform,
        Learned,
        LinearVP,
        RectifiedFlow,
        Shifted,
        Sigmoid,
        VarianceExploding,
    )
}


def from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule that `Schedule.config` described. Parameters and buffers are as at construction: load their state.

    ValueError for a name that is not one of this library's schedules, or for options that are not its own.
    """
    options = {k: from_config(v) if isinstance(v, Mapping) else v for k, v in config.items() if k != "name"}
    name = config.get("name")
    if not isinstance(name, str) or name not in KNOWN:
        raise ValueError(
            f"schedule {name!r} is not one of {', '.join(KNOWN)}. Build a schedule of your own in Python and hand over "
            "the object."
        )
    try:
        return KNOWN[name](**options)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"schedule {name!r} does not take the options {options}: {error}.") from error
