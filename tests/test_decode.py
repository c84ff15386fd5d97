"""`mla_decode` and its reference against fp64, and every wrong argument against its message."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import Case
from mla_backend import DecodeSchedule, mla_decode, operators, reference
from oracle import mla_decode_fp64

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check(case: Case) -> None:
    arguments = case.inputs()
    out = torch.full_like(arguments["q_nope"], torch.nan, memory_format=torch.contiguous_format)
    returned, lse = mla_decode(**arguments, out=out, return_lse=True)
    assert returned is out
    arguments.pop("schedule")
    expected, expected_lse = mla_decode_fp64(**arguments)
    assert out.isfinite().all()
    error = (out.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    # A score is a sum of 576 products, scaled; fp32 rounds it to within eps times the sum of their magnitudes, and
    # usually to about eps times the root of the sum of their squares. By as much, relatively, its probability is off.
    rounding = torch.finfo(torch.float32).eps * 576 * case.deviation**2 * arguments["softmax_scale"]
    assert error < max(TOLERANCE[case.dtype], 2 * rounding / 576**0.5), f"relative error {error:.2e}"
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=max(rounding, 1e-6))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    requests = draw(st.integers(0, 6))
    uniform = draw(st.booleans())
    lengths = st.lists(st.integers(0, 5), min_size=requests, max_size=requests)
    query_lens = [draw(st.integers(1, 5))] * requests if uniform else draw(lengths)
    long = st.one_of(st.integers(0, 3), st.integers(0, 300), st.integers(1000, 1100))
    seq_lens = [
        draw(st.one_of(st.just(0), long.map(lambda extra, n=n: n + extra), st.integers(0, n))) for n in query_lens
    ]
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return Case(
        seq_lens=seq_lens,
        query_lens=query_lens,
        heads=draw(st.integers(1, 128)),
        page_size=draw(st.sampled_from([1, 16, 32, 64, 128])),
        dtype=dtype,
        cache_dtype=draw(st.sampled_from([dtype, torch.float8_e4m3fn])),
        causal=draw(st.booleans()),
        deviation=draw(st.sampled_from([0.1, 1.0, 3.0])),
        padding_rows=draw(st.integers(0, 2)),
        page_padding=draw(st.sampled_from([0, 64])),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(cases())
def test_reference_agrees_with_fp64(case: Case) -> None:
    check(case)


def test_many_single_queries_go_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    attend = reference._attend
    monkeypatch.setattr(reference, "_attend", lambda *a: calls.append(a) or attend(*a))
    check(Case(seq_lens=list(range(1, 17)), query_lens=[1] * 16))
    assert len(calls) == 1


def test_a_long_cache_is_never_expanded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 20)
    largest = 0
    zeros = torch.Tensor.float

    def expand(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return zeros(tensor)

    monkeypatch.setattr(torch.Tensor, "float", expand)
    check(Case(seq_lens=[5000] * 4, query_lens=[1] * 4, heads=2, dtype=torch.bfloat16))
    assert 0 < largest <= 1 << 20


def test_many_query_rows_go_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ROWS", 32)
    check(Case(seq_lens=[50, 9], query_lens=[9, 9]))
    check(Case(seq_lens=[50, 9, 70], query_lens=[1, 7, 4]))


def test_an_empty_cache() -> None:
    arguments = Case(seq_lens=[0, 0], query_lens=[1, 2]).inputs()
    out = mla_decode(**{**arguments, "kv_cache": arguments["kv_cache"][:0]})
    assert (out == 0).all()


def test_a_gradient_is_refused() -> None:
    arguments = Case(seq_lens=[4], query_lens=[1]).inputs()
    with pytest.raises(RuntimeError, match="requires a gradient, and there is none"):
        mla_decode(**{**arguments, "q_pe": arguments["q_pe"].requires_grad_()})


def test_output_may_have_any_strides() -> None:
    arguments = Case(seq_lens=[40, 7], query_lens=[2, 1]).inputs()
    wide = torch.full((3, 16, 1024), torch.nan)
    mla_decode(**arguments, out=wide[..., :512])
    torch.testing.assert_close(wide[..., :512], mla_decode(**arguments))
    assert wide[..., 512:].isnan().all()


def test_operator_passes_opcheck_and_compiles() -> None:
    arguments = Case(seq_lens=[40, 0, 7], query_lens=[2, 1, 1], dtype=torch.bfloat16).inputs()
    schedule = arguments.pop("schedule")
    scale, causal, kv_scale = (arguments.pop(name) for name in ("softmax_scale", "causal", "kv_scale"))
    buffers = (schedule.buffers.partial_out, schedule.buffers.partial_lse, schedule.buffers.arrivals)
    bounds = (schedule.shares, schedule.splits, *buffers, 16, schedule.max_query_len, schedule.max_seq_len)
    out, lse = torch.empty(4, 16, 512, dtype=torch.bfloat16), torch.empty(4, 16)
    for optional in (lse, None):
        torch.library.opcheck(
            torch.ops.mla_backend.mla_decode.default,
            (*arguments.values(), *bounds, scale, causal, False, False, kv_scale, out, optional),
        )

    def layer(**tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result, lse = mla_decode(**tensors, softmax_scale=scale, schedule=schedule, return_lse=True)
        return result * 2, lse

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), layer(**arguments))


def test_a_wrong_argument_is_named_when_a_graph_is_traced() -> None:
    arguments = Case(seq_lens=[40, 7], query_lens=[2, 1]).inputs()
    arguments["block_table"] = arguments["block_table"].long()
    compiled = torch.compile(lambda: mla_decode(**arguments), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"block_table is torch\.int64, wanted torch\.int32"):
        compiled()


def test_an_error_that_is_no_arguments_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(operators, "mla_decode_reference", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        mla_decode(**Case(seq_lens=[40], query_lens=[1]).inputs())


def wrong(name: str, change: Any, error: type[Exception], message: str) -> Any:
    return pytest.param(name, change, error, message, id=f"{name}: {message}")


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        wrong("q_nope", lambda t: t[..., :500], ValueError, r"q_nope has shape \[3, 16, 500\], wanted .*512"),
        wrong("q_nope", lambda t: t.double(), TypeError, "q_nope is torch.float64, wanted bfloat16"),
        wrong("q_nope", lambda t: t.expand(3, 16, 512).repeat(1, 9, 1), ValueError, "1 to 128 heads"),
        wrong("q_nope", lambda t: t.mT.contiguous().mT, ValueError, "q_nope has strides .* last dimension"),
        wrong("q_pe", lambda t: t[:, :8], ValueError, r"q_pe has shape \[3, 8, 64\], wanted \[3, 16, 64\]"),
        wrong("q_pe", lambda t: t.half(), TypeError, "q_pe is torch.float16, wanted torch.float32"),
        wrong(
            "kv_cache", lambda t: t[..., :512], ValueError, r"kv_cache has shape .* wanted \[pages, page_size, 576\]"
        ),
        wrong("kv_cache", lambda t: t[:, :24], ValueError, "1 or a multiple of 16"),
        wrong("kv_cache", lambda t: t.mT.contiguous().mT, ValueError, "kv_cache has strides"),
        wrong("kv_cache", lambda t: t.half(), TypeError, "kv_cache is torch.float16, wanted torch.float32"),
        wrong("kv_cache", lambda t: t.to(torch.float8_e4m3fn), TypeError, "kv_scale is missing"),
        wrong("kv_cache", lambda t: t.to("meta"), ValueError, "kv_cache is on meta, but q_nope is on cpu"),
        wrong("block_table", lambda t: t.long(), TypeError, "block_table is torch.int64, wanted torch.int32"),
        wrong("block_table", lambda t: t[:1], ValueError, r"block_table has shape \[1, 3\], wanted \[2, max_pages\]"),
        wrong("block_table", lambda t: t.mT.contiguous().mT, ValueError, "block_table has strides .* last dimension"),
        wrong("seq_lens", lambda t: t.long(), TypeError, "seq_lens is torch.int64"),
        wrong("seq_lens", lambda t: t[None], ValueError, r"seq_lens has shape \[1, 2\], wanted \[requests\]"),
        wrong("query_start_loc", lambda t: t[:2], ValueError, r"query_start_loc has shape \[2\], wanted \[3\]"),
        wrong("softmax_scale", lambda t: 0.0, ValueError, "softmax_scale is 0.0, wanted a positive number"),
        wrong("kv_scale", lambda t: torch.ones(1), TypeError, "kv_scale is given"),
        wrong("out", lambda t: torch.empty(3, 16, 576), ValueError, r"out has shape \[3, 16, 576\]"),
        wrong("out", lambda t: torch.empty(3, 512, 16).mT, ValueError, "its last dimension must be contiguous"),
        wrong("out", lambda t: torch.empty(3, 16, 512).half(), TypeError, "out is torch.float16"),
        wrong(
            "schedule",
            lambda t: DecodeSchedule.plan(torch.ones(5, dtype=torch.int32), heads=16, max_query_len=1, max_seq_len=1),
            ValueError,
            "schedule was made for 5 requests, but seq_lens has 2",
        ),
        wrong(
            "schedule",
            lambda s: replace(s, heads=8),
            ValueError,
            "schedule was made for 8 heads, but q_nope has 16; make it with",
        ),
        wrong(
            "schedule",
            lambda s: replace(s, splits=s.splits.long()),
            TypeError,
            "schedule.splits is torch.int64, wanted torch.int32",
        ),
    ],
)
def test_a_wrong_argument_is_named(name: str, change: Any, error: type[Exception], message: str) -> None:
    arguments = Case(seq_lens=[40, 7], query_lens=[2, 1]).inputs()
    arguments[name] = change(arguments.get(name))
    with pytest.raises(error, match=message):
        mla_decode(**arguments)
