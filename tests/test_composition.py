"""What is loaded is what was saved: parts that were exchanged, tensors that are shared, and what says so where neither can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evo import Evo
from evo.core import LatentSpace, Rotary, Transformer, Xformers
from evo.core.composition import composition, shared_tensors
from evo.core.rotary import RotaryTable
from evo.heads import EntropyTimestep, FixedTimestep, TimestepHead
from evo.schedules import Cosine, InformationUniform, Learned, LinearVP, Schedule, Shifted
from tests.conftest import generator, random_model

TOKENS = torch.randint(0, 7, (2, 9), generator=generator())


class Line(Schedule):
    """A schedule of one's own."""

    def log_snr(self, t):
        return 8 - 16 * t


class TableReadout(nn.Module):
    """Holds the table of the latent space."""

    def __init__(self, space: LatentSpace, width: int) -> None:
        super().__init__()
        self.table = space.directions
        self.linear = nn.Linear(width, space.dim)

    def forward(self, hidden, embeddings):
        return self.linear(hidden) @ self.table.T


class KnowingHead(nn.Module):
    """Holds the readout, a view of a weight, and a count."""

    def __init__(self, readout: nn.Module) -> None:
        super().__init__()
        self.readout = readout
        self.register_buffer("slice", readout.table.detach()[1:3])
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, hidden, context_logits):
        return context_logits.logsumexp(-1).sigmoid()


def tied() -> Evo:
    space = LatentSpace(7, 8)
    readout = TableReadout(space, 16)
    return Evo(
        latent_space=space,
        backbone=Transformer(8, 16, 1, 2, positions=20),
        readout=readout,
        timestep_head=KnowingHead(readout),
    ).eval()


def says(model: Evo) -> torch.Tensor:
    """The bound of a text at level ½, and what the head would choose."""
    model.eval()
    return torch.stack([model(TOKENS, levels=level, generator=generator()).bound for level in (0.5, None)])


SCHEDULES = [
    lambda model, number: Shifted(Shifted(LinearVP(), number), -1.0, t_min=0.2),
    lambda model, number: InformationUniform.of(model.latent_space),
    lambda model, number: Learned(5),
]


@pytest.mark.parametrize("make", SCHEDULES)
@settings(max_examples=2)
@given(number=st.floats(-3, 3), longer=st.booleans())
def test_a_schedule_that_was_exchanged_travels(make, number, longer, tmp_path_factory):
    path, model = tmp_path_factory.mktemp("exchanged"), random_model()
    model.schedule = make(model, number)
    model.backbone.positions += longer
    with torch.no_grad():
        for parameter in model.schedule.parameters():
            parameter.normal_()
    model.save_pretrained(path)
    loaded = Evo.from_pretrained(path)
    assert type(loaded.schedule) is type(model.schedule)
    assert torch.equal(says(loaded), says(model))
    assert loaded.context == model.context


def exchanged(part: str, value: object) -> Evo:
    model = random_model()
    owner, _, name = f"model.{part}".rpartition(".")
    setattr(model.get_submodule(owner.removeprefix("model").removeprefix(".")), name, value)
    return model.eval()


EXCHANGED = {
    "timestep_head": lambda: TimestepHead(32, gain=1.0).double(),
    "timestep_head.gain": lambda: 1.0,
    "schedule": lambda: Line(),
    "latent_space.radius": lambda: 3.0,
    "backbone.rotary": lambda: RotaryTable(Rotary(base=100.0), 16),
    "backbone.blocks.0.attention_norm": lambda: nn.RMSNorm(32, eps=1e-3, dtype=torch.float64),
}


@pytest.mark.parametrize("part", EXCHANGED)
def test_a_part_that_no_config_builds_is_told_and_travels_into_a_model_composed_alike(part, tmp_path):
    model, name = exchanged(part, EXCHANGED[part]()), part.rpartition(".")[0] if part[-4:] in ("gain", "dius") else part
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="parts of it were replaced: compose it again and call its load_weights"):
        Evo.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"composed otherwise: {name} is .* there and .* here"):
        random_model(1).load_weights(tmp_path)
    alike = exchanged(part, EXCHANGED[part]())
    assert torch.equal(says(alike.load_weights(tmp_path)), says(model))


def test_what_a_model_may_change_is_no_other_model(tmp_path):
    model = random_model()
    model.backbone.attention = Xformers()
    model.backbone.blocks[0].dropout.p = 0.3
    model.backbone.blocks[0].attention.dropout = 0.2
    model.save_pretrained(tmp_path)
    assert Evo.from_pretrained(tmp_path).config == model.config
    assert random_model(1, dropout=0.5, context=50).load_weights(tmp_path).context == 50


def test_a_model_of_a_config_is_not_loaded_into_another_one(tmp_path):
    random_model().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"schedule is evo.Cosine\(t_min=0.1\) there and evo.Shifted\(log_snr_shift=1.0"
    ):
        random_model(schedule=Shifted(Cosine(), 1.0).config()).load_weights(tmp_path)


def test_heads_without_weights_are_told_apart(tmp_path):
    def compose(head):
        return Evo(latent_space=LatentSpace(7, 8), backbone=Transformer(8, 16, 1, 2, positions=20), timestep_head=head)

    compose(FixedTimestep(0.5)).save_pretrained(tmp_path)
    for other in (FixedTimestep(0.25), EntropyTimestep()):
        with pytest.raises(ValueError, match=r"timestep_head is evo.FixedTimestep\(value=0.5\) there"):
            compose(other).load_weights(tmp_path)
    compose(FixedTimestep(0.5)).load_weights(tmp_path)


def test_shared_tensors_are_written_once_and_come_back_shared(tmp_path):
    model, other = tied(), tied()
    model.timestep_head.count += 3
    again = shared_tensors(model)
    assert again["readout.table"] == "latent_space.directions"
    assert again["readout.linear.weight"] == "timestep_head.readout.linear.weight"
    model.save_pretrained(tmp_path)
    assert torch.equal(says(other.load_weights(tmp_path)), says(model))
    assert other.readout.table is other.latent_space.directions
    assert other.timestep_head.count == 3
    apart = tied()
    apart.readout.table = nn.Parameter(torch.zeros(7, 8))
    with pytest.raises(ValueError, match=r"missing \['timestep_head.readout.table'\]"):
        apart.load_weights(tmp_path)
    apart.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"surplus \['timestep_head.readout.table'\]"):
        other.load_weights(tmp_path)


def test_a_composition_says_nothing_of_weights_dtypes_and_modes():
    assert composition(random_model(0)) == composition(random_model(1, torch.bfloat16).train())


def test_a_composition_that_was_altered_is_an_error(tmp_path):
    tied().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("t_min=0.1", "t_min=0.2"))
    with pytest.raises(ValueError, match="was altered"):
        tied().load_weights(tmp_path)


def test_the_folder_of_a_run_points_to_its_model(tmp_path):
    random_model().save_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"has no config.json.*there is a model in .*model"):
        Evo.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a model config .*; there is a model in .*model"):
        Evo.from_pretrained(tmp_path)
