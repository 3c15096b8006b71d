"""Starting from models of the transformers package, and going back: the same numbers, from the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from evo import Evo
from evo.heads import FixedTimestep
from evo.interop import export_causal_lm, freeze_backbone, from_pretrained
from evo.schedules import Learned
from evo.testing import check_model_limits
from tests.conftest import generator, random_model
from tests.pretrained_models import CONTEXT, KINDS, VOCAB, in_double, reference, saved

EVERY_KIND = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Where a model of each kind is saved, by kind; made when first asked for."""
    made: dict[str, Path] = {}

    def find(kind):
        if kind not in made:
            made[kind] = saved(reference(kind), tmp_path_factory.mktemp("checkpoint"))
        return made[kind]

    return find


def tokens_of(seed: int = 0, batch: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=generator(seed))


def edited(source: Path, target: Path, **entries: object) -> Path:
    """A copy of a checkpoint with other entries in its config; None takes one out."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | entries
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def written_greedily(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    everything = torch.ones_like(prompt)
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=everything, **options)[:, prompt.shape[1] :]


@EVERY_KIND
@torch.no_grad()
def test_context_logits_are_the_logits_of_the_other_model(checkpoints, kind):
    tokens, model = tokens_of(), from_pretrained(checkpoints(kind))
    logits = model.context_logits(tokens)
    torch.testing.assert_close(logits[:, 1:], reference(kind)(tokens).logits[:, :-1], rtol=0, atol=1e-4)
    assert (logits[:, 0] == logits[0, 0, 0]).all(), "of the first token nothing is known"
    assert logits[:, 1:].std() > 0.1


@EVERY_KIND
@torch.no_grad()
def test_in_float64_they_agree_to_the_last_digits(checkpoints, kind):
    model = from_pretrained(checkpoints(kind), dtype=torch.float64)
    tokens = tokens_of(1)
    logits = in_double(reference(kind), model)(tokens).logits
    torch.testing.assert_close(model.context_logits(tokens)[:, 1:], logits[:, :-1], rtol=0, atol=1e-9)


@EVERY_KIND
def test_greedy_generation_writes_the_same_text(checkpoints, kind):
    model, prompt = from_pretrained(checkpoints(kind)), tokens_of(2, length=6)
    found = model.generate(prompt, 12, timestep_head=FixedTimestep(0.0), temperature=0.0)
    assert torch.equal(found.tokens, written_greedily(reference(kind), prompt, 12))
    assert found.nfe == 0


@EVERY_KIND
def test_there_and_back_every_weight_is_the_same(checkpoints, kind, tmp_path):
    export_causal_lm(from_pretrained(checkpoints(kind)), tmp_path / "back")
    original, back = reference(kind), AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    expected, found = original.state_dict(), back.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        # A sliding window was no limit up to where the context ends, which is all that was taken over of it.
        assert torch.equal(back(tokens_of()).logits, original(tokens_of()).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_the_limits_hold_behind_a_detached_bos(checkpoints, kind):
    check_model_limits(from_pretrained(checkpoints(kind)))


@pytest.mark.parametrize("kind", ["llama tied", "llama", "gpt2"])
def test_an_imported_model_trains_and_refines(checkpoints, kind):
    model = from_pretrained(checkpoints(kind), self_conditioning=True).train()
    model(tokens_of(), generator=generator()).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # The inner layer of the head of levels waits for its outer one, and a second estimate for a first.
    assert without <= {"timestep_head.inner.weight", "timestep_head.inner.bias", "backbone.estimate_embed.weight"}
    written = model.eval().generate(tokens_of(length=5), 8, max_steps=4, generator=generator())
    assert written.tokens.shape == (3, 8)
    assert written.nfe > 0


def test_a_frozen_backbone_trains_what_evo_added_and_nothing_else(checkpoints, tmp_path):
    model = from_pretrained(checkpoints("llama tied"), freeze="backbone").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {f"timestep_head.{layer}.{kind}" for layer in ("inner", "outer") for kind in ("weight", "bias")}
    backbone = {"backbone.own_role", "backbone.embed.slack", "backbone.level_embedding.linear.weight"}
    assert trainable == heads | backbone | {"bos"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        model(tokens_of(step), generator=generator(step)).loss.backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert backbone <= changed <= trainable
    model.save_pretrained(tmp_path)
    again = freeze_backbone(Evo.from_pretrained(tmp_path))
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trainable
    with pytest.raises(ValueError, match="does not start from a pretrained one"):
        freeze_backbone(random_model())
    with pytest.raises(ValueError, match="freeze is 'all'; known are 'backbone'"):
        from_pretrained(checkpoints("llama tied"), freeze="all")


def test_a_trained_schedule_is_taken_as_it_is(checkpoints):
    schedule = Learned(intervals=4)
    torch.nn.init.normal_(schedule.log_speed, generator=generator())
    expected = schedule.log_speed.detach().clone()
    model = from_pretrained(checkpoints("llama tied"), schedule=schedule, freeze="backbone")
    assert model.schedule is schedule
    assert torch.equal(schedule.log_speed, expected)
    assert schedule.log_speed.requires_grad


def test_shards_are_read_one_by_one(checkpoints, tmp_path):
    path = saved(reference("llama"), tmp_path / "sharded", max_shard_size="10KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    found, expected = from_pretrained(path).state_dict(), from_pretrained(checkpoints("llama")).state_dict()
    added = {name for name in expected if name.startswith("timestep_head.inner")}
    assert all(torch.equal(found[name], expected[name]) for name in expected.keys() - added)


def test_bfloat16_stays_what_it_is(tmp_path):
    path = saved(reference("llama tied").bfloat16(), tmp_path)
    model, theirs = from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ids = torch.arange(VOCAB)
    read = model.backbone.embed(model.latent_space.embed(ids))
    assert torch.equal(read, theirs.get_input_embeddings().weight)
    assert from_pretrained(path, dtype=torch.float32).bos.dtype == torch.float32
    with torch.no_grad():
        logits = theirs(tokens_of()).logits.float()
        error = (model.context_logits(tokens_of())[:, 1:] - logits[:, :-1]).abs().max()
    assert error < 0.05 * logits.std()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
@torch.no_grad()
def test_a_shorter_context_says_the_same(checkpoints, kind, tmp_path):
    model, tokens = from_pretrained(checkpoints(kind), context=10), tokens_of(length=10)
    assert model.context == 10
    expected = reference(kind)(tokens).logits
    torch.testing.assert_close(model.context_logits(tokens)[:, 1:], expected[:, :-1], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"context|positions"):
        model.context_logits(tokens_of(length=11))
    export_causal_lm(model, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(back(tokens).logits, expected, rtol=0, atol=1e-5)


def test_older_configs_keep_their_rope_elsewhere(checkpoints, tmp_path):
    scaling = {"type": "linear", "factor": 2.5}
    path = edited(checkpoints("llama linear"), tmp_path, rope_parameters=None, rope_theta=100.0, rope_scaling=scaling)
    expected = from_pretrained(checkpoints("llama linear")).context_logits(tokens_of())
    assert torch.equal(from_pretrained(path).context_logits(tokens_of()), expected)


def test_a_bare_gpt2_has_no_prefix(checkpoints, tmp_path):
    reference("gpt2").transformer.save_pretrained(tmp_path)
    path = edited(tmp_path, tmp_path, architectures=["GPT2LMHeadModel"])
    expected = from_pretrained(checkpoints("gpt2")).context_logits(tokens_of())
    assert torch.equal(from_pretrained(path).context_logits(tokens_of()), expected)


def test_an_imported_model_is_saved_and_loaded_like_any_other(checkpoints, tmp_path):
    for kind in ("llama yarn", "gpt2", "qwen3 biased", "llama 3"):
        model = from_pretrained(checkpoints(kind))
        model.save_pretrained(tmp_path / kind)
        loaded = Evo.from_pretrained(tmp_path / kind)
        assert loaded.config == model.config
        assert torch.equal(loaded.context_logits(tokens_of()), model.context_logits(tokens_of()))


@torch.no_grad()
def test_a_model_of_our_own_becomes_a_llama_with_a_token_for_bos(tmp_path):
    model = random_model(dtype=torch.float32, vocab_size=VOCAB, readout_bias=False, context=CONTEXT)
    export_causal_lm(model, tmp_path / "out")
    theirs, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens_of()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    behind_bos = torch.nn.functional.pad(tokens, (1, 0), value=theirs.config.bos_token_id)
    logits = theirs(behind_bos).logits[:, :-1, :VOCAB]
    torch.testing.assert_close(model.context_logits(tokens), logits, rtol=0, atol=1e-4)
    written = model.generate(tokens[:, :4], 10, timestep_head=FixedTimestep(0.0), temperature=0.0).tokens
    assert torch.equal(written, written_greedily(theirs, behind_bos[:, :5], 10))
    # Its logit is 0, which is the highest where all the others are negative.
    theirs.lm_head.weight[:VOCAB] = -theirs(behind_bos[:1, :5], output_hidden_states=True).hidden_states[-1][0, -1]
    assert theirs(behind_bos[:1, :5]).logits[0, -1].argmax() == theirs.config.bos_token_id
    assert (written_greedily(theirs, behind_bos[:1, :5], 1) < VOCAB).all()


def test_what_was_learned_of_further_dimensions_goes_into_the_exported_embeddings(checkpoints, tmp_path):
    model = from_pretrained(checkpoints("llama tied"))
    with torch.no_grad():
        model.backbone.embed.slack.normal_(std=0.1)
        export_causal_lm(model, tmp_path / "out")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        expected = model.context_logits(tokens_of())[:, 1:]
        torch.testing.assert_close(theirs(tokens_of()).logits[:, :-1], expected, rtol=0, atol=1e-4)
