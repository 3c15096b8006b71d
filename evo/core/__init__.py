"""The model: latent space, attention and masks, Transformer, denoiser and vector field, objective, Evo, generation."""

from evo.core.attention import Attention
from evo.core.cache import Cache
from evo.core.config import PRESETS, EvoConfig
from evo.core.denoiser import Denoised, Denoiser, VectorField
from evo.core.evaluation import Evaluation, evaluate
from evo.core.generation import Generation, Steps
from evo.core.latent_space import LatentSpace
from evo.core.levels import Exploration
from evo.core.masks import Causal, Mask, Window
from evo.core.model import Evo
from evo.core.objective import Objective, Output
from evo.core.transformer import Transformer

__all__ = [
    "PRESETS",
    "Attention",
    "Cache",
    "Causal",
    "Denoised",
    "Denoiser",
    "Evaluation",
    "Evo",
    "EvoConfig",
    "Exploration",
    "Generation",
    "LatentSpace",
    "Mask",
    "Objective",
    "Output",
    "Steps",
    "Transformer",
    "VectorField",
    "Window",
    "evaluate",
]
