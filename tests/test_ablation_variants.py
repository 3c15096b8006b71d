"""Variants are compositions of public parts that begin alike and train what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.ablation.run import plan_of
from benchmarks.ablation.scoring import write
from benchmarks.ablation.sizes import SIZES
from benchmarks.ablation.training import build, fit, train_step
from benchmarks.ablation.variants import VARIANTS
from evo.schedules import early_stop
from evo.training.state import TrainState
from tests.ablation_cases import CPU, PARITY, TINY, small


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "nano", TINY)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_learns_and_writes(name):
    variant = VARIANTS[name]
    plan = plan_of(small(variant=name, task="parity-8"), PARITY, CPU)
    model = build(plan)
    phase = variant.phases[-1]
    if phase.prepare is not None:
        phase.prepare(model)
    state = TrainState.begin(model, plan.size.optimizer())
    before = {key: value.clone() for key, value in model.named_parameters()}
    loss = train_step(plan.of(phase), phase, 0, state, 10)
    assert loss.isfinite()
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    frozen = {key for key, value in model.named_parameters() if not value.requires_grad}
    assert moved
    assert not moved & frozen
    tokens, written = write(model.eval(), PARITY, plan=early_stop, max_steps=4)
    assert tokens.shape == PARITY.test.shape
    assert torch.equal(tokens[:, : PARITY.prompt_length], PARITY.test[:, : PARITY.prompt_length])
    assert ((written.levels >= 0) & (written.levels <= 1)).all()


@pytest.mark.parametrize("name", list(VARIANTS))
def test_what_variants_share_begins_with_the_same_weights(name):
    """Another first latent alone changes what a short run comes to by more than most variants do."""
    model, plain = (build(plan_of(small(variant=each), PARITY, CPU)) for each in (name, "learned"))
    found, expected = model.state_dict(), plain.state_dict()
    # A readout of another kind has entries of these names too.
    shared = {key for key in found.keys() & expected.keys() if found[key].shape == expected[key].shape}
    assert {"bos", "latent_space.directions"} <= shared
    assert all(torch.equal(found[key], expected[key]) for key in shared)


@pytest.mark.slow
def test_held_out_examples_teach_the_head_and_nothing_else():
    row = small(variant="held-out", task="parity-8", budget=20 * 64)
    plan = plan_of(row, PARITY, CPU, progress=False)
    first, last = VARIANTS["held-out"].phases
    seen, apart = plan.of(first).data.train, plan.of(last).data.train
    assert torch.equal(torch.cat([seen, apart]), PARITY.train)
    assert len(apart) == 1
    whole = fit(plan)
    alone = fit(replace(plan, variant=replace(plan.variant, phases=(first, replace(last, share=0.05)))))
    learned, before = whole.model.state_dict(), alone.model.state_dict()
    assert {key for key in learned if not torch.equal(learned[key], before[key])} <= {
        f"timestep_head.{name}" for name in ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
    }
    assert not torch.equal(learned["timestep_head.outer.bias"], before["timestep_head.outer.bias"])


def test_two_modules_share_nothing_but_the_embeddings_and_cached_equals_uncached():
    model = build(plan_of(small(variant="two-modules"), PARITY, CPU)).double().eval()
    tokens = PARITY.test[:2]
    with torch.no_grad():
        model.readout.linear.weight.normal_(std=0.3)
        before = model.context_logits(tokens)
        field = model.vector_field(tokens[:, :4])
        level = torch.full((2, 4), 0.5, dtype=torch.float64)
        latents = model.latent_space.weight[tokens[:, 4:]]
        cached = field.denoise(latents, level).log_probs
        whole = torch.cat([model.latent_space.weight[tokens[:, :4]], latents], 1)
        levels = torch.cat([torch.zeros_like(level), level], 1)
        hidden = model.refine(whole, levels, prompt=torch.tensor([4, 4]))[:, 4:]
        logits = model.readout(hidden, model.latent_space.weight)
        torch.testing.assert_close(cached, field.denoiser(logits, latents, level).log_probs, rtol=1e-9, atol=1e-9)
        for parameter in model.backbone.refinement.parameters():
            parameter.add_(0.1)
        assert torch.equal(before, model.context_logits(tokens))
        assert not torch.allclose(cached, model.vector_field(tokens[:, :4]).denoise(latents, level).log_probs)


def test_a_model_without_time_cannot_tell_levels():
    model = build(plan_of(small(variant="no-time"), PARITY, CPU)).eval()
    latents = torch.randn(1, 4, model.latent_space.dim)
    with torch.no_grad():
        torch.nn.init.normal_(model.backbone.backbone.level_embedding.linear.weight)
        low, high = (model.refine(latents, torch.full((1, 4), level)) for level in (0.2, 0.9))
    assert torch.equal(low, high)
