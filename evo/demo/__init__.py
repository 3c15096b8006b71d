"""The demonstration: train on real code, measure the bound, complete held-out functions with every solver, draw the levels."""

from evo.demo.config import DemoConfig
from evo.demo.main import main

__all__ = ["DemoConfig", "main"]
