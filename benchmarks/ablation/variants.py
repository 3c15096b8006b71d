"""The paper's variants (its tables of ablations) and ours, each a composition of public parts.

A variant says which model is built and which levels it trains at. In evaluation its own levels are those of its head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from benchmarks.ablation.parts import AsTheyAre, OwnReadout, TwoModules, WithoutTime
from evo import Evo, EvoConfig
from evo.heads import EntropyTimestep, FixedTimestep, TimestepHead
from evo.schedules import InformationUniform, Learned


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run, with an optimizer and a rate of its own; it begins with the averaged weights of the one before.

    Args:
        share: of the budget.
        levels: that training is at; None explores around those of the head.
        prepare: what is done to the model before, such as freezing.
        curriculum: entries of the row's curriculum that are others in this phase.
        held_out: trained on examples that the other phases never see, a tenth of all.
    """

    share: float = 1.0
    levels: float | None = None
    prepare: Callable[[Evo], None] | None = None
    curriculum: Mapping[str, float] = field(default_factory=dict)
    held_out: bool = False


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to be Evo.

    Args:
        about: what sets it apart, for tables.
        build: the model of a config.
        phases: what it is trained on, in turn; shares add up to 1.
    """

    about: str
    build: Callable[[EvoConfig], Evo] = EvoConfig.build
    phases: tuple[Phase, ...] = (Phase(),)


def with_parts(base: Evo, **other: nn.Module) -> Evo:
    """A model of the parts of `base`, some of them exchanged; what they share begins with the same weights."""
    parts: dict[str, nn.Module] = {
        "latent_space": base.latent_space,
        "backbone": base.backbone,
        "schedule": base.schedule,
        "timestep_head": base.timestep_head,
        "readout": base.readout,
    }
    model = Evo(**{**parts, **other})  # pyright: ignore[reportArgumentType]
    model.bos = base.bos
    return model


def fixed(value: float) -> Variant:
    """One level for every token, in training and after."""
    return Variant(
        about=f"t ≡ {value:g}",
        build=lambda config: with_parts(config.build(), timestep_head=FixedTimestep(value)),
        phases=(Phase(levels=value),),
    )


def freeze_autoregression(model: Evo) -> None:
    """Keep what an autoregressive model is made of as it is; left to learn are level, role, readout and head."""
    for part in (model.latent_space, model.backbone.embed, model.backbone.blocks, model.backbone.norm):
        part.requires_grad_(False)
    model.bos.requires_grad_(False)


def head_alone(model: Evo) -> None:
    """Keep everything but the timestep head as it is, and let that begin anew, at level 1/2."""
    model.requires_grad_(False)
    assert isinstance(model.timestep_head, TimestepHead)
    model.timestep_head.requires_grad_(True)
    for parameter in model.timestep_head.outer.parameters():
        nn.init.zeros_(parameter)


def _without_time(config: EvoConfig) -> Evo:
    base = config.build()
    space = AsTheyAre(base.latent_space.vocab_size, base.latent_space.dim, base.latent_space.radius)
    space.load_state_dict(base.latent_space.state_dict())
    return with_parts(base, latent_space=space, backbone=WithoutTime(base.backbone))


def _two_modules(config: EvoConfig) -> Evo:
    base = config.build()
    return with_parts(base, backbone=TwoModules(base.backbone, config.build().backbone))


def _self_conditioned(config: EvoConfig) -> Evo:
    base = config.build()
    model = replace(config, self_conditioning=True).build()
    model.load_state_dict(base.state_dict(), strict=False)
    return model


def _no_shared_embeddings(config: EvoConfig) -> Evo:
    return with_parts(config.build(), readout=OwnReadout(config.width, config.vocab_size))


def _information_uniform(config: EvoConfig) -> Evo:
    base = config.build()
    return with_parts(base, schedule=InformationUniform.of(base.latent_space))


AUTOREGRESSION_FIRST = Phase(share=0.5, levels=0.0)

VARIANTS: Mapping[str, Variant] = {
    "learned": Variant(about="learned t, as Evo is"),
    "t0": fixed(0.0),
    "t0.5": fixed(0.5),
    "t1": fixed(1.0),
    "entropy": Variant(
        about="t from the entropy of the context",
        build=lambda config: with_parts(config.build(), timestep_head=EntropyTimestep()),
    ),
    "no-time": Variant(about="no time conditioning", build=_without_time),
    "two-modules": Variant(about="a backbone for each half", build=_two_modules),
    "no-shared-embeddings": Variant(about="an output matrix of its own", build=_no_shared_embeddings),
    "pretrained": Variant(about="half of the budget as t ≡ 0 first", phases=(AUTOREGRESSION_FIRST, Phase(share=0.5))),
    "frozen": Variant(
        about="the same, then the autoregressive backbone frozen",
        phases=(AUTOREGRESSION_FIRST, Phase(share=0.5, prepare=freeze_autoregression)),
    ),
    "held-out": Variant(
        about="the levels learned on examples held out of all other training",
        phases=(
            Phase(share=0.9),
            Phase(
                share=0.1,
                prepare=head_alone,
                curriculum={"explore": 0.5, "explore_floor": 0.5, "explore_alone": 0.0, "masked": 0.0, "teaching": 1.0},
                held_out=True,
            ),
        ),
    ),
    "self-conditioned": Variant(about="self-conditioning", build=_self_conditioned),
    "schedule-learned": Variant(
        about="learned schedule", build=lambda config: with_parts(config.build(), schedule=Learned())
    ),
    "schedule-information": Variant(about="information-uniform schedule", build=_information_uniform),
}
