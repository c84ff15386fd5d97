"""The tiny model as transformers computes it: what engines are compared with."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from engine import MODEL
from prompts import demonstration_prompts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def tokenized(characters: int) -> list[list[int]]:
    """Return the token ids of 8 demonstration prompts of at least so many characters."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [tokenizer(prompt)["input_ids"] for prompt in demonstration_prompts(8, characters)]


@functools.cache
def model(dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).to(DEVICE).eval()


def greedy(prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return the greedy continuations of exactly `count` tokens, in fp32."""
    exactly = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    continuations = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
        out = model(torch.float32).generate(ids, attention_mask=torch.ones_like(ids), **exactly)
        continuations.append(out[0, len(prompt) :].tolist())
    return continuations


@contextmanager
def float8_cache(of: Any) -> Iterator[None]:
    """What attention reads of the latent cache is rounded to float8 (e4m3), and nothing else is."""

    def rounded(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.to(torch.float8_e4m3fn).to(numbers.dtype)

    def expand_rounded(attention: Any, latent: torch.Tensor, rotary: torch.Tensor) -> Any:
        return type(attention).expand_kv(attention, rounded(latent), rounded(rotary))

    layers = [layer.self_attn for layer in of.model.layers]
    for attention in layers:
        attention.expand_kv = functools.partial(expand_rounded, attention)
    try:
        yield
    finally:
        for attention in layers:
            del attention.expand_kv


def gaps_of(prompts: list[list[int]], continuations: list[list[int]], *, float8: bool = False) -> torch.Tensor:
    """Return by how much, in log-probability in fp32, each token is less likely than the likeliest one.

    Every token is judged after the ones that really came before it, so a choice between two that are almost equally
    likely costs almost nothing, whatever follows from it. With `float8` what follows a prompt reads a cache of float8
    numbers. The result is [prompts, tokens].
    """
    from transformers import DynamicCache

    oracle = model(torch.float32)
    gaps = []
    for prompt, tokens in zip(prompts, continuations, strict=True):
        cache = DynamicCache(config=oracle.config)
        with torch.no_grad():
            first = oracle(torch.tensor([prompt], device=DEVICE), past_key_values=cache).logits[0, -1:]
            with float8_cache(oracle) if float8 else nullcontext():
                rest = oracle(torch.tensor([tokens[:-1]], device=DEVICE), past_key_values=cache).logits[0]
        logprobs = torch.cat([first, rest]).float().log_softmax(-1).cpu()
        picked = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gaps.append(logprobs.max(-1).values - picked)
    return torch.stack(gaps)


def logprobs_of(prompts: list[list[int]], dtype: torch.dtype, *, float8: bool = False) -> list[torch.Tensor]:
    """Return the model's log-probability of each prompt's tokens after the first; with `float8` over such a cache."""
    of_prompts = []
    for prompt in prompts:
        with torch.no_grad(), float8_cache(model(dtype)) if float8 else nullcontext():
            logits = model(dtype)(torch.tensor([prompt], device=DEVICE)).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1).cpu()
        of_prompts.append(logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
    return of_prompts


def mean_difference(logprobs: Sequence[list[float] | torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the mean absolute difference of log-probabilities, of a run or of a model, from the expected ones."""
    pairs = zip(logprobs, expected, strict=True)
    return float(torch.cat([(torch.as_tensor(of_prompt) - wanted).abs() for of_prompt, wanted in pairs]).mean())
