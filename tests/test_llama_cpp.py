"""Exports as llama.cpp reads them: prompts have the same ids, and greedy answers are the same."""

import json
import random
import subprocess

import pytest
from transformers import AutoConfig, GenerationConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data_utils.tokenizer import load_tokenizer
from examples.tiny_model import build_tokenizer, read_texts
from inference import export
from tests import architectures
from tests.conftest import CONVERSATIONS, ROOT, build_model
from tests.test_ollama_template import ROLES
from tuning.model.other_parts import choose_auto_class

LLAMA_CPP = ROOT / ".venv" / "llama.cpp"
PROGRAMS = LLAMA_CPP / "build" / "bin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PROGRAMS / "llama-tokenize").is_file(), reason="no llama.cpp (make setup-llama-cpp)"),
]
QUESTIONS = ("Who are you?", "你是谁？ 123", "a  b\n\n\tc's éàü 🙂")


def call(program, gguf, *words):
    """Returns: stdout, in bytes: an answer may end within a character."""
    for _ in range(20):
        done = subprocess.run(
            [str(PROGRAMS / program), "-m", str(gguf), *map(str, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        # llama-completion prints answers by a thread that it does not wait for: on a busy machine the end is lost.
        if program != "llama-completion" or b"total time" in done.stderr:
            return done.stdout
    raise AssertionError("llama-completion never finished what it prints")


def call_tokenize(gguf, file):
    return json.loads(call("llama-tokenize", gguf, "-f", file, "--ids", "--log-disable"))


def as_bytes(tokenizer, ids):
    byte = {c: code for code, c in bytes_to_unicode().items()}
    special = tokenizer.added_tokens_decoder
    texts = [(i in special, tokenizer.convert_ids_to_tokens(i)) for i in ids]
    return b"".join(text.encode() if own else bytes(byte[c] for c in text) for own, text in texts)


def save(tokenizer, out, model=None, **changes):
    """A random model with this tokenizer, which stops where its chat template does."""
    model = model or build_model(tokenizer, tied=False, **changes)
    stop_ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=stop_ids[1])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def write(model, out, *words):
    export.main([str(model), str(out), "--to", "gguf", *words])
    return out / f"{model.name}.gguf"


def check_answers(model, gguf):
    """Answers through llama.cpp's own rendering of the template in the file, against transformers'."""
    tokenizer, loader = load_tokenizer(str(model)), choose_auto_class(AutoConfig.from_pretrained(model))
    own = loader.from_pretrained(model).eval()
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        ids = own.generate(**inputs, max_new_tokens=32, do_sample=False)[0, start:]
        # Caches are halves by default there, and a token more or less sure than the next one by 0.001 would show it.
        exact = ["--temp", 0, "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
        words = ["-p", question, "--jinja", "-st", "-n", 32, "--no-display-prompt", "--special"]
        said = call("llama-completion", gguf, *words, *exact)
        said = said.rstrip(b"\n").removesuffix(b" [end of text]").rstrip(b"\n")
        assert said == as_bytes(tokenizer, ids.tolist()).rstrip(b"\n")


def check_ids(model, gguf, tmp_path):
    """Random conversations, rendered here, have the ids there that they have here."""
    tokenizer, generator = load_tokenizer(str(model)), random.Random(0)
    texts = [turn["value"] for row in json.loads(CONVERSATIONS.read_text()) for turn in row["conversations"]]
    texts += [
        *QUESTIONS,
        "  x \n",
        "I'LL don't 3.14159 \r\n\r\n end",
        "日本語とकखग",
        "\t\t{}[]();//",
        "e\u0301a\u0308 ½ ²",
    ]
    prompts = []
    for _ in range(3):
        messages = [{"role": ROLES[i % 2 + 1], "content": generator.choice(texts)} for i in range(21)]
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    prompts.append("".join(texts))
    if tokenizer.backend_tokenizer.normalizer is not None:  # NFC
        prompts = [tokenizer.backend_tokenizer.normalizer.normalize_str(prompt) for prompt in prompts]
    for prompt in prompts:
        (tmp_path / "prompt.txt").write_bytes(prompt.encode())
        found = call_tokenize(gguf, tmp_path / "prompt.txt")
        assert found == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_small_vocabulary(tokenizer, tmp_path, capsys):
    model = save(tokenizer, tmp_path / "small")
    gguf = write(model, tmp_path / "out")
    assert "25 tensors are equal\n" in capsys.readouterr().out
    check_ids(model, gguf, tmp_path)
    check_answers(model, gguf)


def test_the_real_vocabulary(real_tokenizer_path, tmp_path):
    tokenizer = load_tokenizer(str(real_tokenizer_path))
    model = save(tokenizer, tmp_path / "real", hidden_size=64, intermediate_size=128, head_dim=16)
    gguf = write(model, tmp_path / "out")
    check_ids(model, gguf, tmp_path)
    check_answers(model, gguf)
    (tmp_path / "prompt.txt").write_text("e\u0301")  # what the export says of NFC: training had it as one letter
    assert (
        call_tokenize(gguf, tmp_path / "prompt.txt") != tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"]
    )


def test_tokens_that_a_user_added(tokenizer, tmp_path):
    own = build_tokenizer(read_texts(), vocabulary_size=512)
    own.add_special_tokens({"additional_special_tokens": ["<|ping|>"]})
    own.add_tokens(["tell me", "<think>", "</think>"])
    model = save(own, tmp_path / "added")
    gguf = write(model, tmp_path / "out")
    check_ids(model, gguf, tmp_path)
    prompt = "<|im_start|>user\n<|ping|> tell me <think>x</think><|im_end|>\n"
    (tmp_path / "prompt.txt").write_text(prompt)
    assert call_tokenize(gguf, tmp_path / "prompt.txt") == own(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["qwen35", "gpt-2"])
def test_other_pre_tokenizers(tmp_path, name):
    from tokenizers import Regex, pre_tokenizers

    from inference.pre_tokenizer import SPLITS, find_pre_tokenizer

    own = build_tokenizer(read_texts(), vocabulary_size=512)
    split = pre_tokenizers.Split(Regex(SPLITS["qwen35"]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "gpt-2")
    own.backend_tokenizer.pre_tokenizer = (
        byte_level if name == "gpt-2" else pre_tokenizers.Sequence([split, byte_level])
    )
    assert find_pre_tokenizer(own) == name
    model = save(own, tmp_path / "other")
    check_ids(model, write(model, tmp_path / "out"), tmp_path)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_other_dtypes(tokenizer, tmp_path, capsys, dtype):
    model = save(tokenizer, tmp_path / "small", hidden_size=64, head_dim=16)
    gguf = write(model, tmp_path / "out", "--dtype", dtype)
    assert f"25 tensors are equal after rounding to {dtype}" in capsys.readouterr().out
    check_ids(model, gguf, tmp_path)


# llama.cpp wants rotary embeddings of 64 dimensions in these.
HYBRID = dict(hidden_size=128, head_dim=64, linear_key_head_dim=64, linear_value_head_dim=64)


@pytest.mark.parametrize(
    ("name", "changes", "compared"),
    [
        ("Qwen2, Qwen2.5", {}, "27 tensors are equal"),
        ("Qwen3-MoE", {}, "45 tensors are equal"),
        ("Qwen3-VL", {}, "25 tensors are equal"),
        ("Qwen3.5, 3.6 (text)", HYBRID, "21 tensors are equal, 12 but for the order of their rows"),
        ("Llama 2, 3", {}, "17 tensors are equal, 4 but for the order of their rows"),
    ],
)
def test_other_architectures(tokenizer, tmp_path, capsys, name, changes, compared):
    vocabulary = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model = save(tokenizer, tmp_path / "other", architectures.build(name, **vocabulary, **changes))
    gguf = write(model, tmp_path / "out")
    assert f"; {compared}\n" in capsys.readouterr().out
    check_answers(model, gguf)


def test_an_unknown_architecture_is_refused(tokenizer, tmp_path):
    model = save(tokenizer, tmp_path / "small")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["SparrowForCausalLM"]}))
    with pytest.raises(ValueError, match="SparrowForCausalLM") as caught:
        write(model, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
