"""Tensor parallelism: the heads of attention and the hidden width of the feed-forward layers, divided among processes.

Megatron's plan (Shoeybi et al. 2019) through torch's own engine. Of every block the maps into heads and into the hidden width are divided
by their outputs (columns), the maps back to the residual stream by their inputs (rows), so that each half of a block costs one
all-reduce forward and one backward, of (B, N, W).

B batch, N tokens, W width, C head dimension.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from evo.core import Evo
from evo.core.transformer import Block


def shard_tensors(model: Evo, mesh: DeviceMesh) -> Evo:
    """Divide the blocks of a model among the processes of a mesh, in place; returns the model.

    Each process then holds some heads of attention with their keys, values and caches, and every backend sees these and no others. The
    residual stream and all that lies outside of attention and feed-forward layers is whole and alike on every process: norms, embeddings of
    latents, levels, roles and estimates, the heads that read hidden states, the table of latents and the readout. (To divide the last two
    by vocabulary is the next step where V is large against W times depth.) So:

    - every process calls the model with the same arguments, and gets the same outputs;
    - gradients are those of the whole model on every process: nothing is left to reduce over this mesh;
    - what is drawn must be drawn alike: give every process of the mesh the same generators and the same torch seed. Dropout on the
      residual branches is then that of one process. Dropout of attention weights drops in each head what it drops in the heads that stand
      in the same place on other processes.

    The divided parameters become `DTensor`s on `mesh`, and the others stay as they are; `fully_shard` over another dimension of the same
    device mesh may follow. Each process keeps its part of the weights it has: all must have built or loaded the same.

    Args:
        model: with weights, or on the meta device.
        mesh: of one dimension.

    Raises:
        ValueError: for a mesh of several dimensions, or where heads, key/value heads or the hidden width cannot be divided evenly.
    """
    if mesh.ndim != 1:
        raise ValueError(f"tensor parallelism takes a mesh of one dimension, not of {mesh.ndim}: slice {mesh} by name")
    blocks = [block for block in model.backbone.blocks if isinstance(block, Block)]
    for index, block in enumerate(blocks):
        _check(index, block, mesh.size())
    if mesh.size() > 1:
        for block in blocks:
            trained = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
            parallelize_module(block, mesh, _plan(block), src_data_rank=None)
            for name, parameter in block.named_parameters():
                parameter.requires_grad_(trained[name])
    return model


def _check(index: int, block: Block, processes: int) -> None:
    attention = block.attention
    sizes = {
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "hidden": block.feed_forward.up.out_features,
    }
    uneven = [
        f"{name} {size} = {size // processes}·{processes} + {size % processes}"
        for name, size in sizes.items()
        if size % processes
    ]
    if uneven:
        raise ValueError(
            f"block {index} cannot be divided among {processes} processes: {', '.join(uneven)}. "
            "Heads, key/value heads and hidden width must be multiples of the tensor-parallel size: choose a smaller one, or other sizes"
        )


def _plan(block: Block) -> dict[str, ParallelStyle]:
    attention, feed_forward = block.attention, block.feed_forward
    plan: dict[str, ParallelStyle] = {
        # Declared once for all maps that read it: their gradients are then added up before they are reduced, and reduced once.
        "attention": _replicated_input(6),
        "attention.out": RowwiseParallel(),
        "feed_forward": _replicated_input(1),
        "feed_forward.down": RowwiseParallel(),
    }
    for name in ("q", "k", "v"):
        plan[f"attention.{name}"] = ColwiseParallel()
    for name in ("gate", "up"):
        if name in dict(feed_forward.named_children()):
            plan[f"feed_forward.{name}"] = ColwiseParallel()
    if attention.q_norm is not None:
        # (B, N, heads, C): one gain for all heads, whose gradient is a sum over those of every process.
        plan["attention.q_norm"] = plan["attention.k_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    return plan


def _replicated_input(arguments: int) -> PrepareModuleInput:
    layouts = (Replicate(), *(None,) * (arguments - 1))
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
