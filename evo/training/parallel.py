"""A model over many devices, from outside: what is computed twice, compiled, split and shared out, in that order.

Every rank holds some rows of a step's batch, and gradients of all ranks are *added up*, never averaged: the loss of a part
(`evo.core.Part`) is its share in that of the whole batch, so `out.loss.backward()` is all there is to say on one rank or on many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from evo.core import Evo
from evo.training.context import shard_context
from evo.training.pipeline import shard_stages, stages_of
from evo.training.tensor import shard_tensors

_DIMENSIONS = ("pipeline", "replicate", "shard", "context", "tensor")

# What costs most to compute again: products with weights, and attention in the kernels that keep no matrix of logits. The products
# of attention without such a kernel are not among them: they are what would fill the memory.
_aten = torch.ops.aten
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._flash_attention_forward.default,
    _aten._efficient_attention_forward.default,
]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is spread over ranks: replicate × shard × context × tensor × pipeline of them."""

    replicate: int = 1
    """Copies of the weights, each with its own rows of the batch (data parallel)."""
    shard: int = 1
    """Ranks that share one copy of weights, gradients and moments, each with its own rows (FSDP2); with replicate, hybrid sharding."""
    context: int = 1
    """Ranks that share the positions of the same rows."""
    tensor: int = 1
    """Ranks that share the heads and feed-forward columns of the same rows."""
    pipeline: int = 1
    """Ranks that share the blocks, one after the other."""
    microbatches: int | None = None
    """Parts that the batch of a pass is cut into on its way through pipeline stages, one a sequence at most; None is four a stage."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of having kept it: nothing, all but products with weights and attention, or
    whole blocks."""
    compile: bool = False
    """Compile each block."""
    offload: bool = False
    """Keep weights, gradients and moments in the memory of the host; needs an accelerator, and shard or context above 1."""

    def __post_init__(self) -> None:
        for name in _DIMENSIONS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; needed: 1 or more ranks")
        if self.microbatches is not None and not (self.microbatches >= 1 and self.pipeline > 1):
            raise ValueError(
                f"microbatches is {self.microbatches} with pipeline {self.pipeline}; needed: 1 or more, and two stages to pass through"
            )
        if self.recompute not in ("none", "selective", "full"):
            raise ValueError(f"recompute is {self.recompute!r}; known are 'none', 'selective' and 'full'")
        if self.offload and self.shard * self.context == 1:
            raise ValueError("offload is for sharded weights: give shard or context 2 or more ranks too")

    @property
    def world(self) -> int:
        """How many ranks this takes."""
        return math.prod(self._sizes)

    @property
    def touches_blocks(self) -> bool:
        """Whether anything here is done block by block; copies of the whole model are not."""
        return self.world > self.replicate or self.recompute != "none" or self.compile

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in _DIMENSIONS)

    def mesh(self, device_type: str) -> DeviceMesh | None:
        """The ranks of the job as a mesh with dimensions "pipeline", "replicate", "shard", "context", "tensor", all of them there.

        None where torch.distributed has not been initialised, which is one process that needs none. Of neighbouring ranks, tensor
        varies fastest: those that talk most sit next to each other.

        Args:
            device_type: "cuda", "cpu".

        Raises:
            ValueError: where the job has another number of ranks.
        """
        initialised = dist.is_available() and dist.is_initialized()
        ranks = dist.get_world_size() if initialised else 1
        if self.world != ranks:
            product = " × ".join(f"{name} {size}" for name, size in zip(_DIMENSIONS, self._sizes, strict=True))
            raise ValueError(
                f"{product} = {self.world}, but the job has {ranks} rank{'s' * (ranks != 1)}: "
                f"start {self.world} (torchrun --nproc-per-node), or give sizes whose product is {ranks}"
            )
        return init_device_mesh(device_type, self._sizes, mesh_dim_names=_DIMENSIONS) if initialised else None


def parallelize(
    model: Evo, config: ParallelConfig, mesh: DeviceMesh | None, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Spread a model over the ranks of a mesh, in place; all of them call this, and get the weights of rank 0.

    What comes back is what a training step calls: the model itself, or a wrapper where every rank holds a copy (`unwrapped` undoes that).
    Gradients are summed over "replicate" and "shard", and averaged over "context", whose ranks have the same loss. Make the optimizer
    afterwards, of what comes back, and the average of the weights before. A model without a parameter that takes a gradient (the average)
    is split alike, but neither wrapped nor compiled.

    Args:
        model: on its device, in training mode or not.
        config: how.
        mesh: of `config.mesh`.
        dtype: what the weights of sharded blocks are gathered in, which with bfloat16 halves what is sent; for passes under autocast to
            the same dtype. None is their own. Gradients are reduced, and weights kept, in their own dtype in any case.

    Raises:
        ValueError: for a mesh of other sizes, for offloading without an accelerator, for more pipeline stages than blocks, and for a
            backbone without `blocks` where anything is to be done to them.
    """
    sizes = (1,) * len(_DIMENSIONS) if mesh is None else tuple(mesh.shape)
    if sizes != config._sizes:
        raise ValueError(f"the mesh has sizes {sizes} of {_DIMENSIONS}, the config {config._sizes}: take config.mesh()")
    if config.offload and not torch.accelerator.is_available():
        raise ValueError("offload moves weights between host and accelerator, and there is no accelerator here")
    if config.touches_blocks and not isinstance(getattr(model.backbone, "blocks", None), nn.ModuleList):
        raise ValueError(
            f"{type(model.backbone).__name__} has no `blocks`, an nn.ModuleList, and {config} recomputes, compiles, or divides blocks: "
            "give it one, or use replicate alone"
        )
    if mesh is not None and config.world > 1:
        _agree(model)
    trained = any(parameter.requires_grad for parameter in model.parameters())
    if mesh is not None and config.pipeline > 1:
        shard_stages(
            model,
            mesh["pipeline"],
            microbatches=config.microbatches or 4 * config.pipeline,
            even=config.replicate * config.shard > 1 and config.shard * config.context * config.tensor > 1,
        )
    if mesh is not None and config.tensor > 1:
        shard_tensors(model, mesh["tensor"])
    if mesh is not None and config.context > 1:
        shard_context(model, mesh["context"])
    if trained and (config.recompute != "none" or config.compile):
        _rework(model.backbone.blocks, config)
    if mesh is None or config.replicate * config.shard * config.context == 1:
        return model
    if config.shard * config.context * config.tensor > 1:
        _shard(model, config, mesh, dtype)
        return model
    return _replicated(model, mesh["replicate"]) if trained else model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model behind what `parallelize` returned."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def data_ranks(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Which share of a batch is this rank's, and how many shares there are; ranks that share a row have the same."""
    if mesh is None:
        return 0, 1
    replicate, shard = mesh["replicate"], mesh["shard"]
    return replicate.get_local_rank() * shard.size() + shard.get_local_rank(), replicate.size() * shard.size()


def data_sum(values: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Sums over the shares of the batch, in place: of losses, counts, `Output.observed`, each rank's own on entry."""
    if mesh is not None:
        for name in ("replicate", "shard"):
            if mesh[name].size() > 1:
                dist.all_reduce(values, group=mesh[name].get_group())
    return values


@contextmanager
def accumulating(model: nn.Module, *, last: bool) -> Iterator[None]:
    """One of several passes whose gradients make a step, forward and backward; copies of the model talk in the last alone.

    Shards are sent their gradients in every pass: the whole gradient, kept till the last, is what sharding has no room for.
    """
    if isinstance(model, DistributedDataParallel):
        with nullcontext() if last else model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    yield


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale gradients so that their norm over all ranks is at most `max_norm`; the norm there was, 0-dim, the same on every rank.

    `torch.nn.utils.clip_grad_norm_` for parameters that lie on different meshes, or in different pipeline stages. Where every rank holds a
    copy there is nothing to reduce.
    """
    stages = stages_of(model)
    own = set() if stages is None else {id(parameter) for parameter in stages.blocks.parameters()}
    alike: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            alike.setdefault((id(parameter) in own, mesh), []).append(parameter)
    norms: dict[bool, list[Tensor]] = {False: [], True: []}
    for (staged, _), group in alike.items():
        norm = get_total_norm([p.grad for p in group if p.grad is not None])
        norms[staged].append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if stages is not None:
        norms[True] = [stages.norm(norms[True])]
    found = norms[False] + norms[True]
    if not found:
        return torch.zeros(())
    total = found[0] if len(found) == 1 else torch.linalg.vector_norm(torch.stack(found))
    for group in alike.values():
        clip_grads_with_norm_(group, max_norm, total)
    return total


@contextmanager
def gathered(model: nn.Module, *, blocks: bool = True) -> Iterator[Evo]:
    """The `Evo` with its shards put together, to evaluate and to generate with; nothing inside carries a gradient.

    All ranks that share weights enter and leave together. In between ranks with different rows send each other nothing, so that each may
    go its own way: `evaluate`, `generate`, `stream`, `edit`, `vector_field` and learned levels, with as many steps as its own data ask for.
    An adaptive solver then needs to be told so, `TorchDiffEq(..., group=mesh["tensor"].get_group())`, as by default it keeps all ranks in
    step. Weights are gathered in the dtype given to `parallelize`, with bfloat16 for use under autocast.
    `state_dict`, and so `save_pretrained`, takes shards apart again and is not for in here.

    Args:
        model: what `parallelize` returned.
        blocks: put the blocks together too, which every rank needs the memory for. False leaves them in shards, which are gathered block
            by block at each pass: all ranks must then make the same passes. An adaptive solver does so by itself; learned levels, and
            sequences that end early, do not.
    """
    evo = unwrapped(model)
    if not isinstance(evo, Evo):
        raise TypeError(f"parallelize returns an Evo or a wrapper of one, got {type(model).__name__}")
    units = [module for module in evo.modules() if isinstance(module, FSDPModule) and (blocks or module is evo)]
    if isinstance(evo, FSDPModule):
        # The first of its units to be used would otherwise take itself for the root of them all.
        evo._get_fsdp_state()._lazy_init()
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        with torch.no_grad():
            yield evo
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
            unit.set_reshard_after_forward(unit is not evo, recurse=False)


def _agree(model: nn.Module) -> None:
    """Give every rank the weights of rank 0: shards of models that were drawn differently would make a model that nobody drew."""
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor, src=0)


def _rework(blocks: nn.ModuleList, config: ParallelConfig) -> None:
    recomputed = {
        "none": None,
        "selective": partial(
            checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _KEPT)
        ),
        "full": partial(checkpoint, use_reentrant=False),
    }[config.recompute]
    for block in blocks:
        if recomputed is not None:
            # In its place rather than around it, so that modules and parameters keep their kinds and names.
            block.forward = partial(recomputed, block.forward)
        if config.compile:
            block.compile()


def _shard(model: Evo, config: ParallelConfig, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    """FSDP2 (Zhao et al. 2023, the third stage of ZeRO): each block a unit that is gathered when it is used, the rest one that stays."""
    # Context ranks hold shards like any others: a gradient is summed over all of them, and divided by how many have the same loss.
    weights = mesh["shard"]
    if config.context > 1:
        weights = mesh["shard", "context"]._flatten("weights")
    if config.replicate > 1:
        weights = DeviceMesh._concatenate([mesh["replicate"], weights])
    offload = CPUOffloadPolicy() if config.offload else OffloadPolicy()
    own = next(model.parameters()).dtype
    # Inputs stay as they are: levels and rotations are never narrowed, and autocast sees to the rest.
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=own, cast_forward_inputs=False)
    for block in model.backbone.blocks:
        fully_shard(block, mesh=weights, mp_policy=narrow, offload_policy=offload)
    fully_shard(model, mesh=weights, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(config.context))
            module.set_force_sum_reduction_for_comms(True)


def _replicated(model: Evo, mesh: DeviceMesh) -> DistributedDataParallel:
    """DDP (Li et al. 2020) whose gradients are sums."""
    # Buffers are constants, which nothing needs to send around at each pass.
    constants = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constants)
    # Which weights a step uses changes with what it asks (no level is learned while all are random), and those that it does not use must
    # be left without a gradient, as in one process, for the optimizer to leave them alone: DDP has to look for them.
    wrapped = DistributedDataParallel(
        model,
        process_group=mesh.get_group(),
        find_unused_parameters=True,
        init_sync=False,
        gradient_as_bucket_view=True,
    )
    wrapped.register_comm_hook(mesh.get_group(), _summed)
    return wrapped


# Without annotations, which DDP compares with classes and does not read as strings.
def _summed(group, bucket):
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None  # this rank is one of the group
    return work.get_future().then(lambda done: done.value()[0])
