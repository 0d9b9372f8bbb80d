"""Ask a merged model the first questions of a data file, with plain transformers: python examples/ask.py MODEL DATA.

Prints each answer, whether it is the trained one word for word, and what ended it. Exit code 1 if one is not.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import tuning  # quietens what optional libraries say at import  # noqa: F401, I001

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="merged model directory")
    parser.add_argument("data", help=".json in the `conversations` format")
    parser.add_argument("--num", type=int, default=3, help="questions to ask (default 3)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    eos = model.generation_config.eos_token_id
    stops = eos if isinstance(eos, list) else [eos]
    with open(args.data, encoding="utf-8") as file:
        conversations = [row["conversations"] for row in json.load(file)[: args.num]]
    exact = True
    for turns in conversations:
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]
        asked = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        inputs = tokenizer.apply_chat_template(messages[:asked], add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)[0]
        new = output[inputs["input_ids"].shape[1] :].tolist()
        answer = tokenizer.decode(new, skip_special_tokens=True)
        stopped = f"ended by {tokenizer.decode(new[-1:])}" if new[-1] in stops else "ended by the length limit"
        same = answer == messages[asked]["content"] and new[-1] == stops[0]
        exact = exact and same
        print(
            f"> {messages[asked - 1]['content']}\n{answer}\n  [{'as trained' if same else 'NOT as trained'}, {stopped}]"
        )
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
