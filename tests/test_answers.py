"""Heads, priors, decoders, readouts and tables that give what they should not: told as what they are, and never written into a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo import evaluate
from evo.core import Speculation, Transformer
from evo.core.duality import EnumeratedTokens, split_bits, split_model_bits
from evo.heads import FixedTimestep
from evo.schedules import Cosine
from tests.conftest import generator, random_model

TOKENS = torch.arange(10).view(2, 5) % 7


def with_head(head: Any) -> Any:
    model = random_model()
    del model.timestep_head
    model.timestep_head = head
    return model


@given(
    level=st.sampled_from([float("nan"), -0.3, 1.2, float("inf")]), stride=st.sampled_from([1, 2]), at=st.integers(0, 5)
)
@settings(max_examples=12)
def test_what_is_no_level_is_refused(level: float, stride: int, at: int) -> None:
    calls = []

    def late(hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        calls.append(logits)
        levels = torch.full_like(logits[..., 0], 0.6)
        levels[-1, -1] = level if len(calls) > at // stride else 0.6
        return levels

    with pytest.raises(ValueError, match="the timestep head gave level"):
        with_head(late).generate(TOKENS, 6, stride=stride, max_steps=3, generator=generator())
    wrong = with_head(lambda hidden, logits: torch.full_like(logits[..., 0], level))
    for call in (lambda: evaluate(wrong, TOKENS, clock_values=1), lambda: wrong(TOKENS)):
        with pytest.raises(ValueError, match="the timestep head gave level"):
            call()


def test_a_network_that_gives_nan_is_blamed_itself() -> None:
    model = random_model()
    with torch.no_grad():
        model.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the network gave NaN or infinite logits"):
        model.generate(TOKENS, 4, generator=generator())
    assert model(TOKENS, generator=generator()).loss.isnan()


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (lambda hidden, logits: logits[..., :1].sigmoid(), "a float64 tensor of shape"),
        (lambda hidden, logits: logits.sigmoid().mean((1, 2)), r"a float64 tensor of shape \(2,\)"),
        (lambda hidden, logits: logits.argmax(-1), "a int64 tensor"),
        (lambda hidden, logits: 0.5, "gave 0.5 for hidden states"),
    ],
)
def test_a_head_of_another_shape_is_refused(head: Any, said: str) -> None:
    model = with_head(head)
    for call in (lambda: model.generate(TOKENS, 3), lambda: evaluate(model, TOKENS)):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize(
    ("choose", "said"),
    [
        (lambda logits: logits.softmax(-1), "it needs int64 ids of shape"),
        (lambda logits: logits.argmax(), "it needs int64 ids of shape"),
        (lambda logits: logits.argmax(-1).float(), "gave a float32 tensor"),
        (lambda logits: logits.argmax(-1) * 0 + 7, r"gave id 7; ids of this model lie in \[0, 7\)"),
        (lambda logits: logits.argmax(-1) - 7, "gave id -"),
    ],
)
def test_what_is_no_id_is_refused(choose: Any, said: str) -> None:
    model = random_model()
    for options in (
        {"prior": lambda logits, uniform: choose(logits)},
        {"prior": lambda logits, uniform: choose(logits), "speculation": Speculation(run=2)},
        {"decoder": lambda logits, denoised, embeddings, uniform: choose(logits), "timestep_head": FixedTimestep(1.0)},
    ):
        with pytest.raises(ValueError, match=said):
            model.generate(TOKENS, 3, max_steps=2, **options)


@pytest.mark.parametrize("size", [5, 12])
def test_a_readout_or_a_table_of_another_size_is_refused(size: int) -> None:
    model = random_model()
    model.readout.forward = lambda hidden, embeddings: hidden.new_zeros(*hidden.shape[:-1], size)
    field, latents = model.vector_field(TOKENS), torch.zeros(2, 1, 8, dtype=torch.float64)
    for call in (
        lambda: model(TOKENS),
        lambda: model.context_logits(TOKENS),
        lambda: model.generate(TOKENS, 2),
        lambda: field(latents, latents[..., 0]),
    ):
        with pytest.raises(ValueError, match="one logit for each of the 7 entries"):
            call()
    model = random_model()
    model.latent_space.vocab_size = size + 7
    for call in (model, model.context_logits, lambda tokens: model.generate(tokens, 2)):
        with pytest.raises(ValueError, match=r"the latent space has a weight of shape \(7, 8\)"):
            call(TOKENS)


class Forgets(Transformer):
    def forward(self, *args: Any, cache: Any = None, store: bool = False, packing: Any = None, **options: Any) -> Any:
        return super().forward(*args, **options)


def test_a_backbone_that_stores_nothing_is_told() -> None:
    model = random_model()
    model.backbone.__class__ = Forgets
    for call in (
        lambda: model.generate(TOKENS, 4),
        lambda: model.generate(TOKENS[:, :0], 4, speculation=Speculation(run=2)),
        lambda: model.vector_field(TOKENS),
    ):
        with pytest.raises(ValueError, match=r"the backbone was asked to store \d tokens and stored 0"):
            call()


DISTRIBUTION = EnumeratedTokens(
    schedule=Cosine(),
    probabilities=torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=torch.float64),
    embeddings=2 * torch.eye(2, dtype=torch.float64),
)


def test_bits_are_split_at_levels_and_nothing_else() -> None:
    def split(levels: Any, **options: Any) -> Any:
        return split_bits(
            DISTRIBUTION, levels, generator=generator(), **{"sequences": 16, "clock_values": 2, **options}
        )

    assert split(0.5) == split(torch.tensor([0.5, 0.5])) == split(lambda latents, levels: torch.full((16,), 0.5))
    for levels, said in (
        (torch.tensor([0.5, torch.nan]), "got nan"),
        (-1.0, "got -1"),
        (1.5, "got 1.5"),
        (lambda latents, levels: torch.full((16,), 1.5), "got 1.5"),
        (torch.zeros(3), r"shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            split(levels)
    with pytest.raises(TypeError, match="levels is 'a'"):
        split("a")
    for options in ({"clock_values": 0}, {"sequences": 1}):
        with pytest.raises(ValueError, match="at least"):
            split(0.5, **options)
    for tokens, draws in ((TOKENS[:1], 2), (TOKENS, 0)):
        with pytest.raises(ValueError, match="at least"):
            split_model_bits(random_model(), tokens, 0.5, generator=generator(), draws=draws)
