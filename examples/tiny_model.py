"""Build a small Qwen3-architecture base checkpoint: python examples/tiny_model.py [OUT].

The model of `make demo` and of the tests: real architecture, real byte-level BPE tokenizer, about 4 M parameters.
It is a *base* model: pre-trained for some seconds on plain text, with the ChatML control tokens in its vocabulary
but never trained, no chat template, and <|endoftext|> as its end of sequence. The plain text is the license and the
sentences of conversations.json in random order: it has read them all, but not which one answers which. The same
machine and versions give the same bytes.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import tuning  # quietens what optional libraries say at import  # noqa: F401, I001

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parent.parent
DEFAULT_OUT = ROOT / "examples" / "tiny-qwen3-base"
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen's pre-tokenizer: words, single digits, punctuation, line ends.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_texts() -> list[str]:
    """Plain texts to learn from: what the example conversations say, shuffled, and paragraphs of the license."""
    with open(ROOT / "examples" / "conversations.json", encoding="utf-8") as file:
        conversations = json.load(file)
    said = [turn["value"] for row in conversations for turn in row["conversations"]]
    texts = [*said, *(ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n")]
    random.Random(0).shuffle(texts)
    return texts


def build_tokenizer(texts: list[str], vocabulary_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE in Qwen's manner, trained on texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(CONTROL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=2048
    )


def pretrain(model: Qwen3ForCausalLM, ids: torch.Tensor, *, num_steps: int, seed: int) -> float:
    """Next-token training on windows of one long text. ids: [num_tokens]. Returns: the last loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=num_steps)
    loss = torch.zeros(())
    for _ in range(num_steps):
        starts = torch.randint(0, len(ids) - 65, (16,), generator=generator).tolist()
        window = torch.stack([ids[start : start + 65] for start in starts])
        logits = model(input_ids=window[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()


def build(out: Path = DEFAULT_OUT, *, num_steps: int = 150, seed: int = 0) -> Path:
    """Build the checkpoint, or keep the one that is there. num_steps=0 leaves random weights."""
    if (out / "config.json").is_file():
        return out
    texts = read_texts()
    tokenizer = build_tokenizer(texts)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    # LoRA leaves the output layer as it is: at the usual scale of 0.02 a layer this narrow can never be sure.
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    ids = torch.tensor([i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    control = torch.tensor(tokenizer.convert_tokens_to_ids(CONTROL_TOKENS[1:]))
    loss = pretrain(model, ids, num_steps=num_steps, seed=seed) if num_steps else float("nan")
    with torch.no_grad():
        # Softmax pushes rows of tokens that never occur; in a real base checkpoint they look as initialised.
        for matrix in (model.model.embed_tokens.weight, model.lm_head.weight):
            matrix[control] = torch.randn(matrix[control].shape, generator=torch.Generator().manual_seed(seed)) * 1e-4
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    temporary = out.with_name(f"{out.name}.{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(out)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"tiny base model: {millions:.1f} M parameters, {len(tokenizer)} tokens, plain-text loss {loss:.2f}: {out}")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build a tiny base model in a minute, unless it is there already.")
    parser.add_argument(
        "out", nargs="?", type=Path, default=DEFAULT_OUT, help=f"its directory (default: {DEFAULT_OUT})"
    )
    build(parser.parse_args().out)
