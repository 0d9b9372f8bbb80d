"""An original Qwen checkpoint of 2023 (model_type qwen) -> the same weights as a Qwen2ForCausalLM.

The architecture is Qwen2's under other names; original_tensors.py has the tensors, this the configuration. No code of
the checkpoint runs. Up to seq_length tokens both compute the same. Beyond it the original raises the base of its
rotary embedding (dynamic NTK), to the base that transformers' "dynamic" with factor 2 has at seq_length times a power
of two, and scales queries by the logarithm of their position (log-n), which Qwen2 does not.

Source: Qwen/Qwen-7B-Chat modeling_qwen.py, configuration_qwen.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, Qwen2Config

from tuning.checkpoint.files import write_json
from tuning.checkpoint.older_readers import add_old_names
from tuning.checkpoint.original_tensors import Shape, copy_tensors
from tuning.checkpoint.tensor_files import list_tensors
from tuning.errors import SettingsError, explain_bad_files, read_json_object

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_SAMPLING = {"top_k": int, "top_p": float, "temperature": float}
_GENERATION = {"repetition_penalty": float, "max_new_tokens": int}
# What the original can be configured to, and its releases are not. Qwen2 has no such thing.
_FIXED: dict[str, Any] = {"rotary_pct": 1.0, "no_bias": True, "emb_dropout_prob": 0.0, "scale_attn_weights": True}
_MOST_LAYERS = 1000
_OTHER_PARTS = {"visual": "pictures (Qwen-VL)", "audio": "audio (Qwen-Audio)"}


@dataclass(frozen=True)
class StopTokens:
    """Token ids of <|endoftext|>, which ends a text, and <|im_end|>, which ends a turn."""

    end_of_text: int
    im_end: int


def is_original_qwen(directory: Path) -> bool:
    """Whether a directory holds a model of the original Qwen's architecture."""
    try:
        return read_json_object(directory / "config.json").get("model_type") == "qwen"
    except SettingsError:
        return False


def convert_checkpoint(source: Path, out: Path, stop: StopTokens, *, allow_pickle: bool = False) -> None:
    """Write config.json, generation_config.json and safetensors into OUT, which is there and empty.

    Everything is checked before the first tensor is written, and one file at a time is in memory.

    Raises: SettingsError: what could not be taken over to the letter.
    """
    values = _read_config(source)
    found = list_tensors(source, allow_pickle=allow_pickle)
    embedding = found.get("transformer.wte.weight")
    said = {"F16": "float16", "BF16": "bfloat16"}.get(embedding.dtype if embedding else "", "float32")
    stored = _stored_dtype(values, source / "config.json") or said
    config = build_config(source / "config.json", values, stored)
    generation = build_generation_config(source / "generation_config.json", stop)
    config.pad_token_id, ends = stop.end_of_text, generation["eos_token_id"]
    config.eos_token_id = ends[0] if isinstance(ends, list) else ends
    copy_tensors(found, out, _read_shape(values, source / "config.json"))
    with explain_bad_files(f"{source}/config.json"):
        config.save_pretrained(out)
    write_json(out / "generation_config.json", generation)
    add_old_names(out)


def _read_config(source: Path) -> dict[str, Any]:
    where = source / "config.json"
    values = read_json_object(where)
    for name, what in _OTHER_PARTS.items():
        if name in values:
            raise SettingsError(f"{where}: {name}: a model with {what}, which is not supported; only text models are")
    for name, fixed in _FIXED.items():
        if values.get(name, fixed) != fixed:
            raise SettingsError(f"{where}: {name} {values[name]!r}: Qwen2 has no such thing; only {fixed} is supported")
    separate = values.get("quantization_config")
    if separate is None and (source / "quantize_config.json").is_file():
        values["quantization_config"] = read_json_object(source / "quantize_config.json") | {"quant_method": "gptq"}
    elif separate is not None and not isinstance(separate, dict):
        raise SettingsError(f"{where}: quantization_config is not an object")
    return values


def _read_shape(values: dict[str, Any], where: Path) -> Shape:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vocabulary, hidden, inner, layers, heads = (_read_count(values, name, where) for name in names)
    channels = values.get("kv_channels", hidden // heads)
    if hidden % heads or channels != hidden // heads:
        raise SettingsError(f"{where}: kv_channels {channels} x {heads} heads is not hidden_size {hidden}")
    if inner % 2:
        raise SettingsError(f"{where}: intermediate_size {inner}: is the width of two matrices, so it must be even")
    if layers > _MOST_LAYERS:
        raise SettingsError(f"{where}: num_hidden_layers {layers:,}: no model has so many")
    bits, group_size = _read_packing(values, where)
    if bits and (hidden % (32 // bits) or (inner // 2) % (32 // bits)):
        raise SettingsError(f"{where}: hidden_size {hidden} or intermediate_size {inner} does not fit {bits} bits")
    tied = bool(values.get("tie_word_embeddings", False))
    return Shape(vocabulary, hidden, inner // 2, layers, bits=bits, group_size=group_size, tied=tied)


def _read_packing(values: dict[str, Any], where: Path) -> tuple[int | None, int | None]:
    """Bits and group size of GPTQ; None where the checkpoint is not quantised."""
    quantization = values.get("quantization_config")
    if quantization is None:
        return None, None
    bits, group_size = quantization.get("bits"), quantization.get("group_size", 128)
    if quantization.get("quant_method", "gptq") != "gptq" or type(bits) is not int or bits not in (4, 8):
        raise SettingsError(f"{where}: quantization_config: only GPTQ with 4 or 8 bits is supported")
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        raise SettingsError(f"{where}: quantization_config: group_size {group_size!r}: expected a number, or -1")
    return bits, group_size


def _read_count(values: dict[str, Any], name: str, where: Path) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 < value < 2**31:
        raise SettingsError(f"{where}: {name} {value!r}: expected a whole number above 0")
    return value


def _stored_dtype(values: dict[str, Any], where: Path) -> str | None:
    """The dtype that config.json says, by name; None where it says none."""
    said = [dtype for flag, dtype in _DTYPES.items() if values.get(flag)]
    if len(said) > 1:
        raise SettingsError(f"{where}: of bf16, fp16 and fp32 only one can be true")
    named = str(values.get("torch_dtype")).removeprefix("torch.")
    return said[0] if said else named if named in _DTYPES.values() else None


def build_config(where: Path, values: dict[str, Any], dtype: str) -> Qwen2Config:
    """Qwen2's configuration. where: the original's config.json, with these values. dtype: of the weights, by name."""
    shape = _read_shape(values, where)
    length = _read_count(values, "seq_length", where)
    base = values.get("rotary_emb_base", 10000)
    if isinstance(base, bool) or not isinstance(base, int | float) or base <= 1:
        raise SettingsError(f"{where}: rotary_emb_base {base!r}: expected a number above 1")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if values.get("use_dynamic_ntk", True):
        rope |= {"rope_type": "dynamic", "factor": 2.0}
    with explain_bad_files(str(where)):
        config = Qwen2Config(
            architectures=["Qwen2ForCausalLM"],
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=values["num_attention_heads"],
            num_key_value_heads=values["num_attention_heads"],
            max_position_embeddings=length,
            rms_norm_eps=values.get("layer_norm_epsilon", 1e-6),
            rope_parameters=rope,
            attention_dropout=values.get("attn_dropout_prob", 0.0),
            initializer_range=values.get("initializer_range", 0.02),
            use_cache=values.get("use_cache", True),
            tie_word_embeddings=shape.tied,
            bos_token_id=None,
            dtype=dtype,
        )
    if (quantization := values.get("quantization_config")) is not None:
        config.quantization_config = {"quant_method": "gptq", **quantization}
    return config


def build_generation_config(where: Path, stop: StopTokens) -> dict[str, Any]:
    """Where the model stops and how it samples. where: the original's generation_config.json, which may be absent.

    Chat models (chat_format chatml) stop on <|im_end|> and <|endoftext|>, base models on <|endoftext|>, and on what
    else the file names.
    """
    values = read_json_object(where) if where.is_file() else {}
    chat = values.get("chat_format", "raw")
    if chat not in ("chatml", "raw"):
        raise SettingsError(f"{where}: chat_format {chat!r}: expected chatml or raw")
    ids = [*([stop.im_end] if chat == "chatml" else []), stop.end_of_text, *_list_stop_ids(values, where)]
    ids = list(dict.fromkeys(ids))
    found: dict[str, Any] = {"eos_token_id": ids if len(ids) > 1 else ids[0], "pad_token_id": stop.end_of_text}
    samples = values.get("do_sample", False)
    if not isinstance(samples, bool):
        raise SettingsError(f"{where}: do_sample {samples!r}: expected true or false")
    found["do_sample"] = samples
    for name, kind in (_SAMPLING | _GENERATION if samples else _GENERATION).items():
        if (value := values.get(name)) is not None:
            if isinstance(value, bool) or not isinstance(value, int | kind):
                raise SettingsError(f"{where}: {name} {value!r}: expected a number")
            found[name] = value
    with explain_bad_files(str(where)):
        GenerationConfig(**found).validate(strict=True)
    return found


def _list_stop_ids(values: dict[str, Any], where: Path) -> list[int]:
    """Further tokens that end generation: eos_token_id, and those stop_words_ids that are one token."""
    eos, words = values.get("eos_token_id"), values.get("stop_words_ids") or []
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not isinstance(words, list) or not all(isinstance(word, list) for word in words):
        raise SettingsError(f"{where}: stop_words_ids: expected a list of lists of token ids")
    ids = [*ids, *(word[0] for word in words if len(word) == 1)]
    if not all(type(each) is int and 0 <= each < 2**31 for each in ids):
        raise SettingsError(f"{where}: eos_token_id, stop_words_ids: expected token ids")
    return ids
