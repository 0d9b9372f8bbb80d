"""Tiny models of the architectures that docs/models.md lists, built in code."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from tuning.model.other_parts import choose_auto_class

SMALL: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=1024, initializer_range=0.1, bos_token_id=None,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_k=2,
    moe_topk=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, norm_topk_prob=True,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_group=2, topk_group=1
)
HYBRID = dict(
    num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_conv_kernel_dim=4,
)  # fmt: skip
TOWER = dict(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[],
    fullatt_block_indexes=[0],
)  # fmt: skip
SIGLIP = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
)
IMAGES = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
GEMMA_IMAGES = dict(mm_tokens_per_image=4, image_token_index=60, boi_token_index=61, eoi_token_index=62)


def _sections(*sections: int, **more: Any) -> dict[str, Any]:
    kind = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}
    return {"rope_parameters": kind}


# name in the table: (model_type, fields of the language model, fields of the vision tower, what else the whole has)
Architecture = tuple[str, dict[str, Any], dict[str, Any] | None, dict[str, Any]]
ARCHITECTURES: dict[str, Architecture] = {
    "Qwen2, Qwen2.5": ("qwen2", {}, None, {}),
    "Qwen2-MoE": ("qwen2_moe", EXPERTS, None, {}),
    "Qwen3": ("qwen3", {}, None, {}),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS, None, {}),
    "Qwen3-Next": ("qwen3_next", {**HYBRID, **EXPERTS}, None, {}),
    "Qwen3.5, 3.6 (text)": ("qwen3_5_text", HYBRID, None, {}),
    "Qwen3.5-MoE, 3.6-MoE (text)": ("qwen3_5_moe_text", {**HYBRID, **EXPERTS}, None, {}),
    "Qwen3.5, 3.6 (multimodal)": ("qwen3_5", HYBRID, TOWER, IMAGES),
    "Qwen3.5-MoE, 3.6-MoE (multimodal)": ("qwen3_5_moe", {**HYBRID, **EXPERTS}, TOWER, IMAGES),
    "Qwen2.5-VL": ("qwen2_5_vl", _sections(1, 1, 2), TOWER, IMAGES),
    "Qwen3-VL": ("qwen3_vl", _sections(2, 1, 1, mrope_interleaved=True), TOWER, IMAGES),
    "Qwen3-VL-MoE": ("qwen3_vl_moe", {**_sections(2, 1, 1, mrope_interleaved=True), **EXPERTS}, TOWER, IMAGES),
    "Llama 2, 3": ("llama", {}, None, {}),
    "Mistral": ("mistral", {"sliding_window": 24}, None, {}),
    "Mixtral": ("mixtral", EXPERTS, None, {}),
    "Gemma": ("gemma", {}, None, {}),
    "Gemma 2": ("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 8}, None, {}),
    "Gemma 3 (text)": ("gemma3_text", {"sliding_window": 24, "query_pre_attn_scalar": 8}, None, {}),
    "Gemma 3 (multimodal)": ("gemma3", {"sliding_window": 24, "query_pre_attn_scalar": 8}, SIGLIP, GEMMA_IMAGES),
    "Phi-3, Phi-4": ("phi3", {"original_max_position_embeddings": 1024}, None, {}),
    "GLM-4": ("glm4", {}, None, {}),
    "GLM-4-MoE": ("glm4_moe", {**EXPERTS, "first_k_dense_replace": 1}, None, {}),
    "gpt-oss": ("gpt_oss", {**EXPERTS, "sliding_window": 24}, None, {}),
    "DeepSeek-V3": (
        "deepseek_v3",
        {**EXPERTS, **LATENT, "num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 1},
        None,
        {},
    ),
    "OLMo-2": ("olmo2", {}, None, {}),
    "Granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0}, None, {}),
    "Command R7B (Cohere-2)": ("cohere2", {"sliding_window": 24, "logit_scale": 0.5}, None, {}),
    "SmolLM-3": ("smollm3", {}, None, {}),
    "MiniMax-M2": ("minimax_m2", EXPERTS, None, {}),
    "ERNIE-4.5": ("ernie4_5", {}, None, {}),
    "ERNIE-4.5-MoE": ("ernie4_5_moe", {**EXPERTS, "moe_num_shared_experts": 1}, None, {}),
    "HunYuan": ("hunyuan_v1_dense", {}, None, {}),
    "HunYuan-MoE": ("hunyuan_v1_moe", {**EXPERTS, "num_experts": 4}, None, {}),
}


def build_config(name: str, **changes: Any) -> PretrainedConfig:
    """changes: of the language model."""
    model_type, fields, tower, others = ARCHITECTURES[name]
    text = {**SMALL, **fields, **changes}
    if tower is None:
        return AutoConfig.for_model(model_type, **text)
    return AutoConfig.for_model(model_type, text_config=text, vision_config=tower, **others)


def build(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model with sharper weights than usual, so that differences show."""
    torch.manual_seed(seed)
    config = build_config(name, **changes)
    model = choose_auto_class(config).from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1) if parameter.ndim > 1 else parameter
    return model


def write(name: str, tokenizer: Any, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a model whose vocabulary is the tokenizer's, and the tokenizer."""
    vocabulary = dict(
        vocab_size=len(tokenizer) + 8, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model = build(name, **vocabulary).to(dtype)
    model.generation_config = transformers.GenerationConfig(**{k: v for k, v in vocabulary.items() if "token" in k})
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
