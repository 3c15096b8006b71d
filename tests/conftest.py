"""Hypothesis profiles, and the small random models that the tests share."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

# Also for the processes that tests start: workers share the cores, and threads of several processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from evo import Evo
from evo.core.chance import Chance

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("ci", max_examples=20, derandomize=True, print_blob=True, **COMMON)
settings.register_profile("local", max_examples=20, **COMMON)
settings.register_profile("slow", max_examples=300, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)


def random_model(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: object) -> Evo:
    """A model of a few thousand random weights, large enough that what it says depends on everything it sees."""
    torch.manual_seed(seed)
    size = {
        "vocab_size": 7,
        "width": 32,
        "depth": 2,
        "heads": 2,
        "kv_heads": 1,
        "latent_dim": 8,
        "context": 40,
        "dropout": 0.0,
    }
    model = Evo.from_preset("tiny", **{**size, **overrides})
    with torch.no_grad():
        model.readout.linear.weight.normal_(std=0.3)
        if model.readout.bias is not None:
            model.readout.bias.normal_(std=0.3)
        model.timestep_head.outer.weight.normal_(std=1.0 / model.timestep_head.gain)
        model.backbone.own_role.normal_(std=0.5)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def model() -> Evo:
    """One such model in float64, in evaluation mode; tests leave it as it is."""
    return random_model()


class Given(Chance):
    """Chance whose noise (B, N, D) is known beforehand, the same at every call."""

    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__(None, len(noise))
        self.noise = noise

    def normal(self, *shape: int, like: torch.Tensor) -> torch.Tensor:
        return self.noise


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Stands in for one: no file of this process may grow beyond four kilobytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
