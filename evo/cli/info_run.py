"""What `evo info --preset` says of a training run."""

from __future__ import annotations

from typing import Any

from evo.cli.info import Options
from evo.cli.info_machine import readable
from evo.core.config import preset
from evo.training.budget import Budget, budget
from evo.training.memory import AUTOCAST, FP32, MIXED, activation_bytes, cache_bytes_per_token

_PRECISIONS = {"mixed": MIXED, "autocast": AUTOCAST, "fp32": FP32}
_GIB = 2**30


def facts(options: Options) -> dict[str, Any]:
    """The run's figures, with their units in their names; everything under memory_bytes_per_gpu is of one GPU.

    Raises:
        ValueError: for an unknown preset, numbers that are none of a run, or a run that does not fit.
    """
    assert options.preset is not None
    if not 0 < options.usable <= 1 or not options.tokens > 0:
        raise ValueError(f"usable {options.usable}, tokens {options.tokens}: needed a share in (0, 1], and some tokens")
    config = preset(options.preset, vocab_size=options.vocab_size)
    found = budget(
        config,
        gpus=options.gpus,
        gpu_bytes=options.usable * options.gpu_memory * _GIB,
        peak_flops=options.peak_tflops * 1e12,
        utilisation=options.utilisation,
        precision=_PRECISIONS[options.precision],
        checkpointing=options.checkpointing,
        length=options.length,
        micro_batch=options.micro_batch,
        accumulate=options.accumulate,
    )
    return {
        "run": {
            "preset": options.preset,
            "vocab_size": options.vocab_size,
            "gpus": options.gpus,
            "gpu_memory_gib": options.gpu_memory,
            "usable": options.usable,
            "peak_tflops": options.peak_tflops,
            "utilisation": options.utilisation,
            "precision": options.precision,
            "checkpointing": options.checkpointing,
            "length": found.length,
            "micro_batch": found.micro_batch,
            "accumulate": found.accumulate,
        },
        "parameters": {
            "embedding": found.parameters.embedding,
            "backbone": found.parameters.backbone,
            "heads": found.parameters.heads,
            "total": found.parameters.total,
        },
        "memory_bytes_per_gpu": _memory(found),
        "activation_bytes_per_sequence": {
            name: activation_bytes(
                config, length=found.length, precision=found.precision, checkpointing=checkpointing
            ).total
            for name, checkpointing in (("kept", False), ("checkpointed", True))
        },
        "flops_per_token": {
            "sketch": found.flops.sketch(found.length),
            "refinement_step": found.flops.refine(found.length),
            "training": found.training_flops,
        },
        "cache_bytes_per_token": cache_bytes_per_token(config),
        "tokens_per_step": found.tokens_per_step,
        "seconds_per_step": found.seconds_per_step,
        "tokens": options.tokens,
        "days": found.days(options.tokens),
    }


def table(found: dict[str, Any]) -> str:
    """The figures as lines of name, value and remark."""
    run, counts, memory = found["run"], found["parameters"], found["memory_bytes_per_gpu"]
    activations, flops = found["activation_bytes_per_sequence"], found["flops_per_token"]
    length, batch = run["length"], run["micro_batch"]
    remarks = {
        "weights": "fp32, sharded",
        "gradients": "fp32, sharded",
        "moments": "fp32, sharded: AdamW has two",
        "average": "fp32, sharded",
        "gathered": "two blocks and all that is outside blocks, with gradients; casts of weights",
        "vocabulary": "e(v) and the evidence's table with gradients",
        "activations": f"{batch} x {length} tokens, both halves",
        "logits": f"{batch} x 8 tensors ({length}, {run['vocab_size']}) in fp32",
    }
    how = "blocks computed once more" if run["checkpointing"] else "nothing computed twice"
    lines = [
        f"{run['preset']} on {run['gpus']} GPU(s) of {run['gpu_memory_gib']:g} GiB, {run['usable']:.0%} of them usable; "
        f"{run['precision']} precision, {how}",
        "",
        _line("parameters", readable(counts["total"]), _parts(counts)),
        "",
        _line("memory of a GPU", "GiB"),
        *(_line(f"  {name}", f"{memory[name] / _GIB:.2f}", remark) for name, remark in remarks.items()),
        _line("  all", f"{memory['total'] / _GIB:.2f}"),
        _line("a sequence", "GiB", "what autograd keeps of it, logits included"),
        _line("  all kept", f"{activations['kept'] / _GIB:.2f}"),
        _line("  checkpointed", f"{activations['checkpointed'] / _GIB:.2f}"),
        "",
        _line("FLOPs of a token", "10^9"),
        _line("  sketch", f"{flops['sketch'] / 1e9:.2f}", f"behind {length} tokens"),
        _line("  refinement step", f"{flops['refinement_step'] / 1e9:.2f}", f"among {length} tokens"),
        _line(
            "  training",
            f"{flops['training'] / 1e9:.2f}",
            "both halves, forward and back, and the pass that chooses levels",
        ),
        _line("cache of a token", f"{found['cache_bytes_per_token'] / 2**10:.1f}", "KiB in bf16"),
        "",
        _line(
            "a step",
            f"{found['tokens_per_step']:,}",
            f"tokens: {run['gpus']} x {run['accumulate']} x {batch} x {length}",
        ),
        _line(
            "", f"{found['seconds_per_step']:.2f}", f"s at {run['utilisation']:.0%} of {run['peak_tflops']:g} TFLOP/s"
        ),
        _line(f"{found['tokens']:.3g} tokens", f"{found['days']:.1f}", "days"),
    ]
    return "\n".join(lines)


def _memory(found: Budget) -> dict[str, float]:
    state, activations = found.state, found.activations
    logits = activations.logits + activations.workspace
    return {
        "weights": state.weights / found.gpus,
        "gradients": state.gradients / found.gpus,
        "moments": state.moments / found.gpus,
        "average": state.average / found.gpus,
        "gathered": found.gathered_bytes,
        "vocabulary": found.vocabulary_bytes,
        "activations": found.micro_batch * (activations.total - logits),
        "logits": found.micro_batch * logits,
        "total": found.used_bytes,
    }


def _parts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {readable(counts[name])}" for name in ("embedding", "backbone", "heads"))


def _line(name: str, value: str, remark: str = "") -> str:
    return f"{name:<18}{value:>12}  {remark}".rstrip()
