"""A training run on paper: what it holds on every GPU, and how long it takes.

State is sharded over all GPUs and blocks are gathered as they are needed (ZeRO, stage 3; Rajbhandari et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

from evo.core import EvoConfig, Objective
from evo.core.sizes import one_block
from evo.training.flops import Flops
from evo.training.memory import MIXED, ActivationBytes, Parameters, Precision, StateBytes, activation_bytes

GATHERED_BLOCKS = 2
"""Blocks that are gathered at a time: the one at work and the one fetched ahead."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A run on paper.

    Attributes:
        config, objective, precision, checkpointing, length: what was asked about.
        gpus, gpu_bytes: how many, and how much of the memory of each may be used.
        parameters, state: of the model, and what is kept of them over all GPUs.
        gathered_bytes: on each GPU: gathered weights and their gradients, and casts of weights.
        vocabulary_bytes: on each GPU: e(v) and the evidence's table with their gradients, and the readout's copy.
        activations: of one sequence.
        micro_batch: sequences a GPU computes at once.
        accumulate: micro-batches to a step.
        flops: of a token.
        training_flops: of a token in training, recomputation included.
        tokens_per_step, seconds_per_step: of the optimizer.
    """

    config: EvoConfig
    objective: Objective
    precision: Precision
    checkpointing: bool
    length: int
    gpus: int
    gpu_bytes: float
    parameters: Parameters
    state: StateBytes
    gathered_bytes: int
    vocabulary_bytes: int
    activations: ActivationBytes
    micro_batch: int
    accumulate: int
    flops: Flops
    training_flops: float
    tokens_per_step: int
    seconds_per_step: float

    @property
    def fixed_bytes(self) -> float:
        """On each GPU, whatever the batch."""
        return self.state.total / self.gpus + self.gathered_bytes + self.vocabulary_bytes

    @property
    def used_bytes(self) -> float:
        """On each GPU, at this micro-batch."""
        return self.fixed_bytes + self.micro_batch * self.activations.total

    def days(self, tokens: float) -> float:
        """To train on so many tokens."""
        return tokens / self.tokens_per_step * self.seconds_per_step / 86_400


def budget(
    config: EvoConfig,
    *,
    gpus: int,
    gpu_bytes: float,
    peak_flops: float,
    utilisation: float = 0.4,
    precision: Precision = MIXED,
    checkpointing: bool = True,
    length: int | None = None,
    micro_batch: int | None = None,
    accumulate: int = 1,
    objective: Objective | None = None,
) -> Budget:
    """Plan a run.

    Args:
        config: of the model.
        gpus: over which the state is sharded, each with batches of its own.
        gpu_bytes: what may be used of the memory of each; leave room for what an allocator cannot fill.
        peak_flops: operations a second of one GPU at most.
        utilisation: the share of them that is reached, recomputation counted as work, communication as the absence of it.
        precision: `MIXED`, `AUTOCAST` or `FP32`.
        checkpointing: compute blocks once more instead of keeping what is inside them.
        length: tokens of a sequence; None is the context.
        micro_batch: sequences a GPU computes at once; None is as many as fit.
        accumulate: micro-batches to a step.
        objective: of training; None is `Objective()`.

    Raises:
        ValueError: for a run that does not fit, with what it needs, and for numbers that are none of a run.
    """
    length = config.context if length is None else length
    objective = Objective() if objective is None else objective
    if min(gpus, accumulate, length, 1 if micro_batch is None else micro_batch) < 1 or length > config.context:
        raise ValueError(
            f"gpus {gpus}, accumulate {accumulate}, micro_batch {micro_batch}, length {length}: at least 1 of each is needed, "
            f"and a length within the context of {config.context}"
        )
    if not (gpu_bytes > 0 and peak_flops > 0 and 0 < utilisation <= 1):
        raise ValueError(
            f"gpu_bytes {gpu_bytes}, peak_flops {peak_flops}, utilisation {utilisation}: needed positive ones, a share in (0, 1]"
        )
    parameters = Parameters.of(config)
    state = StateBytes.of(parameters.total)
    gathered = _gathered_bytes(config, parameters, gpus, precision, checkpointing)
    vocabulary = _vocabulary_bytes(config, precision)
    activations = activation_bytes(
        config,
        length=length,
        precision=precision,
        checkpointing=checkpointing,
        scored_first=objective.causal_weight > 0,
    )
    fixed = state.total / gpus + gathered + vocabulary
    if micro_batch is None:
        micro_batch = max(1, int((gpu_bytes - fixed) // activations.total))
    needed = fixed + micro_batch * activations.total
    if needed > gpu_bytes:
        raise ValueError(
            f"{micro_batch} sequence(s) of {length} tokens need {needed / 2**30:.1f} GiB on each GPU, "
            f"of which {fixed / 2**30:.1f} whatever the batch; {gpu_bytes / 2**30:.1f} may be used: "
            "take more GPUs, shorter sequences, a smaller batch, or checkpointing"
        )
    flops = Flops.of(config)
    work = flops.training(objective, sequences=micro_batch, length=length, checkpointing=checkpointing)
    return Budget(
        config=config,
        objective=objective,
        precision=precision,
        checkpointing=checkpointing,
        length=length,
        gpus=gpus,
        gpu_bytes=gpu_bytes,
        parameters=parameters,
        state=state,
        gathered_bytes=gathered,
        vocabulary_bytes=vocabulary,
        activations=activations,
        micro_batch=micro_batch,
        accumulate=accumulate,
        flops=flops,
        training_flops=work / (micro_batch * length),
        tokens_per_step=gpus * accumulate * micro_batch * length,
        seconds_per_step=accumulate * work / (peak_flops * utilisation),
    )


def _vocabulary_bytes(config: EvoConfig, precision: Precision) -> int:
    """On each GPU: e(v) and the evidence's table, (V, D) and (V, D+1) in float32, their gradients, and the readout's narrower copy."""
    space = one_block(config).latent_space
    table = space.vocab_size * space.dim
    narrow = precision.compute_bytes * table if precision.compute_bytes < 4 else 0
    return 2 * 4 * (2 * table + space.vocab_size) + narrow


def _gathered_bytes(
    config: EvoConfig, parameters: Parameters, gpus: int, precision: Precision, checkpointing: bool
) -> int:
    """On each GPU: weights of some blocks and of all that is outside blocks, with gradients; casts that autocast keeps."""
    outside = parameters.total - config.depth * parameters.block
    # One GPU has nothing to gather, unless it computes in narrower copies.
    copied = gpus > 1 or precision.gathered_bytes < 4
    gathered = 2 * precision.gathered_bytes * (GATHERED_BLOCKS * parameters.block + outside) if copied else 0
    if precision.casts:
        gathered += precision.compute_bytes * parameters.block * (1 if checkpointing else config.depth)
    return gathered
