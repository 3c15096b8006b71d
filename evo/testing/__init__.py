"""Properties that any component can be held to: our own, and yours.

Each check raises `PropertyError` with a sentence that says which property broke, at which input and by how much. Nothing here
needs more than the library itself, except `evo.testing.strategies`, which needs Hypothesis.
"""

from evo.testing.backbone import check_backbone
from evo.testing.duality import check_duality
from evo.testing.errors import PropertyError
from evo.testing.heads import check_head
from evo.testing.latent_space import check_latent_space
from evo.testing.model import check_model_limits
from evo.testing.plans import check_plan
from evo.testing.schedules import check_schedule
from evo.testing.solvers import check_marginals, check_solver
from evo.testing.targets import EnumeratedTokens, Gaussian, GaussianMixture

__all__ = [
    "EnumeratedTokens",
    "Gaussian",
    "GaussianMixture",
    "PropertyError",
    "check_backbone",
    "check_duality",
    "check_head",
    "check_latent_space",
    "check_marginals",
    "check_model_limits",
    "check_plan",
    "check_schedule",
    "check_solver",
]
