"""Blocks divided by heads, sequences divided by positions: what one process computes, in every combination."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from evo import Evo
from evo.core import Causal, Document, Window
from evo.core.layers import GELU, LayerNorm
from evo.training.context import shard_context
from evo.training.parallel import ParallelConfig
from evo.training.tensor import shard_tensors
from tests import parallel_cases as cases
from tests.conftest import generator, random_model
from tests.ranks import run_ranks

Shard = Callable[[Evo, DeviceMesh], Evo]

TOKENS = torch.tensor([[1, 4, 2, 0, 3, 5, 2, 6, 1], [3, 3, 0, 1, 6, 2, 4, 0, 5]])
MODELS: dict[str, dict[str, object]] = {
    "grouped, normalised heads, self-conditioned": {
        "heads": 4,
        "kv_heads": 2,
        "qk_norm": True,
        "self_conditioning": True,
    },
    "GPT-2": {
        "heads": 2,
        "kv_heads": 2,
        "norm": LayerNorm(),
        "feed_forward": GELU(),
        "rotary": None,
        "qkv_bias": True,
        "out_bias": True,
        "bos": "detached",
    },
}


def model_of(name: str, **overrides: object) -> Evo:
    return random_model(3, **{**MODELS[name], **overrides}).train()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Traffic(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        name = func.__name__.split(".")[0].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and name.startswith(("all", "reduce")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def loss_of(model: nn.Module) -> Tensor:
    """Of a step with learned levels (three passes), windows behind prompts and sequences of different lengths."""
    lengths, prompt = torch.tensor([9, 7]), torch.tensor([0, 3])
    return model(TOKENS, prompt_length=prompt, lengths=lengths, generator=generator()).loss


def documents_loss(model: nn.Module) -> Tensor:
    """Of a step at a level in between, with several documents in a sequence."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2, 2, 3]])
    return model(TOKENS, levels=0.5, documents=documents, generator=generator(1)).loss


def averaged(gradient: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(gradient, group=group)
        gradient /= group.size()
    return gradient


def same_gradients(model: Evo, expected: Evo, group: dist.ProcessGroup | None) -> None:
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None and other.grad is not None:
            found = averaged(whole(parameter.grad), group)
            torch.testing.assert_close(found, other.grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def check_a_step(shard: Shard, mesh: DeviceMesh, averaging: bool) -> None:
    group = mesh.get_group() if averaging else None
    for name in MODELS:
        alone = model_of(name)
        model = shard(deepcopy(alone), mesh)
        found, expected = (loss_of(each) + documents_loss(each) for each in (model, alone))
        same(found, expected)
        found.backward()
        expected.backward()
        same_gradients(model, alone, group)
        # Gradients of divided parameters, those of shared gains among them, are what torch's clipping takes.
        divided = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
        if divided:
            named = dict(alone.named_parameters())
            total = torch.nn.utils.clip_grad_norm_(divided.values(), 0.1)
            same(whole(total), torch.nn.utils.clip_grad_norm_([named[name] for name in divided], 0.1))
            same_gradients(model, alone, None)


def check_reading_and_writing(shard: Shard, mesh: DeviceMesh) -> None:
    for name in MODELS:
        alone = model_of(name).eval()
        model = shard(deepcopy(alone), mesh)
        same(model.context_logits(TOKENS), alone.context_logits(TOKENS))
        same(model.log_prob(TOKENS, 0.6, generator=generator()), alone.log_prob(TOKENS, 0.6, generator=generator()))
        latents = torch.randn(2, 9, 8, dtype=torch.float64, generator=generator(1))
        level = torch.rand(2, 9, dtype=torch.float64, generator=generator(2))
        same(model.vector_field()(latents, level), alone.vector_field()(latents, level))
    prompt, lengths = TOKENS[:, :4], torch.tensor([4, 2])
    alone = model_of("grouped, normalised heads, self-conditioned").eval()
    model = shard(deepcopy(alone), mesh)
    for options in ({"temperature": 0.0}, {"refresh": 2, "lengths": lengths}):
        found, expected = (
            each.generate(prompt, 5, window=3, max_steps=3, generator=generator(4), **options)
            for each in (model, alone)
        )
        assert torch.equal(found.tokens, expected.tokens)
        same(found.levels, expected.levels)


def check_masks_of_sections(mesh: DeviceMesh) -> None:
    alone = model_of("grouped, normalised heads, self-conditioned").backbone
    model = shard_context(model_of("grouped, normalised heads, self-conditioned"), mesh).backbone
    documents = Document(torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 2, 2]]))
    window = Window(torch.tensor([2, 3]), torch.tensor([7, 5]))
    masks = [Causal(), Window(3), window, documents, documents & Causal(), documents & window, Causal() | Window(5)]
    level = torch.rand(2, 7, dtype=torch.float64, generator=generator(1))
    own = torch.arange(7) >= torch.tensor([[2], [3]])
    for mask in masks:
        found, expected = [], []
        for network, results in ((model, found), (alone, expected)):
            latents = torch.randn(2, 7, 8, dtype=torch.float64, generator=generator()).requires_grad_()
            positions = torch.arange(7).flip(0).expand(2, 7)
            hidden = network(latents, level, mask=mask, own=own, estimate=latents / 2, positions=positions)
            hidden.sin().sum().backward()
            assert latents.grad is not None
            results += [hidden, latents.grad]
        same(found[0], expected[0])
        same(averaged(found[1], mesh.get_group()), expected[1])
    latents, level = torch.ones(1, 5, 8, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64)
    with Traffic() as traffic:
        model(latents, level).sum().backward()
    # Keys and values of each layer together, and what comes out.
    assert traffic.counts == dict.fromkeys(("allgather", "reduce_scatter"), len(model.blocks) + 1)
    latents, level = latents[:, :1], level[:, :1]
    with Traffic() as traffic:
        same(model(latents, level), alone(latents, level))
    assert not traffic.counts  # one position is not divided


def check_communication_of_tensors(mesh: DeviceMesh) -> None:
    model = shard_tensors(model_of("GPT-2"), mesh)
    latents = torch.randn(1, 5, 8, dtype=torch.float64)
    with Traffic() as traffic:
        model.backbone(latents, torch.zeros_like(latents[..., 0])).sum().backward()
    # Each half of a block: one sum of its outputs, one of its input's gradient.
    assert traffic.counts == {"all_reduce": 4 * len(model.backbone.blocks)}
    local = {name: tuple(p.to_local().shape) for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert local["backbone.blocks.0.attention.q.weight"] == (16, 32)
    assert local["backbone.blocks.1.feed_forward.down.weight"] == (32, 64)


def check_frozen_stays_frozen(mesh: DeviceMesh) -> None:
    model = model_of("grouped, normalised heads, self-conditioned")
    model.backbone.blocks.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in shard_tensors(model, mesh).backbone.blocks.parameters())


def check_dropout_of_tensors(mesh: DeviceMesh) -> None:
    alone = model_of("GPT-2", dropout=0.3)
    model, losses = shard_tensors(deepcopy(alone), mesh), []
    for each in (model, alone):
        torch.manual_seed(5)
        losses.append(loss_of(each))
    same(losses[0], losses[1])


def check_dropout_of_sections(mesh: DeviceMesh) -> None:
    model = shard_context(model_of("GPT-2", dropout=0.5), mesh)
    dropped: list[Tensor] = []
    model.backbone.blocks[0].dropout.register_forward_hook(lambda module, given, made: dropped.append(made == 0))
    torch.manual_seed(5)
    found = loss_of(model)
    state, others = torch.get_rng_state(), [torch.empty_like(torch.get_rng_state()) for _ in range(2)]
    dist.all_gather(others, state, group=mesh.get_group())
    assert torch.equal(others[0], others[1])
    losses = [torch.empty_like(found) for _ in range(2)]
    dist.all_gather(losses, found.detach(), group=mesh.get_group())
    assert torch.equal(losses[0], losses[1])
    own = dropped[0][:, :4].contiguous()
    sections = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(sections, own, group=mesh.get_group())
    assert not torch.equal(sections[0], sections[1])


def check_refusals(mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match=r"block 0 .* 2 processes: kv_heads 1 = 0·2 \+ 1"):
        shard_tensors(random_model(heads=2, kv_heads=1), mesh)
    with pytest.raises(ValueError, match=r"heads 3 = 1·2 \+ 1, kv_heads 3 = 1·2 \+ 1, hidden 33 = 16·2 \+ 1"):
        shard_tensors(random_model(heads=3, kv_heads=3, head_dim=8, hidden=33), mesh)
    flat = init_device_mesh("cpu", (2, 1), mesh_dim_names=("one", "other"))
    for shard in (shard_tensors, shard_context):
        with pytest.raises(ValueError, match="one dimension, not of 2"):
            shard(random_model(), flat)


def two_ranks(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    check_a_step(shard_tensors, mesh, averaging=False)
    check_reading_and_writing(shard_tensors, mesh)
    check_communication_of_tensors(mesh)
    check_frozen_stays_frozen(mesh)
    check_dropout_of_tensors(mesh)
    check_a_step(shard_context, mesh, averaging=True)
    check_reading_and_writing(shard_context, mesh)
    check_masks_of_sections(mesh)
    check_dropout_of_sections(mesh)
    check_refusals(mesh)


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path, timeout=600)


def same_runs(configs: tuple[ParallelConfig, ...], folder: Path) -> None:
    expected = cases.reference(folder)
    for config in configs:
        found = cases.train(config, config.mesh("cpu"))
        for kind, far in cases.difference(found, expected).items():
            assert far < 1e-9, (config, kind, far)


def runs_of_two(rank: int, world: int, folder: Path) -> None:
    configs = (
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=2, recompute="selective"),
        ParallelConfig(context=2),
        ParallelConfig(context=2, recompute="full"),
    )
    same_runs(configs, folder)


def runs_of_four(rank: int, world: int, folder: Path) -> None:
    configs = (
        ParallelConfig(shard=2, tensor=2),
        ParallelConfig(replicate=2, tensor=2),
        ParallelConfig(replicate=2, context=2),
        ParallelConfig(shard=2, context=2),
        ParallelConfig(context=2, tensor=2),
    )
    same_runs(configs, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "runs"), [(2, runs_of_two), (4, runs_of_four)])
def test_twenty_steps_end_with_the_weights_of_one_process(
    world: int, runs: Callable[[int, int, Path], None], tmp_path: Path
) -> None:
    run_ranks(runs, world, tmp_path, timeout=900)
