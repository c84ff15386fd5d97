"""Train a tiny model of the DeepSeek-V3 architecture on the Python standard library.

    python train.py --steps 2 --batch-tokens 2048     # smoke test, also on a CPU
    python train.py --minutes 5                       # as many steps as fit in five minutes, on a GPU
    python train.py --steps 6000                      # a fixed number of steps

The folder named by --out (default: the one of this file) receives the weights in bfloat16, the configuration, the
tokenizer, loss.png and the model card README.md. The modules that `prompts.HELD_OUT` names are not trained on: the
held-out loss is measured on them, and the weights kept are those with the lowest held-out loss.
"""

import argparse
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count as count_from
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prompts import HELD_OUT, STRIDE, held_out_files, prompts_of

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
VOCABULARY = 2048

# Generated tables and texts rather than code; `site-packages` is not the standard library.
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data"}

CONTEXT = 1024
LONG_CONTEXT = 4096
LONG_FROM = 0.8  # the last fifth of the training sees long contexts
WARMUP = 0.02
PEAK_LEARNING_RATE = 2e-3
FINAL_LEARNING_RATE = 0.02  # as a fraction of the peak
WEIGHT_DECAY = 0.1
DROPOUT = 0.1
CLIP = 1.0
BALANCE_RATE = 1e-3
EVALUATIONS = 30
LOG_EVERY = 10
SEED = 0


def model_config() -> DeepseekV3Config:
    """The DeepSeek-V3 architecture with its true attention dimensions, and everything else made small."""
    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=128,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=768,
        first_k_dense_replace=1,
        moe_intermediate_size=64,
        moe_layer_freq=1,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        num_nextn_predict_layers=0,
        max_position_embeddings=LONG_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        tie_word_embeddings=False,
    )


# --- Text ------------------------------------------------------------------------------------------------------------


def read_source(path: Path) -> str:
    """A source file's text, empty when it is not UTF-8 or holds binary data."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else text


def training_files(stdlib: Path) -> list[Path]:
    """The standard library's source files without the held-out modules and the tests of these."""
    held_out = {*HELD_OUT, *(f"test_{name}" for name in HELD_OUT)}
    return [
        path
        for path in sorted(stdlib.rglob("*.py"))
        if not SKIPPED_FOLDERS & set(path.relative_to(stdlib).parts)
        and not held_out & {path.stem, *path.relative_to(stdlib).parts}
    ]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE tokenizer of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=LONG_CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """The texts' tokens in one row, every text closed by the end-of-text token."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += [*encoding.ids, END_OF_TEXT_ID]
    return torch.tensor(ids)


def windows(stream: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and the tokens that follow them, one row for each start."""
    index = starts[:, None] + torch.arange(length + 1, device=stream.device)
    rows = stream[index]
    return rows[:, :-1], rows[:, 1:]


# --- Model -----------------------------------------------------------------------------------------------------------


def every_expert(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The mixture of experts as two dense products: every expert sees every token, those not chosen weigh nothing.

    With eight experts this tiny it beats sorting the tokens by expert, and it has one static shape to compile.
    """
    gates = torch.zeros(len(hidden), experts.num_experts, device=hidden.device, dtype=weights.dtype)
    gates = gates.scatter(1, chosen, weights)
    gate, up = F.linear(hidden, experts.gate_up_proj.flatten(0, 1)).unflatten(1, (experts.num_experts, -1)).chunk(2, -1)
    inner = experts.act_fn(gate) * up * gates[..., None]
    return F.linear(inner.flatten(1), experts.down_proj.transpose(0, 1).flatten(1)).to(hidden.dtype)


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of the model's mixture-of-experts layers."""
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def count_load(model: nn.Module) -> None:
    """Have every router count in `load` how many tokens each of its experts receives."""

    def count(router: nn.Module, _: tuple, outputs: tuple[Tensor, ...]) -> None:
        experts = torch.arange(router.num_experts, device=router.load.device)
        router.load += (outputs[2][..., None] == experts).sum((0, 1))

    for router in routers(model):
        router.register_buffer("load", torch.zeros_like(router.weight[:, 0], dtype=torch.int64), persistent=False)
        router.register_forward_hook(count)


def take_loads(model: nn.Module) -> list[Tensor]:
    """The counted loads, which start again from zero."""
    loads = [router.load.clone() for router in routers(model)]
    for router in routers(model):
        router.load.zero_()
    return loads


@torch.no_grad()
def balance(model: nn.Module, rate: float) -> None:
    """DeepSeek-V3's balancing without an auxiliary loss: favour the experts that had less than their share."""
    for router, load in zip(routers(model), take_loads(model), strict=True):
        load = load.float()
        router.e_score_correction_bias += rate * torch.sign(load.mean() - load)


def add_dropout(model: nn.Module) -> None:
    """Dropout on the embeddings and on what each sublayer adds to the residual stream."""

    def drop(module: nn.Module, _: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, DROPOUT, module.training)

    layers = model.model.layers
    for module in [model.model.embed_tokens, *(x for layer in layers for x in (layer.self_attn.o_proj, layer.mlp))]:
        module.register_forward_hook(drop)


def attention_order(device: torch.device) -> list[SDPBackend]:
    """The attention kernels, quickest first, timed on MLA's unequal head sizes, which not every kernel supports."""
    fallback = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if device.type != "cuda":
        return fallback
    query, key = (torch.randn(32, 8, CONTEXT, 192, device=device, dtype=torch.bfloat16, requires_grad=True),) * 2
    value = torch.randn(32, 8, CONTEXT, 128, device=device, dtype=torch.bfloat16, requires_grad=True)

    def seconds(backend: SDPBackend) -> float:
        try:
            for turn in range(6):
                if turn == 1:  # the first is not timed
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                with sdpa_kernel(backend):
                    F.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
            torch.cuda.synchronize()
            return time.perf_counter() - started
        except RuntimeError:
            return math.inf

    times = {backend: seconds(backend) for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)}
    print({backend.name: f"{1e3 * total / 5:.2f} ms" for backend, total in times.items()}, flush=True)
    return [*sorted(times, key=times.__getitem__), *fallback]


def new_model(device: torch.device) -> DeepseekV3ForCausalLM:
    """An untrained model in float32 that counts its experts' loads."""
    ALL_EXPERTS_FUNCTIONS.register("every_expert", every_expert)
    model = DeepseekV3ForCausalLM._from_config(model_config(), experts_implementation="every_expert")
    model = model.to(device, torch.float32)
    count_load(model)
    return model


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean loss in nats per token."""
    return F.cross_entropy(F.linear(hidden, head).flatten(0, 1).float(), labels.flatten())


# --- Training --------------------------------------------------------------------------------------------------------


@dataclass
class History:
    """What the training saw: (step, loss) pairs, and totals."""

    training: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0


def learning_rate(progress: float) -> float:
    """Linear warmup, then a cosine, at a progress between 0 and 1."""
    if progress < WARMUP:
        return PEAK_LEARNING_RATE * (progress + 1e-4) / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return PEAK_LEARNING_RATE * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def evaluate(model: nn.Module, stream: Tensor, context: int, limit: int | None = None) -> float:
    """Mean loss over the stream in windows that do not overlap, in nats per token."""
    starts = torch.arange(0, len(stream) - context, context, device=stream.device)[:limit]
    rows = max(1, 32768 // context)
    model.eval()
    total = 0.0
    with torch.compiler.set_stance("force_eager"):  # compiling for a few short passes does not pay
        for batch in starts.split(rows):
            inputs, labels = windows(stream, batch, context)
            with torch.autocast(stream.device.type, torch.bfloat16):
                hidden = model.model(inputs, use_cache=False).last_hidden_state
                total += cross_entropy(hidden, model.lm_head.weight, labels).item() * len(batch)
    model.train()
    return total / len(starts)


def schedule(args: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """Step numbers with the progress at each: the share of the steps, or of the minutes, that has passed."""
    started = time.perf_counter()
    for step in count_from():
        progress = (time.perf_counter() - started) / (60 * args.minutes) if args.minutes else step / args.steps
        if progress >= 1:
            return
        yield step, progress


def train(args: argparse.Namespace, train_stream: Tensor, held_out: Tensor) -> History:
    """Train a model, writing its weights to --out whenever the held-out loss has improved."""
    device = train_stream.device
    model = new_model(device)
    add_dropout(model)
    loss_of = cross_entropy
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        loss_of = torch.compile(cross_entropy)
    optimizer = make_optimizer(model)
    generator = torch.Generator(device).manual_seed(SEED)
    history = History()
    evaluated = 0
    recent: list[Tensor] = []

    def batch_loss(context: int) -> Tensor:
        rows = max(1, args.batch_tokens // context)
        starts = torch.randint(len(train_stream) - context, (rows,), generator=generator, device=device)
        inputs, labels = windows(train_stream, starts, context)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(inputs, use_cache=False).last_hidden_state
            return loss_of(hidden, model.lm_head.weight, labels)

    def evaluate_and_keep() -> None:
        loss = evaluate(model, held_out, CONTEXT, args.evaluation_windows)
        take_loads(model)  # the balance looks at training tokens alone
        history.held_out.append((history.steps, loss))
        if loss < history.best:
            history.best, history.best_step = loss, history.steps
            export(model, args.out)
        (args.out / "history.json").write_text(json.dumps(asdict(history)))

    for context in (CONTEXT, LONG_CONTEXT) if args.compile else ():  # compile before the clock starts
        batch_loss(context).backward()
        optimizer.zero_grad()
    take_loads(model)
    started = time.perf_counter()
    bar = tqdm(total=args.steps, mininterval=5, unit="step")
    for step, progress in schedule(args):
        context = LONG_CONTEXT if progress >= LONG_FROM and not args.short else CONTEXT
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        loss = batch_loss(context)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        balance(model, BALANCE_RATE * learning_rate(progress) / PEAK_LEARNING_RATE)

        history.steps, history.tokens = step + 1, history.tokens + max(1, args.batch_tokens // context) * context
        recent.append(loss.detach())
        bar.update()
        if len(recent) == LOG_EVERY:
            history.training.append((step + 1, torch.stack(recent).mean().item()))
            recent.clear()
            history.seconds = time.perf_counter() - started
            speed = history.tokens / history.seconds
            bar.set_postfix_str(
                f"{progress:.0%} loss {history.training[-1][1]:.3f} best {history.best:.3f} {speed / 1e3:.0f}k tokens/s"
            )
        if progress * EVALUATIONS >= evaluated + 1:
            evaluated = int(progress * EVALUATIONS)
            evaluate_and_keep()
    evaluate_and_keep()
    history.seconds = time.perf_counter() - started
    bar.close()
    return history


# --- Results ---------------------------------------------------------------------------------------------------------


def export(model: DeepseekV3ForCausalLM, folder: Path) -> None:
    """Write the weights in bfloat16, the routers' balance bias in float32, and the configuration."""
    frozen = DeepseekV3ForCausalLM(model_config()).to(torch.bfloat16)
    for router in routers(frozen):
        router.e_score_correction_bias = router.e_score_correction_bias.float()
    frozen.load_state_dict(model.state_dict())
    frozen.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID
    )
    frozen.save_pretrained(folder)


def plot(history: History, path: Path) -> None:
    """Training and held-out loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=110)
    axes.plot(*zip(*history.training, strict=True), color="#9ecae1", linewidth=1, label="training (with dropout)")
    axes.plot(*zip(*history.held_out, strict=True), "o-", color="#08519c", markersize=3, label="held-out modules")
    axes.axvline(history.best_step, color="#888888", linewidth=0.8, linestyle=":", label="weights kept")
    losses = [loss for _, loss in history.training[len(history.training) // 50 :] + history.held_out]
    axes.set_ylim(min(losses) - 0.1, min(max(losses), min(losses) + 2.5) + 0.1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Tiny DeepSeek-V3 on the Python standard library")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


@dataclass
class Report:
    """What is measured on the files that were written, loaded again."""

    loss: float
    long_loss: float
    bits_per_byte: float
    loads: list[list[float]]
    samples: list[tuple[str, str]]


def continuation(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The model's greedy continuation of a prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def measure(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Report:
    """Load the written model as a user would and measure it on the held-out modules."""
    device = torch.device(args.device)
    stream = token_stream(tokenizer, texts).to(device)
    model = DeepseekV3ForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(device)
    count_load(model)
    loss = evaluate(model, stream, CONTEXT, args.evaluation_windows)
    loads = [(load / load.sum()).tolist() for load in take_loads(model)]
    long_loss = evaluate(model, stream, LONG_CONTEXT, args.evaluation_windows)
    tokens_per_byte = len(stream) / sum(len(text.encode()) for text in texts)
    prompts = [prompts_of(text, 200)[STRIDE] for text in texts[:4]]
    samples = [(prompt, continuation(model.eval(), tokenizer, prompt)) for prompt in prompts]
    return Report(loss, long_loss, loss * tokens_per_byte / math.log(2), loads, samples)


MARK = "▶"  # between a prompt and what the model adds

CARD = """# Tiny DeepSeek-V3

A model of the DeepSeek-V3 architecture (`DeepseekV3ForCausalLM`) with its true attention dimensions and everything
else made small, trained on the Python standard library. Transformers and vLLM load it without remote code. It is
made for trying and testing multi-head latent attention (MLA) on a real model whose text can be read; it is no
useful writer of programs.

| | |
| --- | --- |
| parameters | {parameters:,} |
| layers | 3: one dense, two with a mixture of experts (8 routed, 2 per token, and 1 shared) |
| attention | MLA, 8 heads: kv_lora_rank 512, qk_rope_head_dim 64, qk_nope_head_dim 128, v_head_dim 128 |
| queries | q_lora_rank 128 |
| hidden size | 256 |
| positions | 4096, no RoPE scaling |
| tokenizer | byte-level BPE of its own, {vocabulary} tokens, lossless; {bytes_per_token:.2f} bytes per held-out token |
| weights | bfloat16, {weights_size:.1f} MB |

## Loss

Measured on the files in this folder in bfloat16, over the held-out modules, in windows that do not overlap:

| context | nats per token | bits per byte |
| --- | --- | --- |
| {context} tokens | {loss:.3f} | {bits:.3f} |
| {long_context} tokens | {long_loss:.3f} | {long_bits:.3f} |

![Training and held-out loss against steps](loss.png)

Share of the held-out tokens' routes that each expert receives (an even share is 12.5%):

| layer | {expert_names} |
| --- |{rules}
{load_rows}

## Data

The source files of CPython {data_python}'s standard library: {files:,} files, {megabytes:.1f} MB,
{train_tokens:,} tokens. Left out are `encodings` and `pydoc_data` (generated tables and texts), files that are not
UTF-8, and the held-out modules with their tests:
{held_out}.
Held out are {held_out_tokens:,} tokens, and `prompts.py` takes its prompts from these modules.

## Training

{steps:,} steps of {batch_tokens:,} tokens, {tokens:,} tokens in all ({epochs:.0f} passes over the data), in
{minutes:.1f} minutes on one {hardware}, compilation not counted. Contexts of {context} tokens, and of {long_context}
in the last fifth. AdamW (peak learning rate {peak:g}, linear warmup, cosine, weight decay {decay:g}, gradients clipped
at {clip:g}), dropout {dropout:g}, bfloat16 autocast over float32 weights; the experts are balanced by the sign rule of
the DeepSeek-V3 report on `e_score_correction_bias`. The weights are those of step {best_step:,}, which had the lowest
held-out loss of the {evaluations} evaluations. The training loss jumps for a moment where the long contexts begin.

    python train.py --steps {steps} --stdlib .../lib/python{data_minor}    # the library of CPython {data_python}

With Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}.

## Use

Transformers: `AutoModelForCausalLM.from_pretrained(folder)`. vLLM: `LLM(model=folder)`; on a CPU, vLLM 0.32.0 needs
`compilation_config={{"custom_ops": ["-rotary_embedding"]}}`, because its CPU rotary kernel misreads the strides of the
MLA key and spoils the latent vectors. The HOPPER_MLA backend sees to that by itself. So run in float32, vLLM gives the
same greedy tokens as transformers.

## Samples

Greedy continuations of held-out code in bfloat16, the model's text after the `{mark}`. As a newline and the indentation
that follows share a token, a prompt does best to end at a line's end without the newline.

{samples}
"""


def sample_block(prompt: str, text: str) -> str:
    """A prompt and its continuation as a block of code."""
    return f"```python\n{prompt}{MARK}{text}\n```"


def card(args: argparse.Namespace, history: History, report: Report, facts: dict[str, object]) -> str:
    """The model card."""
    loads = [
        f"| {number} | " + " | ".join(f"{share:.1%}" for share in shares) + " |"
        for number, shares in enumerate(report.loads, start=1)
    ]
    samples = [sample_block(prompt, text) for prompt, text in report.samples]
    return CARD.format(
        vocabulary=VOCABULARY,
        context=CONTEXT,
        long_context=LONG_CONTEXT,
        loss=report.loss,
        long_loss=report.long_loss,
        bits=report.bits_per_byte,
        long_bits=report.bits_per_byte * report.long_loss / report.loss,
        expert_names=" | ".join(f"expert {n}" for n in range(len(report.loads[0]))),
        rules=" --- |" * len(report.loads[0]),
        load_rows="\n".join(loads),
        python=platform.python_version(),
        data_python=args.stdlib_version,
        data_minor=args.stdlib_version.rpartition(".")[0],
        held_out=", ".join(f"`{name}`" for name in HELD_OUT),
        steps=history.steps,
        best_step=history.best_step,
        evaluations=len(history.held_out),
        batch_tokens=args.batch_tokens,
        tokens=history.tokens,
        minutes=history.seconds / 60,
        peak=PEAK_LEARNING_RATE,
        decay=WEIGHT_DECAY,
        clip=CLIP,
        dropout=DROPOUT,
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        mark=MARK,
        samples="\n\n".join(samples),
        **facts,
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="train this many steps")
    length.add_argument("--minutes", type=float, help="train this long, with the schedule laid over the time")
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens per step (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="no long contexts at the end")
    parser.add_argument("--evaluation-windows", type=int, help="measure on this many windows only")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="compile the layers")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--stdlib-version", default=platform.python_version(), help="the version the card names")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


def main() -> None:
    """Read, train, measure, write."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(args.device)

    sources = [text for path in training_files(args.stdlib) if (text := read_source(path))]
    held_out_texts = [path.read_text(encoding="utf-8") for path in held_out_files(args.stdlib)]
    tokenizer = train_tokenizer(sources)
    tokenizer.save_pretrained(args.out)
    train_stream = token_stream(tokenizer, sources).to(device)
    held_out = token_stream(tokenizer, held_out_texts).to(device)
    print(f"{len(sources)} files, {len(train_stream):,} training tokens, {len(held_out):,} held-out tokens", flush=True)

    with sdpa_kernel(attention_order(device), set_priority=True):
        history = train(args, train_stream, held_out)
        print(f"held-out loss {history.best:.4f} at step {history.best_step} of {history.steps}", flush=True)
        report = measure(args, tokenizer, held_out_texts)
    plot(history, args.out / "loss.png")
    megabytes = sum(len(text.encode()) for text in sources) / 1e6
    facts = {
        "parameters": sum(p.numel() for p in DeepseekV3ForCausalLM(model_config()).parameters()),
        "weights_size": (args.out / "model.safetensors").stat().st_size / 1e6,
        "bytes_per_token": sum(len(text.encode()) for text in held_out_texts) / len(held_out),
        "files": len(sources),
        "megabytes": megabytes,
        "train_tokens": len(train_stream),
        "held_out_tokens": len(held_out),
        "epochs": history.tokens / len(train_stream),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
    }
    (args.out / "README.md").write_text(card(args, history, report, facts), encoding="utf-8")
    (args.out / "history.json").unlink()
    print(json.dumps(asdict(report), indent=1))


if __name__ == "__main__":
    main()
