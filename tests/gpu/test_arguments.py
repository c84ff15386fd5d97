"""Every wrong argument on a GPU against its message: that of `mla_decode`, and the compiled operator's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from cases import Case
from mla_backend import DecodeSchedule, mla_decode
from mla_backend.operators import has_compiled_kernels

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_compiled_kernels()), reason="needs a Hopper GPU and the compiled kernels"
)

TENSORS = ("q_nope", "q_pe", "kv_cache", "block_table", "seq_lens", "query_start_loc")


def inputs(**options: Any) -> dict[str, Any]:
    """Return correct arguments: 3 tokens of 16 heads, 2 requests, 5 pages of 64 tokens, block tables of 3 pages."""
    case = Case(seq_lens=[40, 7], query_lens=[2, 1], **{"dtype": torch.bfloat16, **options}, device="cuda")
    return {**case.inputs(), "out": torch.empty(3, 16, 512, dtype=case.dtype, device="cuda")}


def column_major(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT


def every_other(t: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(2)[::2]


def pages_apart(elements: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t.new_zeros(5, 64 * 576 + elements)[:, : 64 * 576].unflatten(1, (64, 576))


def shifted(t: torch.Tensor) -> torch.Tensor:
    return t.new_zeros(t.numel() + 1)[1:].view(t.shape)


def buffer(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[DecodeSchedule], DecodeSchedule]:
    return lambda s: replace(s, buffers=replace(s.buffers, **{name: change(getattr(s.buffers, name))}))


def planned(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[DecodeSchedule], DecodeSchedule]:
    return lambda s: replace(s, **{name: change(getattr(s, name))})


WRONG: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    ("q_nope", lambda t: t[..., :500], ValueError, "q_nope has shape [3, 16, 500], wanted [tokens, heads, 512]"),
    ("q_nope", lambda t: t[0], ValueError, "q_nope has shape [16, 512], wanted [tokens, heads, 512]"),
    ("q_nope", lambda t: t[:, :0], ValueError, "q_nope has shape [3, 0, 512], wanted [tokens, 1 to 128 heads, 512]"),
    ("q_nope", lambda t: t.repeat(1, 9, 1), ValueError, "q_nope has shape [3, 144, 512], wanted [tokens, 1 to 128"),
    ("q_nope", column_major, ValueError, "q_nope has strides [8192, 1, 16], but its last dimension must be contiguous"),
    ("q_nope", lambda t: t.double(), TypeError, "q_nope is torch.float64, wanted bfloat16, float16 or float32"),
    ("q_pe", lambda t: t[..., :63], ValueError, "q_pe has shape [3, 16, 63], wanted [3, 16, 64]"),
    ("q_pe", lambda t: t[:, :8], ValueError, "q_pe has shape [3, 8, 64], wanted [3, 16, 64]"),
    ("q_pe", column_major, ValueError, "q_pe has strides [1024, 1, 16], but its last dimension must be contiguous"),
    ("q_pe", lambda t: t.half(), TypeError, "q_pe is torch.float16, wanted torch.bfloat16"),
    ("q_pe", lambda t: t.cpu(), ValueError, "q_pe is on cpu, but q_nope is on cuda:0"),
    ("kv_cache", lambda t: t[..., :512], ValueError, "kv_cache has shape [5, 64, 512], wanted [pages, page_size, 576]"),
    ("kv_cache", lambda t: t[:, :24], ValueError, "kv_cache has shape [5, 24, 576], wanted [pages, 1 or a multiple"),
    ("kv_cache", lambda t: t[:, :0], ValueError, "kv_cache has shape [5, 0, 576], wanted [pages, 1 or a multiple"),
    ("kv_cache", lambda t: t[:, :1], ValueError, "kv_cache has shape [5, 1, 576], wanted [pages, 16, 32 or a multiple"),
    ("kv_cache", lambda t: t[:, :48], ValueError, "[5, 48, 576], wanted [pages, 16, 32 or a multiple of 64 on a GPU"),
    ("kv_cache", column_major, ValueError, "kv_cache has strides [36864, 1, 64], but its last dimension must be"),
    ("kv_cache", pages_apart(4), ValueError, "kv_cache has strides [36868, 576, 1], but every row must start at a"),
    ("kv_cache", shifted, ValueError, "kv_cache has strides [36864, 576, 1], but every row must start at a multiple"),
    ("kv_cache", lambda t: t.half(), TypeError, "kv_cache is torch.float16, wanted torch.bfloat16, the dtype of q_n"),
    ("kv_cache", lambda t: t.to(torch.float8_e4m3fn), TypeError, "kv_cache is torch.float8_e4m3fn and kv_scale is mis"),
    ("kv_cache", lambda t: t.cpu(), ValueError, "kv_cache is on cpu, but q_nope is on cuda:0; move it there"),
    ("kv_cache", lambda t: t.to("meta"), ValueError, "kv_cache is on meta, but q_nope is on cuda:0; move it there"),
    ("block_table", lambda t: t.long(), TypeError, "block_table is torch.int64, wanted torch.int32"),
    ("block_table", lambda t: t[:1], ValueError, "block_table has shape [1, 3], wanted [2, max_pages]"),
    ("block_table", column_major, ValueError, "block_table has strides [1, 2], but its last dimension must be contig"),
    ("block_table", lambda t: t.cpu(), ValueError, "block_table is on cpu, but q_nope is on cuda:0"),
    ("seq_lens", lambda t: t.long(), TypeError, "seq_lens is torch.int64, wanted torch.int32"),
    ("seq_lens", lambda t: t[None], ValueError, "seq_lens has shape [1, 2], wanted [requests]"),
    ("seq_lens", every_other, ValueError, "seq_lens has strides [2], but its last dimension must be contiguous"),
    ("seq_lens", lambda t: t.cpu(), ValueError, "seq_lens is on cpu, but q_nope is on cuda:0"),
    ("query_start_loc", lambda t: t.long(), TypeError, "query_start_loc is torch.int64, wanted torch.int32"),
    ("query_start_loc", lambda t: t[:2], ValueError, "query_start_loc has shape [2], wanted [3]"),
    ("query_start_loc", every_other, ValueError, "query_start_loc has strides [2], but its last dimension must be"),
    ("query_start_loc", lambda t: t.cpu(), ValueError, "query_start_loc is on cpu, but q_nope is on cuda:0"),
    (
        "schedule",
        planned("splits", lambda t: t[:2]),
        ValueError,
        "schedule was made for 1 requests, but seq_lens has",
    ),
    ("schedule", planned("splits", lambda t: t[None]), ValueError, "schedule.splits has shape [1, 3], wanted [3]"),
    ("schedule", planned("splits", every_other), ValueError, "schedule.splits has strides [2], but its last dimension"),
    ("schedule", planned("splits", torch.Tensor.long), TypeError, "schedule.splits is torch.int64, wanted torch.int32"),
    ("schedule", planned("splits", torch.Tensor.cpu), ValueError, "schedule.splits is on cpu, but q_nope is on cuda:0"),
    ("schedule", planned("heads", lambda h: h // 2), ValueError, "schedule was made for 8 heads, but q_nope has 16"),
    ("schedule", planned("shares", lambda t: t[:, :7]), ValueError, ", 7], wanted [workers, 8]"),
    ("schedule", planned("shares", torch.Tensor.long), TypeError, "schedule.shares is torch.int64, wanted torch.int32"),
    ("schedule", planned("shares", torch.Tensor.cpu), ValueError, "schedule.shares is on cpu, but q_nope is on cuda"),
    (
        "schedule",
        planned("shares", lambda t: t[::2]),
        ValueError,
        "schedule.shares has strides [16, 1], but it must",
    ),
    (
        "schedule",
        planned("shares", shifted),
        ValueError,
        "schedule.shares has strides [8, 1], but every row",
    ),
    ("schedule", buffer("partial_lse", lambda t: t[:, :1]), ValueError, ", 1, 64], wanted [workers, 2, 64]"),
    ("schedule", buffer("partial_lse", torch.Tensor.half), TypeError, "partial_lse is torch.float16, wanted torch.flo"),
    ("schedule", buffer("partial_lse", torch.Tensor.cpu), ValueError, "partial_lse is on cpu, but q_nope is on cuda:0"),
    ("schedule", buffer("partial_lse", lambda t: t[:1].expand_as(t)), ValueError, "[0, 64, 1], but it must be contig"),
    ("schedule", buffer("arrivals", torch.Tensor.long), TypeError, "arrivals is torch.int64, wanted torch.int32"),
    ("schedule", buffer("partial_out", lambda t: t[..., :256]), ValueError, ", 2, 64, 256], wanted ["),
    ("schedule", buffer("partial_out", torch.Tensor.half), TypeError, "partial_out is torch.float16, wanted torch.flo"),
    ("schedule", buffer("partial_out", torch.Tensor.cpu), ValueError, "partial_out is on cpu, but q_nope is on cuda:0"),
    ("schedule", buffer("partial_out", lambda t: t[:1].expand_as(t)), ValueError, "[0, 32768, 512, 1], but it must be"),
    ("schedule", buffer("partial_out", shifted), ValueError, "[65536, 32768, 512, 1], but every row must start at a"),
    ("softmax_scale", lambda _: 0.0, ValueError, "softmax_scale is 0.0, wanted a positive number"),
    ("softmax_scale", lambda _: float("nan"), ValueError, "softmax_scale is nan, wanted a positive number"),
    ("kv_scale", lambda _: torch.ones(1, device="cuda"), TypeError, "kv_cache is torch.bfloat16 and kv_scale is given"),
    ("out", lambda t: t[:, :8], ValueError, "out has shape [3, 8, 512], wanted [3, 16, 512]"),
    ("out", column_major, ValueError, "out has strides [8192, 1, 16], but its last dimension must be contiguous"),
    ("out", lambda t: t.float(), TypeError, "out is torch.float32, wanted torch.bfloat16"),
    ("out", lambda t: t.cpu(), ValueError, "out is on cpu, but q_nope is on cuda:0"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), WRONG, ids=[f"{w[0]}: {w[3]}" for w in WRONG])
def test_a_wrong_argument_is_named(name: str, change: Any, error: type[Exception], message: str) -> None:
    arguments = inputs()
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=re.escape(message)):
        mla_decode(**arguments)


def test_a_query_on_another_device_is_named() -> None:
    arguments = inputs()
    with pytest.raises(ValueError, match="q_pe is on cuda:0, but q_nope is on cpu"):
        mla_decode(**{**arguments, "q_nope": arguments["q_nope"].cpu()})


def test_a_dtype_that_only_the_reference_takes_is_named() -> None:
    with pytest.raises(TypeError, match=r"q_nope is torch\.float32, wanted bfloat16 or float16 on a GPU"):
        mla_decode(**inputs(dtype=torch.float32))


def test_too_many_tokens_are_named() -> None:
    arguments = inputs()
    tokens = {name: arguments[name].repeat(21846, 1, 1) for name in ("q_nope", "q_pe", "out")}
    with pytest.raises(
        ValueError, match=r"q_nope has shape \[65538, 16, 512\], wanted \[at most 65535 tokens on a GPU"
    ):
        mla_decode(**{**arguments, **tokens})


def test_too_many_pages_are_named() -> None:
    arguments = inputs()
    cache = arguments["kv_cache"][:1, :1].expand(5, 1 << 20, 576)  # 4 of these pages are allowed
    table = arguments["block_table"][:, :1].repeat(1, 5)
    pages = {"kv_cache": cache, "block_table": table}
    with pytest.raises(
        ValueError, match=r"block_table has shape \[2, 5\], wanted \[requests, at most 4 pages of 1048576 tok"
    ):
        mla_decode(**{**arguments, **pages})
    with pytest.raises(RuntimeError, match="block_table has 5 pages of 1048576 tokens for a request, wanted at most 4"):
        torch.ops.mla_backend.mla_decode(**{**operator_arguments(), **pages})


def test_what_is_allowed_is_not_refused() -> None:
    """A dimension of one entry may have any stride, rows of `out` any alignment, and pages any gap of 16 bytes."""
    arguments = inputs()
    expected = mla_decode(**arguments).clone()
    wide = torch.empty(3, 16, 513, dtype=torch.bfloat16, device="cuda")[..., 1:]
    table = arguments["block_table"][:, :1].repeat(1, 2)[:, ::2]  # [2, 1] with strides of 2 and 2
    assert mla_decode(**{**arguments, "block_table": table, "out": wide}).equal(expected)
    apart = pages_apart(8)(arguments["kv_cache"]).copy_(arguments["kv_cache"])
    assert mla_decode(**{**arguments, "kv_cache": apart}).equal(expected)


def operator_arguments() -> dict[str, Any]:
    arguments = inputs()
    schedule = arguments["schedule"]
    return {
        **{name: arguments[name] for name in TENSORS},
        "shares": schedule.shares,
        "splits": schedule.splits,
        "partial_out": schedule.buffers.partial_out,
        "partial_lse": schedule.buffers.partial_lse,
        "arrivals": schedule.buffers.arrivals,
        "planned_heads": schedule.heads,
        "max_query_len": schedule.max_query_len,
        "max_seq_len": schedule.max_seq_len,
        "softmax_scale": arguments["softmax_scale"],
        "causal": True,
        "batch_invariant": False,
        "quantized": False,
        "kv_scale": None,
        "out": arguments["out"],
        "lse": torch.empty(3, 16, device="cuda"),
    }


WRONG_TO_THE_OPERATOR: list[tuple[str, Callable[[Any], Any], str]] = [
    ("q_nope", lambda t: t.cpu(), "is on cpu, wanted cuda"),
    ("q_nope", lambda t: t.float(), "is Float, wanted BFloat16 or Half"),
    ("q_nope", lambda t: t[..., :500], "has shape [3, 16, 500], wanted [any, any, 512]"),
    ("q_nope", lambda t: t.repeat(1, 9, 1), "has 144 heads, wanted 1 to 128"),
    ("q_nope", column_major, "has strides [8192, 1, 16], wanted a contiguous last dimension"),
    ("q_pe", lambda t: t[..., :63], "has shape [3, 16, 63], wanted [3, 16, 64]"),
    ("kv_cache", lambda t: t.half(), "is Half, wanted BFloat16"),
    ("kv_cache", lambda t: t[:, :48], "has pages of 48 tokens, wanted 16, 32 or a multiple of 64"),
    ("kv_cache", pages_apart(4), "has strides [36868, 576, 1], wanted every row to start at a multiple of 16 bytes"),
    ("block_table", lambda t: t.long(), "is Long, wanted Int"),
    ("block_table", lambda t: t.cpu(), "is on cpu, wanted cuda:0"),
    ("seq_lens", every_other, "has strides [2], wanted a contiguous last dimension"),
    ("query_start_loc", lambda t: t[:2], "has shape [2], wanted [3]"),
    ("splits", lambda t: t.long(), "is Long, wanted Int"),
    ("shares", lambda t: t[::2], "has strides [16, 1], wanted a contiguous tensor"),
    ("planned_heads", lambda heads: heads // 2, "q_nope has 16 heads, wanted 8, those of the schedule"),
    ("partial_out", shifted, "wanted every row to start at a multiple of 16 bytes"),
    ("partial_lse", lambda t: t[:1].expand_as(t), "has strides [0, 64, 1], wanted a contiguous tensor"),
    ("arrivals", lambda t: t.float(), "is Float, wanted Int"),
    ("arrivals", lambda t: t[:2], "has 2 counters, wanted "),
    ("softmax_scale", lambda _: -1.0, "is -1, wanted a positive number"),
    ("kv_scale", lambda _: torch.ones(1, device="cuda"), "is given, wanted none"),
    ("quantized", lambda _: True, "kv_cache is BFloat16, wanted Float8_e4m3fn"),
    ("out", lambda t: t.half(), "is Half, wanted BFloat16"),
    ("lse", lambda t: t[:2], "has shape [2, 16], wanted [3, 16]"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), WRONG_TO_THE_OPERATOR, ids=[f"{w[0]}: {w[2]}" for w in WRONG_TO_THE_OPERATOR]
)
def test_the_operator_itself_names_a_wrong_argument(name: str, change: Any, message: str) -> None:
    arguments = operator_arguments()
    torch.ops.mla_backend.mla_decode(**arguments)
    arguments[name] = change(arguments[name])
    named = "" if name in ("planned_heads", "quantized") else f"{name} .*"
    with pytest.raises(RuntimeError, match=f"mla_decode: {named}{re.escape(message)}"):
        torch.ops.mla_backend.mla_decode(**arguments)


def quantized_inputs() -> dict[str, Any]:
    return inputs(cache_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("kv_scale", lambda _: None, TypeError, "kv_cache is torch.float8_e4m3fn and kv_scale is missing"),
        ("kv_scale", lambda t: t.cpu(), ValueError, "kv_scale is on cpu, but q_nope is on cuda:0"),
        ("kv_scale", lambda t: t.double(), TypeError, "kv_scale is torch.float64, wanted torch.float32"),
        ("kv_scale", lambda t: t.repeat(2), ValueError, "kv_scale has shape [2], wanted [1]"),
        (
            "schedule",
            lambda s: replace(s, quantized=False),
            TypeError,
            "schedule was made for no quantised cache, but kv",
        ),
        ("kv_cache", pages_apart(8), ValueError, "every row must start at a multiple of 16 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_beside_a_quantised_cache(
    name: str, change: Any, error: type[Exception], message: str
) -> None:
    arguments = quantized_inputs()
    mla_decode(**arguments)
    with pytest.raises(error, match=re.escape(message)):
        mla_decode(**{**arguments, name: change(arguments[name])})


def test_too_little_room_for_partial_results() -> None:
    arguments = operator_arguments()
    arguments["shares"] = arguments["shares"].repeat(5, 1)
    with pytest.raises(RuntimeError, match=r"partial_lse has room for \d+ query rows, wanted \d+ for \d+ shares"):
        torch.ops.mla_backend.mla_decode(**arguments)


@pytest.mark.parametrize(
    ("heads", "queries", "longest", "message"),
    [
        (0, 1, 1, "the schedule has 0 heads, wanted 1 to 128"),
        (129, 1, 1, "the schedule has 129 heads, wanted 1 to 128"),
        (128, 1 << 25, 1, "max_query_len is 33554432, wanted 0 to 65535"),
        (16, -1, 1, "max_query_len is -1, wanted 0 to 65535"),
        (16, 1, -1, "max_seq_len is -1, wanted 0 to 2147483647"),
        (16, 1, 1 << 31, "max_seq_len is 2147483648, wanted 0 to 2147483647"),
    ],
)
def test_the_plan_names_wrong_numbers(heads: int, queries: int, longest: int, message: str) -> None:
    lengths = torch.ones(2, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match=message):
        DecodeSchedule.plan(lengths, heads=heads, max_query_len=queries, max_seq_len=longest)


def test_the_plan_names_wrong_lengths() -> None:
    with pytest.raises(RuntimeError, match="seq_lens is Long, wanted Int"):
        DecodeSchedule.plan(torch.ones(2, dtype=torch.int64, device="cuda"), heads=16, max_query_len=1, max_seq_len=1)
