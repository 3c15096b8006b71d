"""`evo demo`: the options are those of `DemoConfig`."""

from evo.demo import DemoConfig as Options
from evo.demo import main as run

__all__ = ["Options", "run"]
