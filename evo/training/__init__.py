"""Training: the loop and what it needs."""

from evo.training.checkpoint import CheckpointError
from evo.training.config import CorpusConfig, CurriculumConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from evo.training.data import Corpus, open_corpus
from evo.training.loop import TrainResult, train
from evo.training.optimizer import Ema, adamw, learning_rate

__all__ = [
    "CheckpointError",
    "Corpus",
    "CorpusConfig",
    "CurriculumConfig",
    "Ema",
    "EvaluationConfig",
    "OptimizerConfig",
    "TrainConfig",
    "TrainResult",
    "adamw",
    "learning_rate",
    "open_corpus",
    "train",
]
