"""Rotary positions as a Hugging Face `config.json` describes them."""

from __future__ import annotations

from typing import Any

from evo.core.rotary import LinearScaling, Llama3Scaling, Rotary, YarnScaling
from evo.interop.entries import Entries


def read_rotary(config: Entries) -> Rotary:
    """The rotary positions of a config: `rope_parameters`, or in older ones `rope_theta` and `rope_scaling`.

    "dynamic" leaves the frequencies alone up to `max_position_embeddings`, the longest context there is here, so it is "default".

    Raises:
        ValueError: for a kind that is not one of default, dynamic, linear, llama3 and yarn, or what is missing of one.
    """
    rope = config.within("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
    base = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    for entries in (config, rope):
        entries.only("partial_rotary_factor", 1, default=1)
    kind = rope.data.get("rope_type", rope.data.get("type", "default"))
    if kind in ("default", "dynamic"):
        return Rotary(base=base)
    if kind == "linear":
        return Rotary(base=base, scaling=LinearScaling(factor=rope.number("factor")))
    if kind not in ("llama3", "yarn"):
        raise rope.error("rope_type", "default, dynamic, linear, llama3 or yarn")
    positions = config.integer("max_position_embeddings")
    # An entry of the model goes before that of its scaling, which goes before how long it is now.
    original = rope.integer("original_max_position_embeddings", positions)
    original = config.integer("original_max_position_embeddings", original)
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=rope.number("factor"),
            low_frequency=rope.number("low_freq_factor"),
            high_frequency=rope.number("high_freq_factor"),
            original_context=original,
        )
        return Rotary(base=base, scaling=scaling)
    return Rotary(base=base, scaling=_yarn(rope, rope.number("factor", positions / original), original))


def _yarn(rope: Entries, factor: float, original: int) -> YarnScaling:
    amplitude = YarnScaling.attention_amplitude(factor)
    if rope.has("mscale") and rope.has("mscale_all_dim"):
        amplitude = YarnScaling.attention_amplitude(factor, rope.number("mscale"))
        amplitude /= YarnScaling.attention_amplitude(factor, rope.number("mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        original_context=original,
        fast=rope.number("beta_fast", 32.0),
        slow=rope.number("beta_slow", 1.0),
        amplitude=rope.number("attention_factor", amplitude),
        whole=rope.flag("truncate", True),
    )


def write_rotary(rotary: Rotary) -> dict[str, Any]:
    """The `rope_parameters` that `read_rotary` turns back into this."""
    scaling, base = rotary.scaling, {"rope_theta": rotary.base}
    if scaling is None:
        return {"rope_type": "default", **base}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", **base, "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            **base,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_context,
        }
    return {
        "rope_type": "yarn",
        **base,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context,
        "beta_fast": scaling.fast,
        "beta_slow": scaling.slow,
        "attention_factor": scaling.amplitude,
        "truncate": scaling.whole,
    }
