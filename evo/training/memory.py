"""What a training run keeps in memory, counted on paper.

Weights, gradients, both moments of AdamW and the average of the weights are float32. Activations are what autograd keeps of both
halves of a training step at once.

V vocabulary, N tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from evo.core import EvoConfig
from evo.core.layers import GELU, RMSNorm
from evo.core.sizes import one_block


@dataclass(frozen=True, kw_only=True)
class Precision:
    """In which dtype a step computes; the sharded weights and all that belongs to them are float32.

    Attributes:
        compute_bytes: of an element inside a block.
        residual_bytes: of an element between blocks.
        gathered_bytes: of a gathered weight, and of its gradient before it is scattered.
        casts: whether each product casts its own inputs (autocast), and keeps a cast of its weight for the way back.
    """

    compute_bytes: int
    residual_bytes: int
    gathered_bytes: int
    casts: bool


FP32 = Precision(compute_bytes=4, residual_bytes=4, gathered_bytes=4, casts=False)
AUTOCAST = Precision(compute_bytes=2, residual_bytes=4, gathered_bytes=4, casts=True)
"""`torch.autocast` to bf16 over float32 weights, which are gathered as they are."""
MIXED = Precision(compute_bytes=2, residual_bytes=2, gathered_bytes=2, casts=False)
"""FSDP's mixed precision: weights are gathered in bf16, and everything between them is bf16."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many parameters there are.

    Attributes:
        embedding: the latent space and BOS.
        block: one block.
        backbone: all blocks, and what is before and behind them.
        heads: what reads hidden states, and a schedule's own.
    """

    embedding: int
    block: int
    backbone: int
    heads: int

    @classmethod
    def of(cls, config: EvoConfig) -> Parameters:
        """Those of a model of this config."""
        model = one_block(config)
        count = {name: _count(part) for name, part in model.named_children()}
        block = _count(model.backbone.blocks[0])
        backbone = count.pop("backbone") + (config.depth - 1) * block
        total = _count(model) + (config.depth - 1) * block
        heads = sum(count.get(name, 0) for name in ("timestep_head", "readout", "schedule"))
        return cls(embedding=total - backbone - heads, block=block, backbone=backbone, heads=heads)

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.backbone + self.heads


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """What a run keeps between steps, in bytes over all GPUs together, all in float32."""

    weights: int
    gradients: int
    moments: int
    average: int

    @classmethod
    def of(cls, parameters: int) -> StateBytes:
        """Of so many parameters, AdamW, and an average of the weights."""
        return cls(weights=4 * parameters, gradients=4 * parameters, moments=8 * parameters, average=4 * parameters)

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.moments + self.average


def cache_bytes_per_token(config: EvoConfig, element_bytes: int = 2) -> int:
    """Keys and values that generation keeps of a token, in all layers."""
    return 2 * config.depth * _heads(config)[1] * element_bytes


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """What autograd keeps of one sequence between the way forward and the way back.

    Attributes:
        blocks: inside and between the blocks of both halves, and of a scored first pass.
        recomputed: of one block, computed once more on the way back; 0 without checkpointing.
        logits: five tensors (N, V) in float32: what the sketch, its posterior, the flow (twice) and the reconstruction say; six with a
            scored first pass.
        masks: matrices of the window mask, one a block, where the attention backend needs them; 0 where a mask is a rule.
        others: latents, inputs of the readout and the like.
        workspace: not kept, but there with them: three more tensors like logits (context logits; two gradients on the way back).
    """

    blocks: int
    recomputed: int
    logits: int
    masks: int
    others: int
    workspace: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.blocks + self.recomputed + self.logits + self.masks + self.others + self.workspace


def activation_bytes(
    config: EvoConfig,
    *,
    length: int,
    precision: Precision = MIXED,
    checkpointing: bool = False,
    fused: bool = True,
    mask_matrices: bool = False,
    scored_first: bool = False,
) -> ActivationBytes:
    """Of one sequence of `length` tokens in a training step.

    Args:
        config: of the model.
        length: N.
        precision: what is computed in what.
        checkpointing: keep the inputs of blocks alone, and compute each block once more.
        mask_matrices: whether attention needs masks as matrices and keeps them (sdpa); flex takes them as rules.
        fused: whether a norm keeps its input alone, as on an accelerator; on a CPU RMSNorm keeps what it has normalised too.
        scored_first: whether there is a causal pass over the clean text that is learned from too, see `Objective.causal_weight`.
    """
    model = one_block(config)
    backbone, dim, vocabulary = model.backbone, model.latent_space.dim, model.latent_space.vocab_size
    bos = backbone.positions - config.context
    positions = (length - 1 + bos) * (2 if scored_first else 1) + (length + bos)
    inside = _block_bytes(config, backbone.blocks[0], precision, fused)
    width, residual, compute = backbone.width, precision.residual_bytes, precision.compute_bytes
    normalised = residual if isinstance(config.norm, RMSNorm) and not fused else 0
    if checkpointing:
        blocks, recomputed = positions * config.depth * width * residual, (length + bos) * inside
    else:
        blocks, recomputed = positions * config.depth * inside, 0
    # The last norm and the readout behind it; level features; latents, noise and queries of the evidence, all float32.
    others = positions * (width * (residual + compute + normalised) + dim * compute)
    others += positions * 2 * backbone.level_embedding.frequencies * compute
    others += length * (6 * 4 + (compute if scored_first else 0)) * dim
    logits = length * vocabulary * 4
    masks = (length + bos) ** 2 * compute * (1 if checkpointing else config.depth) if mask_matrices else 0
    return ActivationBytes(
        blocks=blocks,
        recomputed=recomputed,
        logits=(6 if scored_first else 5) * logits,
        masks=masks,
        others=others,
        workspace=3 * logits,
    )


def _block_bytes(config: EvoConfig, block: nn.Module, precision: Precision, fused: bool) -> int:
    """What autograd keeps of one position in one block."""
    compute, residual = precision.compute_bytes, precision.residual_bytes
    heads, kv = _heads(config)
    hidden, width = len(block.get_parameter("feed_forward.up.weight")), config.width
    gated = not isinstance(config.feed_forward, GELU)
    # Queries, keys and values after turning, what attention makes of them, and the log-sum-exp of every head's scores.
    kept = (2 * heads + 2 * kv) * compute + 4 * config.heads
    # gate, silu(gate), up and their product; or up and gelu(up).
    kept += (4 if gated else 2) * hidden * compute
    # Two norms: input, statistics, and the output for the products behind it, once each or (autocast) once for every product.
    copies = (3 + (2 if gated else 1)) if precision.casts else 2
    rms = isinstance(config.norm, RMSNorm)
    statistics, inputs = 4 if rms else 8, 2 if rms and not fused else 1
    kept += 2 * (inputs * width * residual + statistics) + copies * width * compute
    if config.qk_norm:
        # In the precision of the weights, which is that of the residual stream.
        kept += inputs * (heads + kv) * residual + statistics * (config.heads + (config.kv_heads or config.heads))
    if config.dropout:
        kept += 2 * width
    return kept


def _heads(config: EvoConfig) -> tuple[int, int]:
    """Elements of the queries, and of the keys, of one position in one block."""
    head_dim = config.width // config.heads if config.head_dim is None else config.head_dim
    return config.heads * head_dim, (config.kv_heads or config.heads) * head_dim


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
