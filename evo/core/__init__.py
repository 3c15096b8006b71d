"""The model: latent space, attention and masks, Transformer, denoiser and vector field, objective, Evo, generation."""

from evo.core.attention import Attention
from evo.core.backends import Attend, Auto, Backend, Call, Flex, Sdpa, Xformers, auto, explain
from evo.core.cache import Cache
from evo.core.clock import ClockDensity
from evo.core.config import PRESETS, EvoConfig
from evo.core.denoiser import Denoised, Denoiser, VectorField
from evo.core.editing import Edited
from evo.core.evaluation import Evaluation, evaluate
from evo.core.extremes import Extremes
from evo.core.generation import Chunk, Generation
from evo.core.latent_space import Embeddings, LatentSpace
from evo.core.layers import GELU, LayerNorm, RMSNorm, SwiGLU
from evo.core.levels import Exploration
from evo.core.masks import BlockCausal, Causal, Document, Leading, Mask, Window
from evo.core.model import Evo
from evo.core.objective import Objective, Output
from evo.core.packing import PackedCache, Packing
from evo.core.part import Part
from evo.core.pattern import Pattern
from evo.core.pretrained import PretrainedVocabulary
from evo.core.refinement import Steps
from evo.core.rotary import LinearScaling, Llama3Scaling, Rotary, RotaryTable, YarnScaling, rotate
from evo.core.speculation import Speculation
from evo.core.transformer import Transformer

__all__ = [
    "GELU",
    "PRESETS",
    "Attend",
    "Attention",
    "Auto",
    "Backend",
    "BlockCausal",
    "Cache",
    "Call",
    "Causal",
    "Chunk",
    "ClockDensity",
    "Denoised",
    "Denoiser",
    "Document",
    "Edited",
    "Embeddings",
    "Evaluation",
    "Evo",
    "EvoConfig",
    "Exploration",
    "Extremes",
    "Flex",
    "Generation",
    "LatentSpace",
    "LayerNorm",
    "Leading",
    "LinearScaling",
    "Llama3Scaling",
    "Mask",
    "Objective",
    "Output",
    "PackedCache",
    "Packing",
    "Part",
    "Pattern",
    "PretrainedVocabulary",
    "RMSNorm",
    "Rotary",
    "RotaryTable",
    "Sdpa",
    "Speculation",
    "Steps",
    "SwiGLU",
    "Transformer",
    "VectorField",
    "Window",
    "Xformers",
    "YarnScaling",
    "auto",
    "evaluate",
    "explain",
    "rotate",
]
