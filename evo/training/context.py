"""Context parallelism: the positions of every sequence, divided among processes.

Every process computes its section of each sequence in all layers, and sees the keys and values of all others, gathered layer by layer
(Llama 3, Grattafiori et al. 2024, §3.3.2). What it keeps of the backbone for the backward pass shrinks by the number of processes, all
but these keys and values.

Why gradients are to be averaged. Let n processes hold the parameters theta_1..theta_n and compute the same loss L from the gathered hidden
states. The backward pass of the gathering adds up what all processes say of a section, so that process r finds the gradient by theta_r of
J = L_1 + ... + L_n. With all parameters equal J(theta, ..., theta) = n·L(theta), and the chain rule gives

    grad L(theta) = 1/n · sum over r of dJ/dtheta_r

for every parameter, whether it is used in the backbone, where every process finds n times what its section adds, or outside, where each
finds the whole. So a context process counts as one more data-parallel process that happens to have the same data and the same loss.

B batch, n positions of a section, N of the whole, C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from evo.core import Evo
from evo.core.section import Section
from evo.core.transformer import Block


def shard_context(model: Evo, mesh: DeviceMesh) -> Evo:
    """Divide the sequences of a model's passes among the processes of a mesh, in place; returns the model.

    Every process calls the model with the same arguments, whole sequences included, and gets the same outputs. What is divided is the
    backbone; latents, evidence, context logits (B, N, V) and losses are computed whole on each. A process has consecutive positions, whose
    numbers differ by one at most; a pass of fewer positions than processes is computed whole everywhere. Under a causal mask the last
    process has most to do: neither sections that balance it nor a ring, in which keys arrive while others are used, are built.

    - Gradients must be averaged over this mesh, as over data-parallel processes: see the head of this file.
    - What is drawn must be drawn alike: give every process of the mesh the same generators and the same torch seed. Dropout within the
      backbone, where the model has any, is then drawn for each section apart, and leaves torch's generator alike on all.
    - Passes with a cache, and so generation, are computed whole on every process, without any communication.

    Args:
        model: its backbone is changed.
        mesh: of one dimension.

    Raises:
        ValueError: for a mesh of several dimensions.
    """
    if mesh.ndim != 1:
        raise ValueError(f"context parallelism takes a mesh of one dimension, not of {mesh.ndim}: slice {mesh} by name")
    if mesh.size() > 1:
        model.backbone.divide = _Share(mesh.get_group(), mesh.get_local_rank(), mesh.size())
        blocks = [block for block in model.backbone.blocks if isinstance(block, Block)]
        if any(block.dropout.p or block.attention.dropout for block in blocks):
            dropout = _Dropout(mesh.get_local_rank())
            model.backbone.register_forward_pre_hook(dropout.begin)
            model.backbone.register_forward_hook(dropout.end)
    return model


@dataclass(frozen=True, eq=False)
class _Share:
    """The section of one process in a group."""

    group: dist.ProcessGroup
    rank: int
    processes: int

    def __call__(self, whole: int) -> Section | None:
        if whole < self.processes:
            return None
        counts = even_parts(whole, self.processes)
        return Section(
            start=sum(counts[: self.rank]),
            count=counts[self.rank],
            gather=partial(_gather, counts=counts, group=self.group),
        )


def even_parts(count: int, parts: int) -> list[int]:
    """`count` things in so many parts, which differ by one at most."""
    least, more = divmod(count, parts)
    return [least + (part < more) for part in range(parts)]


def _gather(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Features (..., n, C) of a section -> (..., N, C) of all sections, one behind another; n are the counts of the processes."""
    most = max(counts)
    if x.shape[-2] < most:
        x = torch.cat([x, x.new_zeros(*x.shape[:-2], most - x.shape[-2], x.shape[-1])], -2)
    parts = _AllGather.apply(x, len(counts), group)
    return torch.cat([part[..., :count, :] for part, count in zip(parts, counts, strict=True)], -2)


class _AllGather(torch.autograd.Function):
    """(...) of equal shapes in every process -> (processes, ...); backward, the sum of what all processes say of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = x.new_empty(processes, *x.shape)
        dist.all_gather(list(whole.unbind(0)), x.contiguous(), group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = torch.empty_like(gradient[0])
        dist.reduce_scatter(own, list(gradient.contiguous().unbind(0)), group=ctx.group)
        return own, None, None


class _Dropout:
    """Lets each process of a group draw the dropout of its section from a stream of its own.

    From one stream they would drop alike in every section, and, since sections may differ in length, would leave it in different states.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.seed: int | None = None

    def begin(self, backbone: nn.Module, arguments: object) -> None:
        """Before a pass: part."""
        if backbone.training:
            self.seed = int(torch.randint(1 << 62, (), device="cpu"))
            torch.manual_seed(self.seed + 1 + self.rank)

    def end(self, backbone: nn.Module, arguments: object, hidden: object) -> None:
        """After it: draw alike again."""
        if self.seed is not None:
            torch.manual_seed(self.seed)
            self.seed = None
