"""Pipeline parallelism: the blocks of a model, divided among processes, one behind another.

Every process calls the model with the same arguments, and holds everything but the blocks of others. A pass is cut into micro-batches,
which go from stage to stage as in GPipe (Huang et al. 2019); what leaves the last stage is sent to all. Sending is an operation that
autograd knows: on the way back of the very graph that the call has built, gradients make the same trip in reverse.

    forward     x  -> Enter -> [Receive -> blocks -> Send] for each micro-batch -> Leave -> h, from the last stage to all
    backward    dx <- Enter, from the first stage to all <- [Receive <- blocks <- Send] <- Leave <- dh

Why no schedule of `torch.distributed.pipelining` drives it: each runs all forward and all backward passes of one visit in one call, with a
loss that the last stage computes of the outputs alone. Here one loss stands behind several visits: the timestep head reads the first
(`Objective.causal_weight`), its levels are what the next two enter with, and their gradient goes back through them to the head. Visits
that autograd holds together leave `Evo.forward` as it is, and with it the objective, evaluation and generation.

Why nothing is left to reduce over this mesh: h is the same on all processes, so that all compute the same loss, and the same gradient of h,
of which that of the last stage is sent back. The gradient of x, too, is the same on all. Parameters outside of the blocks, of which every
process has a copy, thus get their whole gradient on each; those of a block get theirs where it is.

B batch, N tokens, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from evo.core import Evo
from evo.core.relay import Through
from evo.core.transformer import Block, Transformer
from evo.training.context import even_parts


def shard_stages(model: Evo, mesh: DeviceMesh, *, microbatches: int, even: bool = False) -> Evo:
    """Divide the blocks of a model among the processes of a mesh, in place; returns the model.

    Every process calls the model with the same arguments, and gets the same outputs. It keeps consecutive blocks, whose number differs by
    one at most, under the names that they have in the whole model, so that the state dicts of all processes together are that of the whole
    model. With S stages and M micro-batches a process stands idle for (S - 1)/(M + S - 1) of the time of the blocks, in each pass and on
    each way.

    - Gradients are those of the whole model: nothing is left to reduce over this mesh.
    - Everything drawn must be drawn alike: give every process of the mesh the same generators and the same torch seed. Dropout inside of
      the blocks is then drawn for each stage apart, and leaves torch's generators alike on all.
    - Passes with a cache, and so generation, are not cut: one stage works at a time. All processes generate the same text.
    - All processes differentiate with respect to the same: `backward()`, not `torch.autograd.grad` of the parameters that each has.

    Args:
        model: with all its blocks, the same on every process.
        mesh: of one dimension.
        microbatches: M, at least 1; a batch of fewer sequences is cut into as many as it has.
        even: cut it into M nevertheless, with repeated sequences that count for nothing. For ranks with other rows that share weights:
            all must use a block equally often, and how many sequences some passes have is not the same on each.

    Raises:
        ValueError: for a mesh of several dimensions, or of more processes than there are blocks.
    """
    if mesh.ndim != 1:
        raise ValueError(
            f"pipeline parallelism takes a mesh of one dimension, not of {mesh.ndim}: {mesh}; slice it by name"
        )
    backbone, stages = model.backbone, mesh.size()
    blocks = list(backbone.blocks)
    if len(blocks) < stages:
        raise ValueError(f"{len(blocks)} blocks cannot be divided among {stages} stages; each needs one: take fewer")
    if stages > 1:
        stage = mesh.get_local_rank()
        ends = list(accumulate(even_parts(len(blocks), stages), initial=0))
        own = nn.ModuleList().train(backbone.blocks.training)
        for index in range(ends[stage], ends[stage + 1]):
            own.add_module(str(index), blocks[index])
        backbone.blocks = own
        backbone.relay = Stages(
            group=mesh.get_group(),
            stage=stage,
            stages=stages,
            blocks=own,
            microbatches=microbatches,
            even=even,
            trained=any(parameter.requires_grad for block in blocks for parameter in block.parameters()),
            random=any(isinstance(block, Block) and (block.dropout.p or block.attention.dropout) for block in blocks),
        )
    return model


@dataclass(frozen=True, eq=False, kw_only=True)
class Stages:
    """Where a process stands among those that share the blocks of a model; called, a pass through all of them (`evo.core.relay`).

    Attributes:
        group: the processes, in the order of their blocks.
        stage: this one, from 0.
        stages: how many there are.
        blocks: those of this process.
        microbatches: M.
        even: whether every pass is cut into so many.
        trained: whether any block, here or elsewhere, takes a gradient.
        random: whether any block draws random numbers in training.
    """

    group: dist.ProcessGroup
    stage: int
    stages: int
    blocks: nn.ModuleList
    microbatches: int
    even: bool
    trained: bool
    random: bool

    def __call__(self, x: Tensor, through: Through, *, whole: bool) -> Tensor:
        """(B, N, W) -> (B, N, W), see `evo.core.relay.Relay`."""
        if self.trained and torch.is_grad_enabled() and not x.requires_grad:
            # Else a process whose own blocks are frozen would have no way back, and the others would wait for it.
            x = x.detach().requires_grad_()
        count = len(x)
        parts = 1 if whole else self.microbatches if self.even else max(1, min(self.microbatches, count))
        if count < parts:
            x = torch.cat([x, x[:1].expand(parts - count, *x.shape[1:])])
        shares = even_parts(len(x), parts)
        trip = _Trip(self)
        entered = _Enter.apply(x, trip).split(shares)
        left = []
        with _apart(self.stage) if self.random and self.blocks.training else nullcontext():
            for part, (first, stop) in zip(entered, pairwise(accumulate(shares, initial=0)), strict=True):
                if self.stage > 0:
                    part = _Receive.apply(part, trip)
                part = through(part, None if parts == 1 else slice(first, stop) if stop <= count else slice(0, 1))
                if self.stage < self.stages - 1:
                    part = _Send.apply(part, trip)
                left.append(part)
        return _Leave.apply(trip, *left)[:count]

    @torch.no_grad()
    def norm(self, norms: Sequence[Tensor]) -> Tensor:
        """The norm, 0-dim, of something in all stages from norms of its parts in this one, 0-dim each, of which there may be none."""
        like = next(self.blocks.parameters())
        # Not `new_zeros`, which of a shard would be a shard.
        own = torch.stack(list(norms)) if norms else torch.zeros(1, dtype=like.dtype, device=like.device)
        square = own.square().sum()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()


def stages_of(model: nn.Module) -> Stages | None:
    """Where this process stands, for a model that `shard_stages` has divided, or a wrapper of one; None for any other."""
    relays = (module.relay for module in model.modules() if isinstance(module, Transformer))
    return next((relay for relay in relays if isinstance(relay, Stages)), None)


class _Trip:
    """What one pass sends to neighbours, on its way forth or back, while it computes."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self._sent: list[tuple[dist.Work | None, Tensor]] = []

    def send(self, x: Tensor, stage: int) -> None:
        x = x.contiguous()
        self._sent.append((dist.isend(x, group=self.stages.group, group_dst=stage), x))

    def receive(self, like: Tensor, stage: int) -> Tensor:
        x = _like(like)
        dist.recv(x, group=self.stages.group, group_src=stage)
        return x

    def settle(self) -> None:
        """Wait until all that was sent is on its way, after which its memory may be used again."""
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()


class _Enter(torch.autograd.Function):
    """x as it is; backward, the gradient that the first stage has found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        trip = ctx.trip
        trip.settle()
        gradient = gradient.contiguous() if trip.stages.stage == 0 else _like(gradient)
        dist.broadcast(gradient, group=trip.stages.group, group_src=0)
        return gradient, None


class _Receive(torch.autograd.Function):
    """What the stage before has made of a micro-batch, in place of what entered; backward, its gradient is sent back there."""

    @staticmethod
    def forward(ctx: Any, entered: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.receive(entered, trip.stages.stage - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.trip.send(gradient, ctx.trip.stages.stage - 1)
        # Of the right shape, and all that `_Enter` asks of it here.
        return gradient, None


class _Send(torch.autograd.Function):
    """A micro-batch as it is, sent to the stage behind; backward, the gradient that comes back from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.send(x, trip.stages.stage + 1)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.trip.receive(gradient, ctx.trip.stages.stage + 1), None


class _Leave(torch.autograd.Function):
    """The micro-batches of the last stage, one behind another, on every process; backward, what is said of them, on the last stage."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, *left: Tensor) -> Tensor:
        ctx.shares = [len(part) for part in left]
        trip.settle()
        # On all but the last stage these are what was sent on, and only their shape counts.
        whole = torch.cat(left)
        dist.broadcast(whole, group=trip.stages.group, group_src=trip.stages.stages - 1)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *gradient.split(ctx.shares)


@contextmanager
def _apart(stage: int) -> Iterator[None]:
    """Draw from a stream of this stage's own; afterwards torch's generators are alike on all stages again, if they were before."""
    seed = int(torch.randint(1 << 62, (), device="cpu"))
    torch.manual_seed(seed + 1 + stage)
    yield
    torch.manual_seed(seed)


def _like(x: Tensor) -> Tensor:
    """Memory for another of this shape."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
