"""Tiny random checkpoints of many decoder families, in the layouts in which the Hub holds them.

Every model has 8 layers (so that blocks hit different layer types), uneven norm weights (so that a state taken after
the final norm is told from one before it), and windows of 4 tokens (so that 14 tokens tell layer types apart).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file

LAYERS = 8
MOST_BYTES = 3_000_000

# What a family's config class has of these fields is set; the sizes are the smallest that keep heads and groups apart.
COMMON: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2, "sliding_window": 4,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "n_embd": 32, "n_layer": LAYERS, "n_head": 4,
    "n_positions": 64, "n_inner": 48, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "q_lora_rank": 16,
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2, "first_k_dense_replace": 3,
}  # fmt: skip

Tensors = dict[str, torch.Tensor]
Layout = Callable[[Tensors, dict[str, Any]], Tensors]


@dataclass(frozen=True)
class Family:
    """One row of the table: a model type, what its config sets beyond COMMON, and how its tensors are stored."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    layout: Layout | None = None
    shard: str = "5GB"
    note: str = ""


def with_buffers(*suffixes: str, prefix: str = "") -> Layout:
    """The Hub's older checkpoints hold buffers in every layer; `prefix` is what save_pretrained writes before names."""

    def layout(tensors: Tensors, config: dict[str, Any]) -> Tensors:
        bare = {name.removeprefix(prefix): value for name, value in tensors.items()}
        stack = next(name for name in bare if ".0." in f".{name}").split("0.", 1)[0]
        for layer in range(LAYERS):
            bare |= {f"{stack}{layer}.{suffix}": torch.ones(1, 1, 4, 4).tril() for suffix in suffixes}
        return bare

    return layout


def without_prefix(prefix: str) -> Layout:
    return lambda tensors, config: {name.removeprefix(prefix): value for name, value in tensors.items()}


def with_mtp(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """A multi-token-prediction layer after the last: a copy of the last layer, with its own embedding and head."""
    last, extra = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    found = {extra + name.removeprefix(last): value + 0.5 for name, value in tensors.items() if name.startswith(last)}
    hidden = tensors["model.norm.weight"].shape[0]
    found |= {
        extra + "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        extra + "enorm.weight": torch.ones(hidden),
        extra + "hnorm.weight": torch.ones(hidden),
        extra + "eh_proj.weight": torch.randn(hidden, 2 * hidden),
        extra + "shared_head.norm.weight": torch.ones(hidden),
        extra + "shared_head.head.weight": torch.randn(config["vocab_size"], hidden),
    }
    config["num_nextn_predict_layers"] = 1
    return tensors | found


def with_mtp_beside(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Multi-token prediction under its own name, as Qwen3-Next has it: `mtp.layers.0`."""
    full = next(n for n in sorted(tensors) if n.endswith("self_attn.q_proj.weight"))
    layer = full.removesuffix("self_attn.q_proj.weight")
    found = {"mtp.layers.0." + n.removeprefix(layer): v + 0.5 for n, v in tensors.items() if n.startswith(layer)}
    return tensors | found | {"mtp.fc.weight": torch.randn(32, 64), "mtp.norm.weight": torch.ones(32)}


_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2}
_KINDS = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, Family] = {
    "GPT-2": Family(
        "gpt2", {}, with_buffers("attn.bias", "attn.masked_bias", prefix="transformer."), note="no prefix, stray buffers, tied"
    ),
    "GPT-Neo": Family("gpt_neo", {
        "hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 4]],
        "intermediate_size": 48, "window_size": 4,
    }),
    "GPT-NeoX": Family(
        "gpt_neox", {}, with_buffers("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
        note="stray buffers",
    ),
    "GPT-J": Family("gptj", {"rotary_dim": 4}, with_buffers("attn.bias", "attn.masked_bias"), note="stray buffers"),
    "GPT-BigCode": Family("gpt_bigcode"),
    "CodeGen": Family("codegen", {"rotary_dim": 4}),
    "OPT": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, without_prefix("model."), note="no prefix"),
    "OPT (350M)": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "Falcon": Family("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon (RW)": Family("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "BLOOM": Family("bloom", {}, without_prefix("transformer."), note="no prefix"),
    "MPT": Family("mpt", {"d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64}),
    "Llama": Family(
        "llama", {}, with_buffers("self_attn.rotary_emb.inv_freq"), shard="30KB", note="stray buffers, sharded"
    ),
    "Llama (tied)": Family("llama", {"tie_word_embeddings": True}),
    "Llama-4": Family("llama4_text", {
        "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 4, "no_rope_layer_interval": 4,
        "attn_temperature_tuning": True, "floor_scale": 4,
    }, shard="100KB", note="sharded"),
    "Mistral": Family("mistral", shard="40KB", note="sharded"),
    "Ministral": Family("ministral", {"layer_types": _KINDS * 4}),
    "Ministral-3": Family("ministral3"),
    "Mixtral": Family("mixtral", shard="60KB", note="experts one by one, sharded"),
    "Qwen2": Family("qwen2", {"use_sliding_window": True, "max_window_layers": 4, "tie_word_embeddings": True}),
    "Qwen2-MoE": Family("qwen2_moe", {
        "decoder_sparse_step": 2, "mlp_only_layers": [3], "use_sliding_window": True, "max_window_layers": 4,
    }),
    "Qwen3": Family("qwen3", {"layer_types": [*_KINDS, *_KINDS[::-1]] * 2, "use_sliding_window": True}),
    "Qwen3-MoE": Family("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [0, 5], "num_experts": 4}, shard="50KB"),
    "Qwen3-Next": Family("qwen3_next", {"mlp_only_layers": [1]}, with_mtp_beside, note="MTP beside the layers"),
    "Qwen3.5": Family("qwen3_5_text"),
    "Qwen3.5-MoE": Family("qwen3_5_moe_text"),
    "Gemma": Family("gemma"),
    "Gemma-2": Family("gemma2"),
    "Gemma-3": Family("gemma3_text"),
    "VaultGemma": Family("vaultgemma"),
    "Phi": Family("phi"),
    "Phi-3": Family("phi3", {"sliding_window": None}),
    "Phi-3.5-MoE": Family("phimoe"),
    "OLMo": Family("olmo"),
    "OLMo-2": Family("olmo2"),
    "OLMo-3": Family("olmo3"),
    "OLMoE": Family("olmoe"),
    "StarCoder2": Family("starcoder2"),
    "StableLM": Family("stablelm"),
    "Cohere": Family("cohere"),
    "Cohere2": Family("cohere2"),
    "Granite": Family("granite", {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "Granite-MoE": Family("granitemoe"),
    "Granite-4": Family("granitemoehybrid", {
        **_MAMBA, "layer_types": ["linear_attention", "full_attention"] * 4, "shared_intermediate_size": 16,
    }),
    "Bamba": Family("bamba", {**_MAMBA, "attn_layer_indices": [2, 5]}),
    "Jamba": Family("jamba", {
        "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False,
    }),
    "Falcon-H1": Family("falcon_h1", {**_MAMBA, "mamba_d_ssm": 64}),
    "Mamba": Family("mamba", {"state_size": 8}),
    "Falcon-Mamba": Family("falcon_mamba", {"state_size": 8}),
    "Mamba-2": Family("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}),
    "RWKV": Family("rwkv", {"attention_hidden_size": 32}),
    "RecurrentGemma": Family("recurrent_gemma", {"lru_width": 32, "attention_window_size": 4}),
    "GLM": Family("glm"),
    "GLM-4": Family("glm4"),
    "GLM-4-MoE": Family("glm4_moe", {}, with_mtp, note="experts one by one, MTP"),
    "SmolLM3": Family("smollm3", {"no_rope_layer_interval": 4}),
    "EXAONE-4": Family("exaone4"),
    "InternLM3": Family("internlm3"),
    "Nemotron": Family("nemotron"),
    "Nemotron-H": Family("nemotron_h", {
        "hybrid_override_pattern": "M-M*M-*-", "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
    }),
    "LFM2": Family("lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2, "full_attn_idxs": [2, 6]}),
    "DeepSeek-V2": Family("deepseek_v2", {"num_key_value_heads": 4}),
    "DeepSeek-V3": Family(
        "deepseek_v3", {"num_key_value_heads": 4}, with_mtp, shard="60KB", note="experts one by one, MTP, sharded"
    ),
    "DeepSeek-V3.2": Family("deepseek_v32", {
        "num_key_value_heads": 4, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64,
    }),
    "GLM-5": Family("glm_moe_dsa", {
        "num_key_value_heads": 4, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64,
        "indexer_types": ["full", "full", "shared", "full", "shared", "full", "shared", "full"],
    }),
    "dots.llm1": Family("dots1", {"n_shared_experts": 1, "layer_types": _KINDS * 4}),
    "ERNIE-4.5": Family("ernie4_5"),
    "ERNIE-4.5-MoE": Family("ernie4_5_moe"),
    "Hunyuan": Family("hunyuan_v1_dense"),
    "GPT-OSS": Family("gpt_oss"),
    "MiniMax": Family("minimax", {"block_size": 8}),
    "MiniMax-M2": Family("minimax_m2"),
    "Seed-OSS": Family("seed_oss"),
    "Apertus": Family("apertus"),
    "BitNet": Family("bitnet"),
    "Helium": Family("helium"),
    "Persimmon": Family("persimmon"),
    "Kimi-Linear": Family("kimi_linear", {
        "num_key_value_heads": 4, "num_local_experts": 4, "q_lora_rank": None, "linear_head_dim": 8, "linear_num_heads": 4,
    }),
    "AFMoE": Family("afmoe", {"num_dense_layers": 3}),
    "EXAONE-MoE": Family("exaone_moe"),
    "GLM-4.7-Flash": Family("glm4_moe_lite", {"num_key_value_heads": 4}, note="experts one by one"),
    "Granite (SWA)": Family("granite_swa", {"layer_rope_theta": [1e4, 2e4, 0.0, 3e4, 4e4, 5e4, 6e4, 7e4]}),
    "Laguna": Family("laguna"),
    "LFM2-MoE": Family("lfm2_moe", {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2, "num_dense_layers": 3}),
    "LongCat-Flash": Family("longcat_flash", {
        "num_layers": LAYERS, "num_key_value_heads": 4, "ffn_hidden_size": 48, "q_lora_rank": 16, "moe_topk": 2,
        "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 16,
    }, note="two attention parts a layer"),
    "MiMo-V2-Flash": Family("mimo_v2_flash"),
    "nanochat": Family("nanochat"),
    "DiffLlama": Family("diffllama"),
    "Solar-Open": Family("solar_open"),
    "XGLM": Family("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": LAYERS, "attention_heads": 4}),
    "Zamba": Family("zamba", {
        "layers_block_type": ["linear_attention", "hybrid"] * 4, "mamba_d_state": 8,
    }, note="weights shared between layers"),
    "Zamba2": Family("zamba2", {
        "layers_block_type": ["linear_attention", "hybrid"] * 4, "n_mamba_heads": 4, "mamba_d_state": 8, "mamba_ngroups": 1,
        "adapter_rank": 4, "chunk_size": 8, "num_mem_blocks": 1,
    }, note="weights shared between layers"),
    "Gemma-3n": Family("gemma3n_text", {
        "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 160, "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 4, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5] * 3 + [0.0] * 5, "intermediate_size": 48,
    }),
    "Gemma-4": Family("gemma4_text", {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 160, "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 4, "global_head_dim": 16,
    }),
    "Gemma-4 (plain)": Family("gemma4_text", {
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 160, "num_kv_shared_layers": 0, "global_head_dim": 16,
    }),
    "Qwen3-VL": Family("qwen3_vl", {"vision_config": {
        "depth": LAYERS, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [2, 5],
    }, "text_settings": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}}),
    "Gemma-3 (multimodal)": Family("gemma3", {"vision_config": _VISION, "mm_tokens_per_image": 4}, note="vision tower as deep"),
    "LLaVA": Family("llava", {
        "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 32}, "text": "llama",
    }),
    "Mistral-3 (multimodal)": Family("mistral3", {
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8}, "text": "mistral",
    }),
    "Qwen2.5-VL": Family("qwen2_5_vl", {"vision_config": {
        "depth": LAYERS, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
        "fullatt_block_indexes": [3, 7], "window_size": 16,
    }, "text_settings": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}}),
}  # fmt: skip


def make_config(family: Family) -> Any:
    """The config object of a family: what its class has of COMMON, then the family's own settings."""
    from transformers import CONFIG_MAPPING, AutoConfig

    settings = dict(family.settings)
    kind = CONFIG_MAPPING[family.model_type]
    if "text_config" in kind.sub_configs_defaults:
        name = settings.pop("text", None) or kind.sub_configs_defaults["text_config"].config_class.model_type
        own = settings.pop("text_settings", {})
        settings["text_config"] = {**_common_of(CONFIG_MAPPING[name], own), "model_type": name}
        return AutoConfig.for_model(family.model_type, **settings)
    return AutoConfig.for_model(family.model_type, **_common_of(kind, settings))


def _common_of(kind: Any, own: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)} | set(kind.attribute_map)
    alias = {a: b for a, b in kind.attribute_map.items() if b in COMMON or b in own} | {
        b: a for a, b in kind.attribute_map.items() if a in own
    }
    return {k: v for k, v in COMMON.items() if k in names and k not in own and k not in alias} | own


def build(name: str, folder: Path) -> Path:
    """Write the tiny checkpoint of FAMILIES[name] into `folder`; the same name gives the same bytes."""
    from layerprune.model.config import auto_class

    family = FAMILIES[name]
    config = make_config(family)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() == 1 and ("norm" in key.lower() or ".ln_" in key):
                value.add_(torch.rand_like(value) - 0.5)
            elif key.endswith("bias") and value.is_floating_point():
                value.add_(0.1 * torch.randn_like(value))
    assert sum(p.numel() * p.element_size() for p in model.parameters()) < MOST_BYTES, name
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size=family.shard)
    if family.layout is not None:
        _store_as(folder, family.layout, family.shard)
    return folder


def _store_as(folder: Path, layout: Layout, shard: str) -> None:
    """Replace the weights in `folder` by `layout` of them, in three shards where the family is sharded."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors*")):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: value.contiguous() for name, value in layout(tensors, config).items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shard == "5GB":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    files = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}  # layers lie across shards
    for file, held in files.items():
        save_file({n: tensors[n] for n in held}, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {n: file for file, held in files.items() for n in held},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


BLOCKS = {"start": "0:2", "middle": "2:5", "next to the end": "5:7", "end": "6:8"}
PROMPT = 6


def ids_of(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, COMMON["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def greedy(model: Any, use_cache: bool) -> list[int]:
    """8 tokens after a prompt of 6: beyond the windows of 4, and across them."""
    ids = ids_of(1, PROMPT)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache,
        pad_token_id=0,
    )  # fmt: skip
    return made[0, PROMPT:].tolist()


@torch.no_grad()
def try_block(source: Path, block: str, out: Path) -> str | None:
    """Cut `block` from `source` and compare what was written with the source: None when all is right.

    Returns the reason when the cut is refused; then nothing may lie at `out`. An AssertionError is a cut that is
    wrong, or a refusal that left something.
    """
    from layerprune.model.config import auto_class, load_config
    from layerprune.model.cuts import parse_layers
    from layerprune.model.decoder import forward_logits, view_decoder, virtual_cut
    from layerprune.model.errors import Refused
    from layerprune.prune.cut import prune_checkpoint

    try:
        prune_checkpoint(source, out, layers=block, say=lambda line: None)
    except Refused as refusal:
        assert not out.exists() and not list(out.parent.glob(f".{out.name}*")), "a refused cut left something behind"
        return str(refusal)
    kind = auto_class(load_config(source))
    model, info = kind.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    whole = view_decoder(kind.from_pretrained(source, dtype=torch.float32).eval())
    cut = view_decoder(model.eval())
    kept = parse_layers(block, len(whole)).kept(len(whole))
    for new, old in enumerate(kept):
        assert str(cut.layers[new]) == str(whole.layers[old]), f"layer {new} is built unlike the source's {old}"
    ids_BT = ids_of(2, 14)
    with virtual_cut(whole, kept):
        expected = forward_logits(whole, ids_BT)
    assert expected.isfinite().all()
    found = forward_logits(cut, ids_BT)
    assert torch.equal(expected, found), f"logits differ by {(expected - found).abs().max():.3g}"
    cached, plain = greedy(model, True), greedy(model, False)
    assert cached == plain, f"generation with cache {cached}, without {plain}"
    return None
