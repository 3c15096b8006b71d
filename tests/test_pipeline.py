"""A model whose blocks lie in several processes is the model of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor

from evo import Evo, evaluate
from evo.core import Causal, Document, Exploration, Objective, Window
from evo.core.masks import Mask
from evo.core.pattern import Pattern
from evo.core.transformer import Block
from evo.training import Checkpointer, averaged_model
from evo.training.parallel import ParallelConfig, gathered, parallelize
from evo.training.pipeline import stages_of
from evo.training.state import TrainState
from tests.checkpoint_cases import OPTIMIZER
from tests.conftest import generator, random_model
from tests.parallel_cases import build, difference, reference, train, whole
from tests.ranks import run_ranks

TOLERANCE = 1e-9
TOKENS = torch.randint(0, 7, (5, 9), generator=generator(1))


@given(
    mask=st.sampled_from(
        [
            Causal(),
            Window(torch.tensor([0, 1, 2, 3]), torch.tensor([4, 6, 5, 6])),
            Window(2, 5),
            Document(torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1], [0] * 6, [0, 0, 0, 0, 1, 1]])) & Causal(),
        ]
    ),
    first=st.integers(0, 3),
    count=st.integers(1, 4),
    ragged=st.booleans(),
)
def test_some_rows_of_a_pattern_are_those_rows_of_it(mask: Mask, first: int, count: int, ragged: bool):
    queries = torch.tensor([[0, 1], [1, 2], [3, 4], [4, 5]]) if ragged else 4
    pattern = Pattern(mask=mask, queries=queries, count=2, keys=6, batch=4, device=torch.device("cpu"))
    rows = slice(first, min(4, first + count))
    taken = pattern.take(rows)
    size = rows.stop - rows.start
    assert taken.pieces == pattern.pieces
    assert torch.equal(taken.matrix.expand(size, -1, -1, -1), pattern.matrix.expand(4, -1, -1, -1)[rows])


def test_microbatches_are_for_stages():
    with pytest.raises(ValueError, match="microbatches is 4 with pipeline 1"):
        ParallelConfig(microbatches=4)


def together(found: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """What all stages have, put together; what several have must be the same bit for bit."""
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, found, group=group)
    merged: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            assert torch.equal(merged.setdefault(name, value), value), name
    assert all(len(part) < len(merged) for part in parts)
    return {name: merged[name] for name in sorted(merged)}


def check_training(folder: Path, rank: int, passes: int = 1, **sizes: int) -> None:
    """Twenty steps: losses, norms of clipped gradients, weights and averages."""
    config = ParallelConfig(**sizes)
    mesh = config.mesh("cpu")
    assert mesh is not None
    found = together(train(config, mesh, passes=passes, seed=rank), mesh["pipeline"].get_group())
    off = difference(found, reference(folder))
    assert max(off.values()) < TOLERANCE, (sizes, off)


def gradients(model: Evo) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def check_step(**sizes: int) -> None:
    """One step of everything that a model can be asked, in stages of different depths: the gradient of the whole model."""
    options = {"depth": 5, "kv_heads": 2, "width": 16, "self_conditioning": True}
    objective = Objective(exploration=Exploration(share=0.4), causal_weight=1.0, parallel=0.5)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 5)
    asked = {"prompt_length": torch.tensor([0, 1, 0, 2, 1]), "documents": documents, "objective": objective}
    alone, config = random_model(**options).train(), ParallelConfig(**sizes)
    mesh = config.mesh("cpu")
    assert mesh is not None
    divided = random_model(**options).train()
    model = parallelize(divided, config, mesh)
    found = []
    for each in (alone, model):
        out = each(TOKENS, generator=generator(3), **asked)
        out.loss.backward()
        found.append((out.loss, out.bound))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-11)
    # Data-parallel ranks all had the same rows.
    copies = config.replicate * config.shard
    expected = {name: copies * grad for name, grad in gradients(alone).items()}
    assert expected["timestep_head.outer.weight"].abs().max() > 0
    got = together(gradients(divided), mesh["pipeline"].get_group())
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10, msg=lambda said, n=name: f"{n}: {said}")


def check_use(rank: int, folder: Path) -> None:
    """What stages say and write together is what one process would; nothing is left of the blocks of others."""
    config = ParallelConfig(pipeline=2, microbatches=3)
    alone, divided = build().eval(), build().eval()
    model = parallelize(divided, config, config.mesh("cpu"))
    names = [name for name, _ in divided.named_parameters()]
    assert [name for name in whole(alone) if f".blocks.{1 - rank}." not in name] == names
    with gathered(model) as evo:
        for levels in (0.0, 0.6, None):
            measured, known = (
                evaluate(each, TOKENS, levels, generator=generator(), clock_values=2, progress=False)
                for each in (evo, alone)
            )
            assert abs(measured.nats - known.nats) < 1e-12
        for options in ({"window": 3, "refresh": 2}, {"stride": 2, "stop": 3}, {"max_steps": 3, "trajectory": True}):
            written, known = (
                each.generate(TOKENS[:2, :3], 7, generator=generator(5), **options) for each in (evo, alone)
            )
            assert torch.equal(written.tokens, known.tokens)
            torch.testing.assert_close(written.levels, known.levels, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="only some of the model's blocks"):
        divided.save_pretrained(folder / "part")


def check_frozen() -> None:
    """Blocks of one stage alone are trained: the others pass the gradient on."""
    config, found = ParallelConfig(pipeline=2), []
    mesh = config.mesh("cpu")
    assert mesh is not None
    for spread in (False, True):
        evo = build().requires_grad_(False)
        evo.backbone.blocks[0].requires_grad_(True)
        if spread:
            parallelize(evo, config, mesh)
        evo(TOKENS, generator=generator(3)).loss.backward()
        found.append(gradients(evo))
    got: list[Any] = [None, None]
    dist.all_gather_object(got, found[1])
    assert not got[1]
    assert got[0].keys() == found[0].keys()
    assert all((got[0][name] - grad).abs().max() < TOLERANCE for name, grad in found[0].items())


def check_dropout() -> None:
    """Each stage drops from a stream of its own, and the stages stay alike."""
    config = ParallelConfig(pipeline=2)
    model = random_model(dropout=0.5, depth=2).train()
    dropped: list[Tensor] = []
    parallelize(model, config, config.mesh("cpu"))
    for block in model.backbone.blocks:
        assert isinstance(block, Block)
        block.dropout.register_forward_hook(lambda module, given, made: dropped.append(made == 0))
    torch.manual_seed(4)
    out = model(TOKENS, levels=0.0, generator=generator())
    seen: list[Any] = [None, None]
    dist.all_gather_object(seen, (out.loss.item(), torch.get_rng_state(), dropped[0]))
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][2], seen[1][2])
    model.eval()
    state = torch.get_rng_state()
    model(TOKENS, levels=0.0, generator=generator())
    assert torch.equal(torch.get_rng_state(), state)


def check_checkpoint(rank: int, folder: Path) -> None:
    """Written by stages and read by whole models, and the reverse."""
    config = ParallelConfig(pipeline=2)
    mesh = config.mesh("cpu")
    assert mesh is not None

    def begin(seed: int, divided: bool) -> TrainState:
        def spread(model: Evo) -> torch.nn.Module:
            return parallelize(model, config, mesh) if divided else model

        return TrainState.begin(build(seed=seed), OPTIMIZER, spread=spread)

    def step(state: TrainState) -> float:
        loss = state.model(TOKENS, generator=generator(state.step)).loss
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update(state.model, state.step)
        state.step += 1
        return loss.item()

    def saved(state: TrainState, name: str) -> None:
        with Checkpointer(folder / name, keep=1) as checkpointer:
            checkpointer.save(state, corpus="text")

    def restored(name: str, divided: bool) -> TrainState:
        state = begin(7, divided)
        with Checkpointer(folder / name, keep=1) as checkpointer:
            assert checkpointer.restore(state, corpus="text")
        return state

    stages = begin(0, True)
    for _ in range(2):
        step(stages)
    saved(stages, "stages")
    one = restored("stages", False)
    held = stages.tensors()
    assert all(torch.equal(one.tensors()[name], tensor) for name, tensor in held.items())
    assert len(held) < len(one.tensors())
    saved(one, "one")
    again = restored("one", True).tensors()
    assert again.keys() == held.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in held.items())
    average = averaged_model(folder / "stages").state_dict()
    assert all(torch.equal(average[name], tensor) for name, tensor in one.ema.model.state_dict().items())
    assert abs(step(stages) - step(one)) < TOLERANCE


def two_ranks(rank: int, world: int, folder: Path) -> None:
    check_use(rank, folder)
    check_step(pipeline=2, microbatches=3)
    check_frozen()
    check_dropout()
    check_checkpoint(rank, folder)
    check_training(folder, rank, pipeline=2, microbatches=3)
    config = ParallelConfig(pipeline=2)
    with pytest.raises(ValueError, match="1 blocks cannot be divided among 2 stages"):
        parallelize(random_model(depth=1), config, config.mesh("cpu"))


def four_ranks(rank: int, world: int, folder: Path) -> None:
    check_step(pipeline=4, microbatches=5)
    check_step(pipeline=2, tensor=2)
    check_step(pipeline=2, context=2)
    check_step(pipeline=2, shard=2)
    check_training(folder, rank, passes=2, pipeline=2, replicate=2)


def more_ranks(rank: int, world: int, folder: Path) -> None:
    check_training(folder, rank, pipeline=2, shard=2, microbatches=2)
    check_training(folder, rank, passes=2, pipeline=2, tensor=2)
    check_training(folder, rank, pipeline=2, context=2)


def test_one_process_has_no_stages():
    assert stages_of(build()) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of one process is kept for all that are compared with it."""
    return tmp_path_factory.mktemp("pipeline")


def test_two_stages_are_one_process(folder):
    run_ranks(two_ranks, 2, folder)


@pytest.mark.slow
def test_stages_of_any_depth_and_in_any_company(folder):
    run_ranks(four_ranks, 4, folder)


@pytest.mark.slow
def test_stages_train_in_any_company(folder):
    run_ranks(more_ranks, 4, folder, timeout=900)
