"""A model spread over ranks is the model of one process: its losses, its weights, what it writes and what it is measured at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from evo import Evo, evaluate
from evo.heads import FixedTimestep
from evo.solvers import TorchDiffEq, integrate
from evo.training.parallel import (
    ParallelConfig,
    accumulating,
    clip_gradients,
    data_ranks,
    data_sum,
    gathered,
    parallelize,
)
from tests.conftest import generator
from tests.parallel_cases import build, difference, reference, train, whole
from tests.ranks import RankError, run_ranks

TOLERANCE = 1e-9


class TestConfig:
    def test_a_product_that_is_not_the_number_of_ranks_is_refused_with_the_arithmetic(self):
        config = ParallelConfig(replicate=2, shard=3, tensor=2)
        assert config.world == 12
        expected = "pipeline 1 × replicate 2 × shard 3 × context 1 × tensor 2 = 12, but the job has 1 rank:"
        with pytest.raises(ValueError, match=expected):
            config.mesh("cpu")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"shard": 0}, "shard is 0"),
            ({"recompute": "some"}, "known are 'none', 'selective' and 'full'"),
            ({"offload": True}, "give shard or context 2"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, said):
        with pytest.raises(ValueError, match=said):
            ParallelConfig(**options)

    def test_one_process_needs_no_mesh(self):
        model = build()
        mesh = ParallelConfig().mesh("cpu")
        assert mesh is None
        assert parallelize(model, ParallelConfig(), mesh) is model
        assert data_ranks(mesh) == (0, 1)
        assert data_sum(torch.ones(2), mesh).tolist() == [1, 1]
        with accumulating(model, last=False), gathered(model) as evo:
            assert evo is model

    def test_a_config_of_other_sizes_than_the_mesh_is_refused(self):
        with pytest.raises(ValueError, match=r"the mesh has sizes \(1, 1, 1, 1, 1\)"):
            parallelize(build(), ParallelConfig(shard=2), None)


class TestClipping:
    @given(seed=st.integers(0, 10**6), max_norm=st.floats(1e-3, 1e3))
    def test_it_is_that_of_torch(self, seed, max_norm):
        parameters = [nn.Parameter(torch.zeros(n, n, dtype=torch.float64)) for n in (1, 3, 5)]
        for parameter in parameters[:2]:  # the third takes no part
            parameter.grad = torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64) * 3
        copies = [nn.Parameter(p.detach().clone()) for p in parameters]
        for copy, parameter in zip(copies, parameters, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.clone()
        norm = clip_gradients(nn.ParameterList(parameters), max_norm)
        torch.testing.assert_close(norm, clip_grad_norm_(copies, max_norm), rtol=1e-12, atol=0)
        for copy, parameter in zip(copies[:2], parameters[:2], strict=True):
            torch.testing.assert_close(parameter.grad, copy.grad, rtol=1e-12, atol=0)

    def test_without_a_gradient_there_is_nothing_to_clip(self):
        assert clip_gradients(nn.Linear(2, 1), 1.0) == 0


class _Products(TorchDispatchMode):
    """Counts products with weights and kernels of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.kernels = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.products += name.startswith(("aten.mm", "aten.addmm"))
        self.kernels += "scaled_dot_product" in name and "backward" not in name
        self.others += "silu" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


class TestRecompute:
    def step(self, recompute: str) -> tuple[list[Tensor], int, tuple[int, int, int]]:
        """Gradients, bytes kept for the backward pass, and what the backward pass computes: products, kernels, activations."""
        model = parallelize(build(torch.float32), ParallelConfig(recompute=recompute), None)
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in build().named_parameters()]
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = torch.randint(0, 7, (4, 30), generator=generator())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens, generator=generator(1)).loss
        with _Products() as counted:
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return gradients, sum(kept.values()), (counted.products, counted.kernels, counted.others)

    def test_gradients_are_the_same_bit_for_bit_and_only_what_was_asked_is_computed_again(self):
        expected, kept, (products, kernels, activations) = self.step("none")
        assert (kernels, activations) == (0, 0)
        for recompute in ("selective", "full"):
            gradients, less, again = self.step(recompute)
            assert all(torch.equal(found, own) for found, own in zip(gradients, expected, strict=True))
            assert less < 0.8 * kept
            assert again[2] > 0
            assert (again[0] > products) == (again[1] > 0) == (recompute == "full")


def two_ranks(rank: int, world: int, folder: Path) -> None:
    expected = reference(folder)
    replicated = ParallelConfig(replicate=2)
    found = difference(train(replicated, replicated.mesh("cpu"), seed=rank), expected)
    assert max(found.values()) < TOLERANCE, found

    sharded = ParallelConfig(shard=2, recompute="full")
    mesh = sharded.mesh("cpu")

    def use(model: nn.Module, average: Evo, step: int) -> None:
        if step == 10:  # in the midst of training, of both, which then goes on as if nothing had been
            check_generation(rank, model, average)
            check_adaptive(rank, model)

    found = difference(train(sharded, mesh, seed=rank, each=use), expected)
    assert max(found.values()) < TOLERANCE, found
    check_narrow()


def check_narrow() -> None:
    """Blocks gathered in bfloat16 compute what autocast makes of whole ones; what is kept and reduced stays as wide as it was."""
    config = ParallelConfig(shard=2)
    models = (
        build(torch.float32),
        parallelize(build(torch.float32), config, config.mesh("cpu"), dtype=torch.bfloat16),
    )
    tokens, found = torch.randint(0, 7, (4, 9), generator=generator()), []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(tokens, generator=generator(1))
        out.loss.backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        found.append((out.loss.detach(), clip_gradients(model, 1.0)))
    (expected, norm), (sharded, twice) = found
    torch.testing.assert_close(sharded, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twice, 2 * norm, rtol=1e-2, atol=0)


def check_generation(rank: int, model: nn.Module, average: Evo) -> None:
    """What is gathered says and writes what one process would, each rank at its own pace."""
    for sharded in (average, model):
        alone = build().eval()
        alone.load_state_dict(whole(sharded))
        with gathered(sharded) as evo:
            evo.eval()
            for turn in range(1 + rank):  # more often on one rank than on the other: nothing waits for anybody
                draws, prompt = 10 * rank + turn, torch.full((1 + rank, 2 + turn), rank)
                options = {"max_new_tokens": 3 + 2 * rank, "max_steps": 4, "stop": 1 + rank}
                written = evo.generate(prompt, generator=generator(draws), **options)
                assert torch.equal(written.tokens, alone.generate(prompt, generator=generator(draws), **options).tokens)
                tokens = torch.randint(0, 7, (3, 6), generator=generator(draws))
                for levels in (0.6, None):
                    measured, known = (
                        evaluate(each, tokens, levels, generator=generator(draws), clock_values=1, progress=False)
                        for each in (evo, alone)
                    )
                    assert abs(measured.nats - known.nats) < 1e-12
        sharded.train(sharded is model)
    assert not any(parameter.grad is not None for parameter in average.parameters())


def check_adaptive(rank: int, model: nn.Module) -> None:
    """An adaptive solver over blocks that stay in shards takes the same steps on every rank, whose data differ."""
    solver = TorchDiffEq("dopri5", rtol=1e-5, atol=1e-5)
    latents = (1 + 4 * rank) * torch.randn(1 + rank, 4, 8, generator=generator(rank), dtype=torch.float64)
    with gathered(model, blocks=False) as evo:
        evo.eval()
        together = integrate(evo.vector_field(), latents, 0.9, 0.2, solver=solver)
        # Prompts are read under the same rule, and one plan makes the same passes everywhere.
        evo.generate(
            torch.full((1, 2 + rank), 3), 4, timestep_head=FixedTimestep(0.5), solver=solver, generator=generator(rank)
        )
    evaluations = [None, None]
    dist.all_gather_object(evaluations, together.nfe)
    assert evaluations[0] == evaluations[1]
    with gathered(model) as evo:
        mine = TorchDiffEq("dopri5", rtol=1e-5, atol=1e-5, group=dist.new_group([rank], use_local_synchronization=True))
        alone = integrate(evo.vector_field(), latents, 0.9, 0.2, solver=mine)
        evo.train()
    torch.testing.assert_close(together.latents, alone.latents, rtol=1e-3, atol=1e-3)


def four_ranks(rank: int, world: int, folder: Path) -> None:
    expected = reference(folder)
    hybrid = ParallelConfig(replicate=2, shard=2)
    mesh = hybrid.mesh("cpu")
    assert data_ranks(mesh) == (rank, 4)
    found = difference(train(hybrid, mesh, passes=2, seed=rank), expected)
    assert max(found.values()) < TOLERANCE, found
    with pytest.raises(ValueError, match=r"shard 3 .* = 3, but the job has 4 ranks: start 3"):
        ParallelConfig(shard=3).mesh("cpu")
    config = ParallelConfig(shard=4, offload=True)
    mesh = config.mesh("cpu")
    with pytest.raises(ValueError, match="no accelerator here"):
        parallelize(build(), config, mesh)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of one process is kept for all that are compared with it."""
    return tmp_path_factory.mktemp("ranks")


class TestRanks:
    def test_two_ranks_train_as_one_process_and_generate_each_at_its_own_pace(self, folder):
        run_ranks(two_ranks, 2, folder)

    @pytest.mark.slow
    def test_four_ranks_in_a_hybrid_train_as_one_process_with_accumulated_gradients(self, folder):
        run_ranks(four_ranks, 4, folder)

    @pytest.mark.slow
    def test_a_rank_that_fails_is_heard(self, tmp_path):
        with pytest.raises(RankError, match=r"(?s)rank-1.*one of us is wrong"):
            run_ranks(one_fails, 2, tmp_path)


def one_fails(rank: int, world: int, folder: Path) -> None:
    if rank:
        raise ValueError("one of us is wrong")
    dist.barrier()


def more_ranks(rank: int, world: int, folder: Path) -> None:
    expected = reference(folder)
    for options, passes in (({"replicate": 4}, 1), ({"shard": 4}, 2), ({"replicate": 4, "recompute": "selective"}, 2)):
        config = ParallelConfig(**options)
        found = difference(train(config, config.mesh("cpu"), passes=passes, seed=rank), expected)
        assert max(found.values()) < TOLERANCE, (options, found)


# AdamW divides a gradient by its own size: where that is nothing but rounding, the step is not.
REACHED = {"losses": 5e-5, "norms": 5e-4, "weight": 2e-4, "average": 2e-4}


def narrow_ranks(rank: int, world: int, folder: Path) -> None:
    expected = reference(folder, torch.float32)
    for options in ({"replicate": 4}, {"shard": 4}, {"replicate": 2, "shard": 2}):
        config = ParallelConfig(**options)
        found = difference(train(config, config.mesh("cpu"), dtype=torch.float32, seed=rank), expected)
        assert all(found[kind] < bound for kind, bound in REACHED.items()), (options, found)


@pytest.mark.slow
class TestRanksSlowly:
    def test_four_ranks_each_way(self, folder):
        run_ranks(more_ranks, 4, folder, timeout=900)

    def test_in_single_precision(self, folder):
        run_ranks(narrow_ranks, 4, folder, timeout=900)

    @pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    @pytest.mark.parametrize("recompute", ["none", "selective"])
    def test_compiled_blocks_say_the_same(self, recompute):
        tokens = torch.randint(0, 7, (2, 12), generator=generator())
        plain, compiled = (
            parallelize(build(), ParallelConfig(recompute=recompute, compile=compile), None)
            for compile in (False, True)
        )
        expected = plain(tokens, generator=generator(1)).loss
        found = compiled(tokens, generator=generator(1)).loss
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        expected.backward()
        found.backward()
        for own, other in zip(compiled.parameters(), plain.parameters(), strict=True):
            assert (own.grad is None) == (other.grad is None)
            if own.grad is not None:
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-8, atol=1e-9)
