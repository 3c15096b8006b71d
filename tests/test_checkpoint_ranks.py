"""Checkpoints of many ranks: written by 4, 2 or 1, read by any, and the run goes on as if nothing had been."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from evo.core import Objective
from evo.training import Checkpointer, CheckpointError, SaveError, averaged_model
from evo.training.checkpoint import checkpoints
from evo.training.state import TrainState
from tests.checkpoint_cases import OPTIMIZER, small_evo
from tests.ranks import run_ranks

# Four processes; `test_training_ranks` has two of them, which one process goes on from, among the quick tests.
pytestmark = pytest.mark.slow

HALF, ALL = 5, 10
TOKENS = torch.randint(0, 5, (4, 12), generator=torch.Generator().manual_seed(7))


def begin(*mesh_shape):
    """A state before the first step, sharded over a mesh of this shape (two dimensions: replicas, shards)."""
    if not mesh_shape:
        return TrainState.begin(small_evo(), OPTIMIZER)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])

    def spread(model):
        for block in model.backbone.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return TrainState.begin(small_evo(), OPTIMIZER, spread=spread)


def advance(state):
    """A step of the whole batch on every rank: the mean of gradients over ranks is then the gradient."""
    # Level 0 alone for a while: the timestep head has no gradient then, and no moments.
    levels = 0.0 if state.step < HALF else None
    noise = torch.Generator().manual_seed(state.step)
    loss = state.model(TOKENS, levels=levels, generator=noise, objective=Objective(aux_weight=1.0)).loss
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(state.model, state.step)
    state.clock.squares += 1 / (1 + state.step)
    state.step += 1
    return loss.item()


def whole(state):
    """Its tensors on this process, unsharded."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for name, tensor in state.tensors().items()
    }


def go_on(state, upto=ALL):
    return [advance(state) for _ in range(upto - state.step)]


def differences(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def run(folder, name, *mesh_shape, background=True):
    """A run left alone, with a checkpoint half-way; the losses and tensors at its end."""
    state = begin(*mesh_shape)
    with Checkpointer(folder / name, keep=2, background=background) as checkpointer:
        losses = go_on(state, HALF)
        checkpointer.save(state, corpus="text")
        losses += go_on(state)
    return losses, whole(state)


def resume(folder, name, *mesh_shape):
    """The losses and tensors at the end of a run that goes on from a checkpoint."""
    state = begin(*mesh_shape)
    with Checkpointer(folder / name, keep=2) as checkpointer:
        assert checkpointer.restore(state, corpus="text") == folder / name / f"step-{HALF:08d}"
    found = go_on(state)
    return found, whole(state)


def assert_goes_on(found, expected, exact):
    (losses, tensors), (all_losses, all_tensors) = found, expected
    if exact:
        assert losses == all_losses[HALF:]
        assert differences(tensors, all_tensors) == 0
    else:
        assert losses == pytest.approx(all_losses[HALF:], abs=1e-9)
        assert differences(tensors, all_tensors) < 1e-9


def four_ranks(rank, world, folder: Path):
    alone = run(folder, "four", 4)
    torch.rand(3)
    assert_goes_on(resume(folder, "four", 4), alone, exact=True)
    # Over a mesh of replicas and shards; what is written by one is read by the other.
    assert_goes_on(resume(folder, "four", 2, 2), alone, exact=False)
    hybrid = run(folder, "hybrid", 2, 2, background=False)
    assert_goes_on(resume(folder, "hybrid", 2, 2), hybrid, exact=True)
    assert_goes_on(resume(folder, "hybrid", 4), alone, exact=False)
    assert_goes_on(resume(folder, "one", 4), alone, exact=False)
    replicas_are_named_as_one_is(folder)
    random_states_are_those_of_the_rank(rank, folder)
    failures_are_those_of_all(rank, folder)


def replicas_are_named_as_one_is(folder):
    state = begin()
    state.model = DistributedDataParallel(state.model)
    with Checkpointer(folder / "one", keep=2) as checkpointer:
        checkpointer.restore(state, corpus="text")
    assert state.step == HALF
    assert state.tensors().keys() >= begin().tensors().keys()


def random_states_are_those_of_the_rank(rank, folder):
    state = begin(4)
    torch.manual_seed(rank)
    with Checkpointer(folder / "random", keep=1) as checkpointer:
        checkpointer.save(state, corpus="text")
        expected = torch.rand(4)
        checkpointer.wait()
        checkpointer.restore(state, corpus="text")
    assert torch.equal(torch.rand(4), expected)
    drawn = [torch.zeros(4) for _ in range(4)]
    dist.all_gather(drawn, expected)
    assert len({tuple(each.tolist()) for each in drawn}) == 4


def failures_are_those_of_all(rank, folder):
    """A disk that is full for one rank, files damaged, and a model of another shape: all ranks say the same, and none hangs."""
    place = folder / "failures"
    state = begin(4)
    with Checkpointer(place, keep=3, background=True) as checkpointer:
        for step in (1, 2, 3):
            state.step = step
            checkpointer.save(state, corpus="text")
        checkpointer.wait()
        state.step = 4
        with pytest.MonkeyPatch.context() as patch:
            if rank == 2:
                patch.setattr("evo.core.shards.save_file", no_space)
            checkpointer.save(state, corpus="text")
            with pytest.raises(SaveError, match="step 4 could not be written"):
                checkpointer.wait()
        state.step = 5
        if rank == 0:
            with pytest.warns(UserWarning, match="step 4 could not be written"):
                checkpointer.save(state, corpus="text")
        else:
            checkpointer.save(state, corpus="text")
        checkpointer.wait()
        assert [path.name[-1] for path in checkpoints(place)] == ["2", "3", "5"]
        dist.barrier()
        if rank == 0:
            (place / "step-00000005" / "rank-00003.safetensors").unlink()
            damaged = place / "step-00000003" / "rank-00001.safetensors"
            damaged.write_bytes(damaged.read_bytes()[:-1])
        dist.barrier()
        if rank == 0:
            with pytest.warns(UserWarning, match="set aside"):
                assert checkpointer.restore(state, corpus="text") == place / "step-00000002"
        else:
            assert checkpointer.restore(state, corpus="text") == place / "step-00000002"
        assert state.step == 2
        with pytest.raises(CheckpointError, match="other text"):
            checkpointer.restore(state, corpus="other")
        other = TrainState.begin(torch.nn.Linear(2, 2), OPTIMIZER)
        with pytest.raises(CheckpointError, match="another shape"):
            checkpointer.restore(other, corpus="text")


def no_space(*_):
    raise OSError(28, "No space left on device")


def two_ranks(rank, world, folder: Path):
    alone = run(folder, "two", 2)
    assert_goes_on(resume(folder, "two", 2), alone, exact=True)
    assert_goes_on(resume(folder, "four", 2), alone, exact=False)
    assert_goes_on(resume(folder, "one", 2), alone, exact=False)


def assert_one_process_goes_on(folder: Path, name, alone):
    assert_goes_on(resume(folder, name), alone, exact=False)
    exported = averaged_model(folder / name).state_dict()
    state = begin()
    with Checkpointer(folder / name, keep=2) as checkpointer:
        checkpointer.restore(state, corpus="text")
    assert all(torch.equal(exported[key], value) for key, value in state.ema.model.state_dict().items())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Runs of one process and of four, each cut off half-way, and what one process had at the end."""
    folder = tmp_path_factory.mktemp("runs")
    alone = run(folder, "one")
    run_ranks(four_ranks, 4, folder, timeout=400)
    return folder, alone


def test_one_process_and_four_go_on_where_the_other_was(written):
    folder, alone = written
    assert_goes_on(resume(folder, "one"), alone, exact=True)
    for name in ("four", "hybrid"):
        assert_one_process_goes_on(folder, name, alone)


def test_two_go_on_where_one_or_four_were_and_one_where_two_were(written):
    folder, alone = written
    run_ranks(two_ranks, 2, folder, timeout=400)
    assert_one_process_goes_on(folder, "two", alone)


@pytest.mark.parametrize("name", ["four", "hybrid"])
def test_what_several_ranks_have_alike_is_written_once_and_the_work_is_shared(written, name):
    folder = written[0] / name / f"step-{HALF:08d}"
    files = sorted(folder.glob("*.safetensors"))
    count = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    table = json.loads((folder / "checkpoint.json").read_text())["facts"]["tensors"]
    assert count == sum(torch.Size(shape).numel() for _, shape, _ in table.values())
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) == 4
    assert max(sizes) < 1.5 * min(sizes)
