"""Checkpoints in the original Qwen's layout, and its forward pass written down slowly: the reference for conversions.

Source: Qwen/Qwen-7B-Chat modeling_qwen.py.
"""

import base64
import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data_utils.tiktoken_encoder import byte_letters
from tests.conftest import SHARED
from tuning import convert
from tuning.model.loading import load_model

GOLDEN = SHARED / "golden" / "qwen_v1_tiny"
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
NUM_RANKS = 800  # of the test's vocabulary; with 208 special tokens it fits the golden 1,024 rows
END, IM_START, IM_END = NUM_RANKS, NUM_RANKS + 1, NUM_RANKS + 2
CONFIG = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "vocab_size": 1024, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 8, "intermediate_size": 128, "seq_length": 64,
    "max_position_embeddings": 512, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "use_dynamic_ntk": True, "use_logn_attn": False, "no_bias": True, "bf16": False, "fp16": False, "fp32": True,
    "emb_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "tie_word_embeddings": False, "scale_attn_weights": True,
    "initializer_range": 0.02, "use_cache": True, "use_flash_attn": "auto", "onnx_safe": None,
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}, "tokenizer_type": "QWenTokenizer",
}  # fmt: skip
CHAT = {
    "chat_format": "chatml", "eos_token_id": END, "pad_token_id": END, "max_window_size": 24000,
    "max_new_tokens": 512, "do_sample": True, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.1,
}  # fmt: skip
RAW = {"chat_format": "raw", "eos_token_id": END, "pad_token_id": END, "stop_words_ids": [[END]], "do_sample": False}


def write_vocabulary(tokenizer, path: Path) -> None:
    """The first ranks of a byte-level BPE, as qwen.tiktoken."""
    letters = {ord(letter): byte for byte, letter in byte_letters().items()}
    ids = {rank: piece for piece, rank in tokenizer.get_vocab().items()}
    tokens = [ids[rank].translate(letters).encode("latin-1") for rank in range(NUM_RANKS)]
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))


def write_original(directory: Path, tokenizer, state, *, config=CONFIG, generation=CHAT, num_shards=1) -> Path:
    """A checkpoint as the hub has it. state: by the original's names."""
    directory.mkdir(parents=True, exist_ok=True)
    write_vocabulary(tokenizer, directory / "qwen.tiktoken")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["x.QWenTokenizer", None]}})
    )
    if num_shards == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names, weight_map = sorted(state), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        own = names[shard::num_shards]  # a layer lies in several files
        save_file({name: state[name] for name in own}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def write_golden(directory: Path, tokenizer, **more) -> Path:
    """The golden checkpoint with a vocabulary that fits it."""
    config = json.loads((GOLDEN / "config.json").read_text())
    write_original(directory, tokenizer, {}, config=config, **more)
    shutil.copyfile(GOLDEN / "model.safetensors", directory / "model.safetensors")
    return directory


def random_state(config=CONFIG, *, seed=0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Random weights by the original's names."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"] // 2
    sizes = {
        "attn.c_attn": (3 * hidden, hidden), "attn.c_proj": (hidden, hidden), "mlp.w1": (inner, hidden),
        "mlp.w2": (inner, hidden), "mlp.c_proj": (hidden, inner),
    }  # fmt: skip
    shapes = {"transformer.wte.weight": (config["vocab_size"], hidden), "transformer.ln_f.weight": (hidden,)}
    shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for name in LINEAR:
            shapes[f"transformer.h.{layer}.{name}.weight"] = sizes[name]
        shapes[f"transformer.h.{layer}.attn.c_attn.bias"] = (3 * hidden,)
        shapes |= {f"transformer.h.{layer}.{name}.weight": (hidden,) for name in ("ln_1", "ln_2")}
    return {name: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


@torch.no_grad()
def reference_logits(state, config, input_ids):
    """[B, T] -> [B, T, V], float32, without log-n attention."""
    state = {name: tensor.float() for name, tensor in state.items()}
    length, heads, width = input_ids.shape[1], config["num_attention_heads"], config["kv_channels"]
    # Dynamic NTK: the base grows with the length, in steps at powers of two.
    alpha = max(2 ** math.ceil(math.log(length / config["seq_length"], 2) + 1) - 1, 1)
    base = config["rotary_emb_base"] * alpha ** (width / (width - 2))
    angles = torch.outer(torch.arange(length).float(), 1 / base ** (torch.arange(0, width, 2).float() / width))
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1)[None, :, None] for f in (torch.cos, torch.sin))

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"]) * state[name]

    def rotate(x):
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    x = state["transformer.wte.weight"][input_ids]
    future = torch.ones(length, length).triu(1).bool()
    for layer in range(config["num_hidden_layers"]):
        h = f"transformer.h.{layer}"
        fused = F.linear(norm(x, f"{h}.ln_1.weight"), state[f"{h}.attn.c_attn.weight"], state[f"{h}.attn.c_attn.bias"])
        q, k, v = (part.unflatten(-1, (heads, width)) for part in fused.split(heads * width, dim=-1))
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q), rotate(k)) / math.sqrt(width)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -math.inf).softmax(-1), v).flatten(2)
        x = x + F.linear(mixed, state[f"{h}.attn.c_proj.weight"])
        inside = norm(x, f"{h}.ln_2.weight")
        gate = F.silu(F.linear(inside, state[f"{h}.mlp.w2.weight"]))
        x = x + F.linear(F.linear(inside, state[f"{h}.mlp.w1.weight"]) * gate, state[f"{h}.mlp.c_proj.weight"])
    return F.linear(norm(x, "transformer.ln_f.weight"), state["lm_head.weight"])


def pack(numbers, dim, bits):
    """Numbers of some bits, several in each 32-bit word, the first one lowest."""
    per_word = 32 // bits
    shape = list(numbers.shape)
    shape[dim] //= per_word
    words = torch.zeros(shape, dtype=torch.int64)
    for index in range(numbers.shape[dim]):
        shifted = numbers.select(dim, index) << (bits * (index % per_word))
        words.select(dim, index // per_word).bitwise_or_(shifted)
    return ((words + 2**31) % 2**32 - 2**31).int()


def packed_state(config, *, bits, group_size, seed=0):
    """(GPTQ tensors as AutoGPTQ wrote them for the original, the same weights unpacked by the definition)."""
    generator = torch.Generator().manual_seed(seed)
    plain, packed = random_state(config, seed=seed, dtype=torch.float16), {}
    for name, tensor in list(plain.items()):
        layer = name.removesuffix(".weight")
        if not layer.endswith(LINEAR):
            packed[name] = tensor
            continue
        outputs, inputs = tensor.shape
        groups = inputs // group_size
        codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
        zeros = torch.randint(1, 2**bits, (groups, outputs), generator=generator)
        scales = (torch.rand(groups, outputs, generator=generator) * 0.1 / 2 ** (bits - 4)).half()
        group_index = torch.randperm(inputs, generator=generator).int() // group_size  # as with desc_act
        packed[f"{layer}.qweight"] = pack(codes, 0, bits)
        packed[f"{layer}.qzeros"] = pack(zeros - 1, 1, bits)  # the format keeps them less one
        packed[f"{layer}.scales"], packed[f"{layer}.g_idx"] = scales, group_index
        packed.setdefault(f"{layer}.bias", torch.zeros(outputs, dtype=torch.float16))
        index = group_index.long()
        plain[name] = (scales[index] * (codes - zeros[index])).T.contiguous()
    return {**packed, **{name: t for name, t in plain.items() if name.endswith("c_attn.bias")}}, plain


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def convert_to(source: Path, out: Path, *more: str) -> Path:
    """python -m tuning.convert, in this process."""
    convert.main([str(source), str(out), *more])
    return out


def change(source: Path, name: str, **values) -> None:
    """Change values of a JSON file; "absent" takes them out."""
    path = source / name
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if value != "absent"}))


def truncate(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@torch.no_grad()
def logits_of(directory, ids, **options):
    """Logits by our loader, float32."""
    return load_model(str(directory), dtype=torch.float32, **options).eval()(input_ids=ids).logits
