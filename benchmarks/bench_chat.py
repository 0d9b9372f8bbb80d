"""How fast are many prompts answered? python benchmarks/bench_chat.py alpaca_en.json --tokenizer DIR.

A random model answers the same prompts with 32 tokens each: transformers' own generate in a loop, prompts in the
file's order, padded by the tokenizer; and ours, which puts prompts of like length together. Batches of 1 and 8, the
arms in turn. Then what the quantised cache takes and changes, over 512 tokens.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness import describe_machine
from commands.prompts import read_prompts
from data_utils.template import ChatTemplate
from data_utils.tokenizer import plain_chatml
from inference.batches import answer_in_order
from inference.chat_model import choose_cache

SHAPE = dict(
    hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64,
)  # fmt: skip
NEW_TOKENS = 32


def answer_plainly(model: Any, tokenizer: Any, texts: list[str], batch_size: int) -> list[list[int]]:
    """The loop of transformers' documentation. Returns: ids of the answers."""
    found: list[list[int]] = []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        found += output[:, inputs["input_ids"].shape[1] :].tolist()
    return found


def answer_ours(model: Any, tokenizer: Any, ids: list[list[int]], batch_size: int) -> list[str]:
    """Returns: texts of the answers."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    answers = answer_in_order(model, tokenizer, ids, batch_size=batch_size, **options)
    return [answer.text for answer in answers]


def measure_cache(model: Any, ids: list[int], num_tokens: int = 512) -> dict[str, Any]:
    """Bytes of both caches, and how the logits of the answer differ on the same tokens."""
    found: dict[str, Any] = {}
    prompt = torch.tensor([ids])
    full = model.generate(
        input_ids=prompt, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    layers = full.past_key_values.layers
    found["full_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    whole = torch.log_softmax(model(full.sequences).logits[0, len(ids) - 1 : -1].float(), -1)
    from transformers import QuantizedCache

    cache = QuantizedCache(choose_cache(model, "quantized")["cache_config"]["backend"], config=model.config)
    logits = [model(prompt, past_key_values=cache).logits[0, -1]]
    for token in full.sequences[0, len(ids) : -1]:
        logits.append(model(token.view(1, 1), past_key_values=cache).logits[0, -1])
    small = torch.log_softmax(torch.stack(logits).float(), -1)
    held = [tensor for layer in cache.layers for tensor, _ in (layer._quantized_keys, layer._quantized_values)]
    found["quantized_bytes"] = sum(tensor.nbytes for tensor in held)
    found["mean_kl"] = (whole.exp() * (whole - small)).sum(-1).mean().item()
    found["same_top_1"] = (whole.argmax(-1) == small.argmax(-1)).float().mean().item()
    return found


@torch.no_grad()
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="data file, whose questions are the prompts")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--num", type=int, default=64, help="prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="for the cache: a trained model in place of the random one")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, padding_side="left")
    tokenizer.chat_template = tokenizer.chat_template or plain_chatml("You are a helpful assistant.")
    tokenizer.pad_token = tokenizer.pad_token or "<|im_end|>"
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **SHAPE)).eval()
    template = ChatTemplate(tokenizer)
    prompts = [list(prompt.asked.messages) for prompt in read_prompts(args.data)[: args.num] if prompt.asked]
    ids = [template.encode_prompt(messages) for messages in prompts]
    texts = [template.render(messages, add_generation_prompt=True) for messages in prompts]
    seconds: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for size in (1, 8):
            for name in ("transformers", "ours"):
                began = time.perf_counter()
                if name == "ours":
                    answer_ours(model, tokenizer, ids, size)
                else:
                    answer_plainly(model, tokenizer, texts, size)
                seconds.setdefault(f"{name}, batch {size}", []).append(time.perf_counter() - began)
    result: dict[str, Any] = {
        "machine": describe_machine(["torch", "transformers"]),
        "prompts": len(ids),
        "new_tokens": NEW_TOKENS,
    }
    result["prompt_tokens"] = [min(map(len, ids)), statistics.median(map(len, ids)), max(map(len, ids))]
    result["seconds"] = seconds
    for arm, times in seconds.items():
        rate = len(ids) * NEW_TOKENS / statistics.median(times)
        print(f"{arm}: {rate:,.0f} tokens/s  ({', '.join(f'{t:.2f}' for t in times)} s)")
    if args.model:
        from inference import load

        trained = load(args.model)
        prompt = trained.template.encode_prompt([{"role": "user", "content": "Who are you?"}])
        result["cache"] = measure_cache(trained.model, prompt)
        print(result["cache"])
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
