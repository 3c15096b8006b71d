"""Training: the loop and what it needs."""

from evo.training.checkpoint import Checkpointer, CheckpointError, SaveError, averaged_model, export_average
from evo.training.config import CurriculumConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from evo.training.guard import HUNG, PREEMPTED, Preempted
from evo.training.launch import launched
from evo.training.loop import Trainer, TrainResult, train
from evo.training.optimizer import Ema, adamw, learning_rate
from evo.training.parallel import ParallelConfig
from evo.training.recipes import RECIPES

__all__ = [
    "HUNG",
    "PREEMPTED",
    "RECIPES",
    "CheckpointError",
    "Checkpointer",
    "CurriculumConfig",
    "Ema",
    "EvaluationConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Preempted",
    "SaveError",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "adamw",
    "averaged_model",
    "export_average",
    "launched",
    "learning_rate",
    "train",
]
