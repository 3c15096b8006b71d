"""torch.compile: whole graphs of what a model does, and few of them for many lengths and batches."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from evo import Evo
from evo.core import BlockCausal, Cache, Causal, Document, Window
from tests.conftest import generator


@pytest.fixture
def model() -> Evo:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Evo.from_preset("tiny", vocab_size=31, depth=1, latent_dim=16)


def inputs(model: Evo, batch: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = generator(seed)
    return torch.randn(batch, count, model.latent_space.dim, generator=draws), torch.rand(batch, count, generator=draws)


@pytest.mark.parametrize("levels", [None, 0.0, 0.5], ids=["learned", "0", "0.5"])
def test_a_training_step_is_one_graph(model, levels):
    tokens = torch.randint(31, (2, 12), generator=generator())
    step = torch.compile(model, backend="eager", fullgraph=True)

    def gradients(run) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        run(tokens, levels=levels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    for ours, expected in zip(gradients(step), gradients(model), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["context_logits", "bound"])
def test_a_forward_pass_is_one_graph(model, name):
    model.eval()
    tokens = torch.randint(31, (2, 12), generator=generator())
    run = model.context_logits if name == "context_logits" else lambda tokens: model(tokens, levels=0.5).bound
    with torch.no_grad():
        torch.manual_seed(0)
        found = torch.compile(run, backend="eager", fullgraph=True)(tokens)
        torch.manual_seed(0)
        torch.testing.assert_close(found, run(tokens))


def test_a_refinement_step_is_one_graph(model):
    model.eval()
    field = model.vector_field(torch.randint(31, (2, 5), generator=generator()))
    latents, level = inputs(model, 2, 6)
    with torch.no_grad():
        found = torch.compile(field, backend="eager", fullgraph=True)(latents, level)
        torch.testing.assert_close(found, field(latents, level))


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        Window(3),
        Window(torch.tensor([2, 4]), torch.tensor([9, 8])),
        BlockCausal(4, 1),
        Document.from_lengths([[4, 5]]) & Causal(),
    ],
    ids=["causal", "window", "windows", "blocks", "documents"],
)
def test_every_mask_is_part_of_the_graph(model, mask):
    latents, level = inputs(model, 2, 9)
    compiled = torch.compile(model.backbone, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(latents, level, mask=mask), model.backbone(latents, level, mask=mask))


class Compiled:
    """A backbone compiled into whole graphs, which counts them and is compared with itself uncompiled."""

    def __init__(self, model: Evo) -> None:
        self.model, self.counter = model, CompileCounter()
        self.run = torch.compile(model.backbone, backend=self.counter, fullgraph=True)

    @property
    def recompilations(self) -> int:
        return self.counter.frame_count - 1


@torch.no_grad()
@pytest.mark.parametrize("capacity", [40, 5], ids=["roomy", "doubling"])
@pytest.mark.parametrize("ragged", [False, True], ids=["alike", "ragged"])
def test_decoding_behind_a_growing_cache_recompiles_at_most_thrice(model, capacity, ragged):
    compiled, caches = Compiled(model.eval()), (Cache(capacity), Cache(capacity))
    for cache in caches:
        model.backbone(*inputs(model, 3, 5), cache=cache, store=True)
        if ragged:
            cache.rewind(torch.tensor([2, 0, 1]))
    for step in range(30):
        new = inputs(model, 3, 1, step)
        found = compiled.run(*new, cache=caches[0], store=True)
        torch.testing.assert_close(found, model.backbone(*new, cache=caches[1], store=True))
    assert caches[0].length == caches[1].length == 35
    assert compiled.recompilations <= (3 if capacity == 5 else 1)


@torch.no_grad()
def test_refinement_behind_a_growing_cache_recompiles_at_most_thrice(model):
    compiled, cache, own = Compiled(model.eval()), Cache(4), torch.ones(6, dtype=torch.bool)
    for step in range(6):
        model.backbone(*inputs(model, 2, 3), cache=cache, store=True)
        window = inputs(model, 2, 6, step)
        found = compiled.run(*window, mask=Window(0), own=own, cache=cache)
        torch.testing.assert_close(found, model.backbone(*window, mask=Window(0), own=own, cache=cache))
    assert compiled.recompilations <= 3


@pytest.mark.slow
@torch.no_grad()
def test_changing_batches_and_lengths_recompile_at_most_thrice(model):
    compiled = Compiled(model.eval())
    for batch, count in [(2, 6), (3, 6), (5, 9), (1, 9), (4, 17)]:
        latents, level = inputs(model, batch, count)
        torch.testing.assert_close(compiled.run(latents, level), model.backbone(latents, level))
    assert compiled.recompilations <= 3


@pytest.mark.slow
def test_training_on_changing_batches_recompiles_at_most_thrice(model):
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True)
    for batch, count in [(2, 6), (4, 9), (6, 17)]:
        step(torch.randint(31, (batch, count), generator=generator())).loss.backward()
    assert counter.frame_count - 1 <= 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_kernel_says_the_same(model):
    tokens = torch.randint(31, (2, 12), generator=generator())

    def gradients(run) -> list[torch.Tensor]:
        model.zero_grad()
        run(tokens).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    compiled = torch.compile(model.context_logits, fullgraph=True)
    for ours, expected in zip(gradients(compiled), gradients(model.context_logits), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
