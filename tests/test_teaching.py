"""Who learns what from the flow: the network from cross-entropies and a little of the bound, the timestep head from the bound alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evo import Evo, Objective
from evo.core import Exploration, Part

QUIET = {"causal_weight": 1.0, "entropy_weight": 0.0, "aux_weight": 0.0}


@pytest.fixture(scope="module")
def model() -> Evo:
    torch.manual_seed(0)
    made = Evo.from_preset("tiny", vocab_size=7, width=16, depth=1, heads=1, context=16).double().train()
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made


def gradients(model: Evo, objective: Objective, batch: int = 8) -> tuple[Tensor, Tensor]:
    """Of the network and of its timestep head, flat."""
    model.zero_grad(set_to_none=True)
    tokens = torch.randint(0, 7, (batch, 6), generator=torch.Generator().manual_seed(3))
    model(tokens, generator=torch.Generator().manual_seed(4), objective=objective).loss.backward()
    head = {id(parameter) for parameter in model.timestep_head.parameters()}
    flat: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter in model.parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        flat[id(parameter) in head].append(found.flatten())
    return torch.cat(flat[0]), torch.cat(flat[1])


@given(st.floats(0.01, 3.0))
def test_the_weight_of_the_flow_is_the_networks_alone(model, weight):
    network, head = zip(*(gradients(model, Objective(**QUIET, flow_weight=w)) for w in (1.0, 2.0, weight)), strict=True)
    assert head[0].norm() > 0.01
    torch.testing.assert_close(head[2], head[0], rtol=1e-9, atol=1e-12)
    assert (network[1] - network[0]).norm() > 0.01
    torch.testing.assert_close(network[2], torch.lerp(network[0], network[1], weight - 1), rtol=1e-9, atol=1e-12)


def test_the_head_learns_from_its_teachers_alone(model):
    exploration = Exploration(share=0.0, noise=0.5)
    none, half, full = (
        gradients(model, Objective(**QUIET, exploration=exploration, teaching=share))[1] for share in (0.0, 0.5, 1.0)
    )
    assert none.abs().max() == 0
    assert half.norm() > 0
    assert (full - half).norm() > 0


def test_auxiliary_cross_entropies_do_not_move_the_head(model):
    """They are least at level 0, whatever the bound says of it."""
    bound = Objective(**QUIET, flow_weight=0.1, teaching=0.5)
    spoken = Objective(**{**QUIET, "aux_weight": 2.0}, flow_weight=0.1, teaching=0.5)
    (network, head), (other, same) = gradients(model, bound), gradients(model, spoken)
    assert (network - other).norm() > 0.01
    torch.testing.assert_close(same, head, rtol=1e-12, atol=1e-14)


@given(total=st.integers(1, 40), share=st.floats(0.0, 1.0), teaching=st.floats(0.0, 1.0))
def test_teachers_are_a_share_of_the_learners_in_every_cut(total, share, teaching):
    def teachers(rows: range) -> list[int]:
        kinds = Part(rows=rows, total=total, scored=1).kinds(share)
        found = kinds.some_learners(teaching)
        assert found.whole == int(kinds.learners.whole * teaching)
        assert set(found.places) <= set(kinds.learners.places)
        return [rows[place] for place in found.places]

    whole = teachers(range(total))
    assert len(whole) == Part(rows=range(total), total=total, scored=1).kinds(share).some_learners(teaching).whole
    cut = total // 3
    assert sorted(teachers(range(cut)) + teachers(range(cut, total))) == whole


@pytest.mark.parametrize(("name", "value"), [("flow_weight", 0.0), ("flow_weight", float("inf")), ("teaching", 1.5)])
def test_weights_and_shares_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Objective(**{name: value})
