"""The chat templates of several families, each on a small byte-level tokenizer that has its control tokens."""

import functools
from pathlib import Path

import trl
from tokenizers import AddedToken

from data_utils.template import ChatTemplate
from examples.tiny_model import build_tokenizer, read_texts

FOLDER = Path(trl.__file__).parent / "chat_templates"

_CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_QWEN_MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_GLM_MARKUP = [*_QWEN_MARKUP, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
# name of the template: special tokens, the last one ending documents; added tokens that are not marked special
FAMILIES: dict[str, tuple[list[str], list[str]]] = {
    "qwen2_5": (_CHATML, _QWEN_MARKUP[2:4]),
    "qwen3": (_CHATML, _QWEN_MARKUP),
    "qwen3_instruct_2507": (_CHATML, _QWEN_MARKUP),
    "qwen3_5_think": ([*_VISION, *_CHATML], _QWEN_MARKUP),
    "qwen3_6": ([*_VISION, *_CHATML], _QWEN_MARKUP),
    "llama3_2": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"],
        [],
    ),
    "gemma3": (["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"], []),
    "phi3": (["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"], []),
    "glm4moe": (
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"],
        [*_GLM_MARKUP, "/nothink"],
    ),
    "gptoss": (
        ["<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|end|>", "<|return|>"],
        [],
    ),
}
NO_TOOLS = {"gemma3", "phi3"}


@functools.cache
def load_template(name: str) -> ChatTemplate:
    special, plain = FAMILIES[name]
    tokenizer = build_tokenizer(read_texts(), vocabulary_size=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    tokenizer.eos_token = special[-1]
    if special[0] in ("<|begin_of_text|>", "<bos>", "<s>"):
        tokenizer.bos_token = special[0]
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(tokenizer)
