"""Who chooses the backend: the flag, the environment variable, both, neither, a wrong name; and who may not."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import replace, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend

from engine import MODEL, environment
from mla_backend.plugin import register, releases, selection
from mla_backend.plugin.backend import HopperMLABackend

VARIABLE = selection.VARIABLE


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    selection._warn_of_other_value.cache_clear()


def configure(model: str = MODEL, **arguments: Any) -> Any:
    return EngineArgs(model=model, max_model_len=1024, skip_tokenizer_init=True, **arguments).create_engine_config()


def chosen(config: Any, head_size: int = 576, use_mla: bool = True, **layer: Any) -> str:
    """Return the name of the backend that a layer of the model gets, through vLLM's own selector."""
    with set_current_vllm_config(config):
        backend = get_attn_backend(head_size, config.model_config.dtype, "auto", use_mla=use_mla, **layer)
    return backend.get_name()


def variant(tmp_path: Path, **changes: Any) -> str:
    """Write a configuration like the tiny model's, with changes, and no weights."""
    config = json.loads((Path(MODEL) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return str(tmp_path)


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 64, "intermediate_size": 512}
VLLMS_CHOICE = ("CPU_MLA", "AMX_MLA")


def test_the_flag() -> None:
    assert chosen(configure(attention_backend="HOPPER_MLA")) == "HOPPER_MLA"
    assert chosen(configure(attention_backend="CUSTOM")) == "HOPPER_MLA"
    assert chosen(configure(attention_config={"backend": "HOPPER_MLA"})) == "HOPPER_MLA"


@pytest.mark.parametrize("value", ["HOPPER_MLA", "hopper_mla"])
def test_the_variable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    config = configure()
    assert chosen(config) == "HOPPER_MLA"
    assert config.attention_config.backend is None, "layers without MLA stay vLLM's"


def test_an_explicit_flag_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "HOPPER_MLA")
    assert chosen(configure(attention_backend="CPU_MLA")) == "CPU_MLA"
    per_kind = {"backend_per_kind": {"mla_attention": "CPU_MLA"}}
    assert chosen(configure(attention_config=per_kind)) == "CPU_MLA"


def test_neither() -> None:
    assert chosen(configure()) in VLLMS_CHOICE


def test_another_value_is_left_to_vllm_and_warned_about_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, "HOPER_MLA")
    assert chosen(configure()) in VLLMS_CHOICE
    assert chosen(configure()) in VLLMS_CHOICE
    warnings = [r.getMessage() for r in caplog.records if VARIABLE in r.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith("VLLM_ATTENTION_BACKEND=HOPER_MLA has no effect")


def test_a_wrong_flag_is_vllms_error() -> None:
    with pytest.raises(ValueError, match="Unknown attention backend: 'HOPER_MLA'"):
        configure(attention_backend="HOPER_MLA")


def test_loading_the_plugin_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = type(current_platform).get_attn_backend_cls
    members = list(AttentionBackendEnum.__members__)
    for _ in range(3):
        register()
    assert type(current_platform).get_attn_backend_cls == hook
    assert list(AttentionBackendEnum.__members__) == members
    monkeypatch.setenv(VARIABLE, "HOPPER_MLA")
    assert chosen(configure()) == "HOPPER_MLA"


CHOOSE_IN_WORKER = """
import os, pickle, sys
assert "VLLM_ATTENTION_BACKEND" not in os.environ
config = pickle.load(open(sys.argv[1], "rb"))  # before any plugin is loaded, as vLLM's processes do
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config import replace, set_current_vllm_config
from vllm.v1.attention.selector import get_attn_backend
with set_current_vllm_config(config):
    backend = get_attn_backend(576, config.model_config.dtype, "auto", use_mla=True)
print("chosen:", backend.get_name())
"""


@pytest.mark.parametrize("by_variable", [True, False])
def test_the_choice_travels_in_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_variable: bool
) -> None:
    if by_variable:
        monkeypatch.setenv(VARIABLE, "HOPPER_MLA")
    config = configure() if by_variable else configure(attention_backend="HOPPER_MLA")
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    worker = [sys.executable, "-c", CHOOSE_IN_WORKER, str(tmp_path / "config")]
    done = subprocess.run(worker, env=environment(), capture_output=True, text=True)
    assert "chosen: HOPPER_MLA" in done.stdout, done.stderr


def test_a_ray_worker_without_the_variable_makes_the_same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's Ray executor sends the configuration to its actors in this way; on the CPU vLLM itself refuses Ray."""
    ray = pytest.importorskip("ray")

    def choose(config: Any) -> tuple[str, str | None]:
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        with set_current_vllm_config(config):
            backend = get_attn_backend(576, config.model_config.dtype, "auto", use_mla=True)
        return backend.get_name(), os.environ.get("VLLM_ATTENTION_BACKEND")

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        monkeypatch.setenv(VARIABLE, "HOPPER_MLA")
        assert ray.get(ray.remote(choose).remote(configure())) == ("HOPPER_MLA", None)
    finally:
        ray.shutdown()


def refusal(model: str = MODEL, **arguments: Any) -> str:
    with pytest.raises(ValueError, match="HOPPER_MLA cannot serve") as error:
        configure(model, attention_backend="HOPPER_MLA", **arguments)
    message = str(error.value)
    assert "supported are dense MLA decoders with head_size 576" in message
    assert "unset --attention-backend and VLLM_ATTENTION_BACKEND, and vLLM chooses" in message
    return message


def test_what_it_cannot_serve_stops_the_start(tmp_path: Path) -> None:
    message = refusal(kv_cache_dtype="fp8")
    assert "kv_cache_dtype not supported" in message
    assert "kv_cache_dtype=fp8" in message
    assert "name CPU_MLA with --attention-backend" in message
    assert "block_size not supported" in refusal(block_size=24)
    assert "batch invariance" not in message
    assert "head_size=320" in refusal(variant(tmp_path, kv_lora_rank=256))
    assert "sparse not supported" in refusal(variant(tmp_path, index_topk=64))
    assert "non-MLA not supported" in refusal(variant(tmp_path, **LLAMA))
    shared = refusal(tensor_parallel_size=2, decode_context_parallel_size=2)
    assert "no decode context parallelism on the CPU" in shared
    assert "use_dcp=True" in shared
    assert "a float16 cache needs a model in float16" in refusal(dtype="bfloat16", kv_cache_dtype="float16")


def test_the_variable_stops_the_start_of_a_model_without_mla(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "HOPPER_MLA")
    with pytest.raises(ValueError, match=r"HOPPER_MLA cannot serve .*non-MLA not supported\)"):
        configure(variant(tmp_path, **LLAMA))


def test_a_layer_that_it_cannot_serve_stops_the_start() -> None:
    config = configure(attention_backend="HOPPER_MLA")
    with pytest.raises(ValueError, match="sliding window not supported"):
        chosen(config, has_sliding_window=True)


def test_only_hopper_gpus_and_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert HopperMLABackend.supports_compute_capability(None)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    assert HopperMLABackend.supports_compute_capability(DeviceCapability(9, 0))
    for other in (
        None,
        DeviceCapability(8, 0),
        DeviceCapability(8, 9),
        DeviceCapability(10, 0),
        DeviceCapability(12, 0),
    ):
        assert not HopperMLABackend.supports_compute_capability(other)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: False)
    assert not HopperMLABackend.supports_compute_capability(DeviceCapability(9, 0)), "another maker's GPU"


def test_custom_stays_with_another_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    custom = AttentionBackendEnum.CUSTOM
    monkeypatch.setitem(sys.modules["vllm.v1.attention.backends.registry"]._ATTN_OVERRIDES, custom, "other.Backend")
    register()
    assert custom.get_path() == "other.Backend"
    assert not releases.is_backend(custom)
    assert releases.backend_member().name == "HOPPER_MLA"


def test_vllms_cpu_rotary_kernel_still_has_to_be_avoided() -> None:
    """It writes over the latent part of a projection; once it no longer does, the workaround can go."""
    from vllm import _custom_ops as ops

    assert "-rotary_embedding" in configure(attention_backend="HOPPER_MLA").compilation_config.custom_ops
    current_platform.import_kernels()
    projection = torch.randn(4, 576)
    latent = projection[:, :512].clone()
    key = projection[:, 512:].unsqueeze(1)
    ops.rotary_embedding(torch.arange(4), torch.randn(4, 8, 64), key, 64, torch.randn(64, 64), False)
    assert not projection[:, :512].equal(latent)


@pytest.fixture
def older_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases before 0.32 take no new names: CUSTOM is all there is."""
    monkeypatch.delattr(AttentionBackendEnum, "register")
    monkeypatch.delitem(AttentionBackendEnum._member_map_, "HOPPER_MLA")


@pytest.mark.usefixtures("older_vllm")
def test_where_vllm_takes_no_new_names(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    assert chosen(configure(attention_backend="CUSTOM")) == "HOPPER_MLA"
    monkeypatch.setenv(VARIABLE, "HOPPER_MLA")
    config = pickle.loads(pickle.dumps(configure()))
    assert config.attention_config.backend_per_kind["mla_attention"] is AttentionBackendEnum.CUSTOM
    assert chosen(config) == "HOPPER_MLA"
    registry = sys.modules["vllm.v1.attention.backends.registry"]
    monkeypatch.setitem(registry._ATTN_OVERRIDES, AttentionBackendEnum.CUSTOM, "other.Backend")
    with pytest.raises(ValueError, match=r"another plugin has taken it \(other.Backend\)"):
        configure()


def draft_of(config: Any, backend: AttentionBackendEnum | None) -> Any:
    """Make a draft model's configuration as vLLM does: the target's, with a backend of its own or none."""
    return replace(config, attention_config=replace(config.attention_config, backend=backend))


def test_a_draft_model_keeps_the_choice_and_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"block_size": 64, "enable_prefix_caching": True, "max_num_batched_tokens": 512}
    monkeypatch.setenv(VARIABLE, "HOPPER_MLA")
    config = configure(**settings)
    assert chosen(draft_of(config, None)) == "HOPPER_MLA"
    assert chosen(draft_of(config, AttentionBackendEnum.CPU_MLA)) == "CPU_MLA"
    assert chosen(config) == "HOPPER_MLA"
    assert config.cache_config.block_size == 64
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_batched_tokens == 512

    explicit = configure(attention_backend="CPU_MLA")
    assert chosen(draft_of(explicit, None)) in VLLMS_CHOICE, "the variable has lost against the flag once and for all"


def test_settings_stay_as_configured_when_all_is_off() -> None:
    config = configure(
        attention_backend="HOPPER_MLA",
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        max_num_batched_tokens=9000,
    )
    assert config.scheduler_config.max_num_batched_tokens == 9000
    assert not config.cache_config.enable_prefix_caching
    assert not config.scheduler_config.enable_chunked_prefill
