"""Backends against attention written out, and the lowering of masks to the bias objects of xformers against their matrices."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evo.core import Auto, Call, Causal, Document, Flex, Pattern, Sdpa, Window, Xformers, auto, explain
from evo.core.backends import xformers as adapter
from tests.attention_cases import CPU, LENGTH, Case, Laid, document_lengths, laid, written_out
from tests.conftest import generator, random_model

DIM = 8


def drawn(
    pattern: Pattern, heads: int = 4, groups: int = 2, seed: int = 0, slots: int | None = None
) -> list[torch.Tensor]:
    """Queries, keys and values, float64; with `slots`, keys and values are the beginnings of such a storage, as in a cache."""
    draws = generator(seed)

    def normal(tokens: int, count: int) -> torch.Tensor:
        return torch.randn(pattern.batch, tokens, count, DIM, generator=draws, dtype=torch.float64).transpose(1, 2)

    keys = [normal(slots or pattern.keys, groups)[:, :, : pattern.keys] for _ in range(2)]
    return [normal(pattern.count, heads), *keys]


@pytest.fixture(scope="module", autouse=True)
def kinds():
    """The bias objects of xformers, which work on any device; its kernels do not."""
    return pytest.importorskip("xformers") and adapter._biases()


class Kernel:
    """`memory_efficient_attention` by its documentation, on any device: what it is given is checked by xformers itself."""

    def __init__(self) -> None:
        self.biases: list[object] = []
        self.dropouts: list[float] = []
        self.shared: list[bool] = []

    def __call__(self, q, k, v, attn_bias=None, p=0.0):
        from xformers.ops.fmha.common import Inputs
        from xformers.ops.fmha.cutlass import _check_bias_alignment

        Inputs(q, k, v, attn_bias, p).validate_inputs()
        self.biases.append(attn_bias)
        self.dropouts.append(p)
        self.shared.append(q.dim() == 5 and k.stride(3) == 0 and v.stride(3) == 0)
        logits = torch.einsum("bq...hc,bk...hc->b...hqk", q, k) / q.shape[-1] ** 0.5
        if isinstance(attn_bias, torch.Tensor):
            complaints: list[str] = []
            _check_bias_alignment(complaints, attn_bias)
            assert not complaints
            assert attn_bias.shape == logits.shape
            logits = logits + attn_bias
        elif attn_bias is not None:
            logits = logits + attn_bias.materialize(logits.shape[-2:]).to(logits.dtype)
        return torch.einsum("b...hqk,bk...hc->bq...hc", logits.softmax(-1), v)


@given(case=laid(), seed=st.integers(0, 99), groups=st.sampled_from([1, 2, 4]))
def test_sdpa_is_attention_written_out(case: Laid, seed, groups):
    q, k, v = drawn(case.pattern, groups=groups, seed=seed)
    torch.testing.assert_close(Sdpa()(q, k, v, case.pattern), written_out(q, k, v, case.matrix), rtol=0, atol=1e-12)


@given(
    case=laid(),
    seed=st.integers(0, 99),
    groups=st.sampled_from([1, 2, 4]),
    more=st.none() | st.integers(0, 5),
    gradient=st.booleans(),
)
def test_xformers_is_attention_written_out(case: Laid, seed, groups, more, gradient):
    q, k, v = drawn(case.pattern, groups=groups, seed=seed, slots=None if more is None else case.pattern.keys + more)
    q.requires_grad_(gradient)
    kernel = Kernel()
    found = Xformers(kernel)(q, k, v, case.pattern)
    torch.testing.assert_close(found, written_out(q, k, v, case.matrix), rtol=0, atol=1e-12)
    assert all(kernel.shared) or groups == 4 or gradient, "keys and values of a group are shared, not copied"


@settings(max_examples=4)
@given(case=laid(), seed=st.integers(0, 99))
def test_flex_is_attention_written_out(case: Laid, seed):
    q, k, v = drawn(case.pattern, seed=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        found = Flex()(q, k, v, case.pattern)
    torch.testing.assert_close(found, written_out(q, k, v, case.matrix), rtol=0, atol=1e-12)


@given(case=laid(whole=True), seed=st.integers(0, 99), backend=st.sampled_from([Sdpa(), Xformers(Kernel()), auto]))
def test_gradients_agree(case: Laid, seed, backend):
    inputs = [x.detach().requires_grad_() for x in drawn(case.pattern, seed=seed)]
    weight = torch.randn(inputs[0].shape, generator=generator(seed), dtype=torch.float64)
    found = torch.autograd.grad((backend(*inputs, case.pattern) * weight).sum(), inputs)
    expected = torch.autograd.grad((written_out(*inputs, case.matrix) * weight).sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@dataclass(frozen=True)
class Expected:
    """A mask over queries at `starts`, and the name of the bias that should be made of it."""

    mask: object
    starts: int | list[int]
    count: int
    bias: str
    gradient: bool = False


RAGGED = [3, 5]


@pytest.mark.parametrize(
    "case",
    [
        Expected(Causal(), 0, LENGTH, "LowerTriangularMask", gradient=True),
        Expected(Causal(), 4, 3, "LowerTriangularFromBottomRightMask"),
        Expected(Causal(), 4, 1, "NoneType"),
        Expected(Window(0), 4, 3, "NoneType"),
        Expected(Document.from_lengths([[5, 7], [12]]), 0, LENGTH, "BlockDiagonalMask", gradient=True),
        Expected(Document.from_lengths([[5, 7]]) & Causal(), 0, LENGTH, "BlockDiagonalCausalMask", gradient=True),
        Expected(Causal() & Document.from_lengths([[5, 7], [12]]), 0, LENGTH, "BlockDiagonalCausalMask"),
        Expected(Causal(), RAGGED, 3, "BlockDiagonalCausalWithOffsetPaddedKeysMask"),
        Expected(Window(0), RAGGED, 3, "BlockDiagonalPaddedKeysMask"),
        Expected(Window(3), RAGGED, 3, "BlockDiagonalPaddedKeysMask"),
        Expected(Window(4), RAGGED, 3, "Tensor"),
        Expected(Causal(), RAGGED, 3, "Tensor", gradient=True),
        Expected(Window(torch.tensor([2, 3])), 0, LENGTH, "Tensor"),
        Expected(Document(torch.zeros(2, LENGTH, dtype=torch.int64)), 0, LENGTH, "Tensor"),
        Expected(Document.from_lengths([[5, 7]]) & Causal(), 4, 8, "Tensor"),
        Expected(Document.from_lengths([[5, 7]]) | Causal(), 0, LENGTH, "Tensor"),
    ],
    ids=lambda case: f"{type(case.mask).__name__}-{case.starts}-{case.count}-{case.bias}",
)
def test_masks_lower_to_the_bias_that_fits(case: Expected, kinds):
    ragged = isinstance(case.starts, list)
    ends = tuple(start + case.count for start in case.starts) if ragged else None
    queries = torch.tensor(case.starts)[:, None] + torch.arange(case.count) if ragged else case.starts
    keys = max(ends) if ends else case.starts + case.count
    pattern = Pattern(mask=case.mask, queries=queries, count=case.count, keys=keys, batch=2, device=CPU, ends=ends)
    q, k, v = drawn(pattern, slots=keys + 3)
    kernel = Kernel()
    backend = Xformers(kernel)
    found = backend(q.requires_grad_(case.gradient), k, v, pattern)
    assert [type(bias).__name__ for bias in kernel.biases] == [case.bias]
    torch.testing.assert_close(found, written_out(q, k, v, pattern.matrix), rtol=0, atol=1e-12)
    assert (backend.reason_for(Call.of(q, k, v, pattern)) is None) == (case.bias == "Tensor")


@given(lengths=document_lengths(2), causal=st.booleans())
def test_packed_documents_materialise_to_their_matrix(lengths, causal):
    document = Document.from_lengths(lengths)
    pattern = Pattern(
        mask=document & Causal() if causal else document, queries=0, count=LENGTH, keys=LENGTH, batch=2, device=CPU
    )
    q, k, v = drawn(pattern)
    kernel = Kernel()
    Xformers(kernel)(q, k, v, pattern)
    seen = kernel.biases[0].materialize((2 * LENGTH, 2 * LENGTH)) == 0
    assert torch.equal(seen, torch.block_diag(*pattern.matrix[:, 0]).bool())


def test_padded_keys_are_not_copied():
    ends = (4, 6)
    pattern = Pattern(mask=Causal(), queries=torch.tensor([[3], [5]]), count=1, keys=6, batch=2, device=CPU, ends=ends)
    q, k, v = drawn(pattern, slots=10)
    seen = []

    def kernel(q, k, v, attn_bias, p):
        seen.extend([k, v])
        return torch.zeros_like(q)

    Xformers(kernel)(q, k, v, pattern)
    assert [x.untyped_storage().data_ptr() for x in seen] == [x.untyped_storage().data_ptr() for x in (k, v)]
    assert seen[0].shape[:2] == (1, 20)


def test_dropout_reaches_the_kernel_and_drops():
    pattern = Pattern(mask=Causal(), queries=0, count=LENGTH, keys=LENGTH, batch=1, device=CPU)
    q, k, v = drawn(pattern)
    kernel = Kernel()
    Xformers(kernel)(q, k, v, pattern, 0.25)
    assert kernel.dropouts == [0.25]
    ones = torch.ones_like(v)
    torch.manual_seed(0)
    kept = torch.stack([Sdpa()(q, k, ones, pattern, 0.25)[0, 0, -1, 0] for _ in range(2000)])
    assert kept.std() > 0
    assert abs(kept.mean() - 1) < 4 * kept.std() / 2000**0.5
    with pytest.raises(ValueError, match="drops no attention weights"):
        Flex()(q, k, v, pattern, 0.25)


def a_call(**changes: object) -> Call:
    """One that all backends serve on an Ampere card."""
    device = torch.device("cuda", 0)
    pattern = Pattern(mask=Causal(), queries=0, count=2048, keys=2048, batch=4, device=device)
    call = Call(
        pattern=pattern, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device=device, capability=(8, 0)
    )
    return replace(call, **changes)


def documents(known: bool) -> Pattern:
    document = Document.from_lengths([[1024, 1024]] * 4)
    mask = (document if known else Document(document.ids)) & Causal()
    return replace(a_call().pattern, mask=mask)


@pytest.mark.parametrize(
    ("call", "chosen"),
    [
        (a_call(), "sdpa"),
        (a_call(device=torch.device("cpu"), capability=None, pattern=documents(True)), "sdpa"),
        (a_call(pattern=documents(True)), "xformers"),
        (a_call(pattern=documents(True), gradient=True, dropout=0.1), "xformers"),
        (a_call(pattern=documents(True), dtype=torch.float64), "sdpa"),
        (a_call(pattern=documents(True), head_dim=36), "flex"),
        (a_call(pattern=documents(False)), "flex"),
        (a_call(pattern=documents(False), dropout=0.1), "sdpa"),
        (a_call(pattern=documents(False), capability=(7, 0)), "sdpa"),
    ],
)
def test_auto_picks_by_device_dtype_head_size_and_mask(call, chosen):
    found = explain(call)
    assert found.chosen == chosen == auto.choose(call).name
    assert not auto.reasons_against(call)
    assert {line.split()[0] for line in str(found).splitlines()} == {"sdpa", "xformers", "flex"}
    assert f"{chosen:10}chosen" in str(found)


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        (Xformers(), {"device": torch.device("cpu")}, "run on cuda, not on cpu"),
        (Xformers(), {"dtype": torch.float64}, "not torch.float64"),
        (Xformers(), {"head_dim": 20}, "multiple of 8, not 20"),
        (Xformers(), {"dtype": torch.float32, "capability": (10, 0)}, "half precision"),
        (Xformers(), {"pattern": documents(False), "capability": (10, 0)}, "takes no dense mask"),
        (Flex(), {"device": torch.device("cpu"), "gradient": True}, "no backward on cpu"),
        (Flex(), {"device": torch.device("mps")}, "not on mps"),
        (Flex(), {"head_dim": 8}, "at least 16, not 8"),
        (Flex(), {"dtype": torch.float64}, "not torch.float64"),
        (Flex(), {"capability": (7, 0)}, "compute capability 7.5, the device has 7.0"),
        (Flex(), {"dropout": 0.1}, "drops no attention weights"),
    ],
)
def test_a_backend_says_why_not(backend, changes, reason):
    assert not backend.reasons_against(a_call())
    assert any(reason in sentence for sentence in backend.reasons_against(a_call(**changes)))
    assert reason in str(explain(a_call(**changes), Auto((backend,))))


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setattr(adapter, "_installed", lambda: False)
    assert any("pip install 'evo-lm[xformers]'" in reason for reason in Xformers().reasons_against(a_call()))
    assert explain(a_call(pattern=documents(True))).chosen == "flex"


def test_a_backend_that_cannot_serve_a_call_says_all_reasons():
    model = random_model()
    model.backbone.attention = Xformers()
    with pytest.raises(
        ValueError, match=r"xformers cannot serve this call: its kernels run on cuda, not on cpu; .*float64"
    ):
        model.context_logits(torch.zeros(1, 3, dtype=torch.int64))


def test_a_backend_may_be_exchanged():
    model = random_model()
    tokens = torch.randint(7, (2, 9), generator=generator())
    expected = model.context_logits(tokens)
    kernel = Kernel()
    model.backbone.attention = Xformers(kernel)
    torch.testing.assert_close(model.context_logits(tokens), expected, rtol=0, atol=1e-12)
    assert len(kernel.biases) == len(model.backbone.blocks)


@given(case=laid())
def test_the_choice_looks_at_no_tensor(case: Laid):
    """On the meta device there is nothing to look at: what would wait for a device raises here."""
    assume(not isinstance(case.pattern.queries, torch.Tensor))
    meta = torch.device("meta")
    pattern = replace(case.pattern, device=meta)
    call = replace(a_call(), pattern=pattern)
    for backend in (Sdpa(), Xformers(), Flex(), auto):
        backend.reasons_against(call), backend.reason_for(call)
    assert explain(call).chosen in {"sdpa", "xformers"}


def test_a_kernel_is_given_one_dtype_under_autocast():
    model = random_model(dtype=torch.float32)
    kernel = Kernel()
    model.backbone.attention = Xformers(kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.context_logits(torch.zeros(1, 5, dtype=torch.int64))
    assert len(kernel.biases) == len(model.backbone.blocks)


def test_attention_dropout_is_for_training_alone():
    model = random_model(attention_dropout=0.5)
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    attended = partial(model.context_logits, tokens)
    assert torch.equal(attended(), attended())
    model.train()
    assert not torch.equal(attended(), attended())


def test_a_mask_of_ones_own_needs_only_its_definition():
    from evo.core import Mask

    class EverySecond(Mask):
        def allowed(self, sequence, query, key):
            return (query - key) % 2 == 0

    case = Case(EverySecond(), lambda b, q, k: (q - k) % 2 == 0)
    pattern = Pattern(mask=case.mask, queries=0, count=5, keys=5, batch=2, device=CPU)
    q, k, v = drawn(pattern)
    expected = written_out(q, k, v, case.matrix([list(range(5))] * 2, 5))
    for backend in (Sdpa(), Xformers(Kernel()), auto):
        torch.testing.assert_close(backend(q, k, v, pattern), expected, rtol=0, atol=1e-12)
