"""The same run on any number of ranks, however the model lies on them; and what becomes of it when ranks end."""

from __future__ import annotations

import json
import random

import pytest
import torch

from evo.training import HUNG, ParallelConfig, train
from evo.training.checkpoint import checkpoints
from tests.ranks import RankError, run_ranks
from tests.training_ranks import (
    STEPS,
    config,
    killed_run,
    model,
    preempted_run,
    spread_runs,
    standing_still,
    tensors,
    two_ranks,
)

TWO = {"copies": ParallelConfig(replicate=2), "shards": ParallelConfig(shard=2)}
TWO_MORE = {"tensor": ParallelConfig(tensor=2), "context": ParallelConfig(context=2)}
FOUR = {
    "four copies": ParallelConfig(replicate=4),
    "four shards": ParallelConfig(shard=4),
    "hybrid": ParallelConfig(replicate=2, shard=2),
    "shards of parts": ParallelConfig(shard=2, tensor=2),
    "copies of sections": ParallelConfig(replicate=2, context=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a run of one process is already, as "alone"."""
    folder = tmp_path_factory.mktemp("runs")
    train(config(folder, "alone"), model())
    return folder


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def assert_like_one_process(folder, name):
    assert losses(folder / name) == pytest.approx(losses(folder / "alone"), rel=1e-9, abs=1e-9)
    assert len(losses(folder / name)) == STEPS
    found, expected = tensors(folder / name), tensors(folder / "alone")
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(
            value, expected[key], rtol=1e-9, atol=1e-9, msg=lambda said, key=key: f"{key}: {said}"
        )


def test_two_ranks_train_as_one_and_what_they_have_begun_one_ends(folder):
    run_ranks(two_ranks, 2, folder, TWO, timeout=1200.0)
    for name in TWO:
        assert_like_one_process(folder, name)
    train(config(folder, "told"), model())
    assert_like_one_process(folder, "told")


@pytest.mark.slow
@pytest.mark.parametrize(("world", "cases"), [(2, TWO_MORE), (4, FOUR)])
def test_ranks_that_share_layers_or_are_four_train_as_one(folder, world, cases):
    run_ranks(spread_runs, world, folder, cases, timeout=1200.0)
    for name in cases:
        assert_like_one_process(folder, name)


@pytest.mark.slow
def test_a_run_goes_from_four_ranks_to_two_to_one_and_back(folder):
    run_ranks(preempted_run, 4, folder, "down", ParallelConfig(replicate=2, shard=2), 4)
    run_ranks(preempted_run, 2, folder, "down", ParallelConfig(tensor=2), 10)
    train(config(folder, "down"), model())
    assert_like_one_process(folder, "down")
    run_ranks(preempted_run, 2, folder, "up", ParallelConfig(replicate=2), 5)
    run_ranks(spread_runs, 4, folder, {"up": ParallelConfig(shard=4)})
    assert_like_one_process(folder, "up")


def killed(folder, name, step):
    with pytest.raises(RankError, match="-9"):
        run_ranks(killed_run, 2, folder, name, step)
    whole = [path.name for path in checkpoints(folder / name / "checkpoints")]
    # At most what was being written when the rank died is not there.
    assert whole or step < 10
    train(config(folder, name), model())
    assert_like_one_process(folder, name)


@pytest.mark.slow
def test_when_a_rank_is_killed_the_job_ends_and_its_checkpoint_is_whole(folder):
    killed(folder, "killed", 12)


@pytest.mark.slow
def test_ranks_killed_at_random_steps(folder):
    for kill in range(10):
        killed(folder, f"killed {kill}", random.randint(1, STEPS - 1))


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_where_the_others_wait(tmp_path, capfd):
    with pytest.raises(RankError) as ended:
        run_ranks(standing_still, 2, tmp_path, timeout=120.0)
    assert f": {HUNG}" in str(ended.value)
    said = capfd.readouterr().err
    assert "the timeout is 3 s, and the job ends" in said
    assert "rank 0: 'sums over ranks of step 3' for" in said
    assert "rank 1: 'batch of step 3' for" in said
    assert "time.sleep(1000)" in said or "dist.all_reduce(torch.ones(1))" in said
