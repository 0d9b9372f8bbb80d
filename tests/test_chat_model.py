"""load(...).chat(...), plain continuation, the quantised cache, and tools in a conversation."""

import json
import re

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    QuantizedCache,
    cache_utils,
)

import chat
import commands.conversation
import merge_lora
from inference import load
from inference.chat_model import choose_cache
from inference.tool_module import call_function, describe_functions, load_functions
from tests.conftest import build_model
from tests.test_saved import write_result
from tests.tool_model import ANSWER, ASKED, CALL, TOOL, write_tool_model
from tuning.errors import SettingsError

QUESTION = [{"role": "user", "content": "Who are you? 你好 <|im_end|>"}]


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("load")
    write_result(checkpoints["untied"], "tokens", root / "adapter")
    merge_lora.main([str(root / "adapter"), str(root / "merged")])
    return root


@pytest.fixture(scope="module")
def caller(tokenizer, tmp_path_factory):
    return write_tool_model(tokenizer, tmp_path_factory.mktemp("load-tools") / "caller")


MODULE = '''
def weather(town: str):
    """
    The weather of a town

    Args:
        town: its name
    """
    assert town == "Zürich"
    return {"sky": "rain"}


def _hidden():
    pass
'''


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_three_lines_of_python_answer_as_the_command_does(models, capsys, kind):
    model = load(str(models / kind))
    reply = model.chat(QUESTION, max_new_tokens=9, temperature=0)
    words = ["--prompt", QUESTION[0]["content"], "--max_new_tokens", "9", "--temperature", "0"]
    chat.main([str(models / kind), *words])
    shown = capsys.readouterr().out.removesuffix("\n").removesuffix("  [cut after 9 tokens]")
    assert reply.text == shown and reply.message == {"role": "assistant", "content": reply.text}
    pieces: list[str] = []
    assert model.chat(QUESTION, max_new_tokens=9, temperature=0, write=pieces.append) == reply
    assert "".join(pieces) == reply.text
    sampled = [model.chat(QUESTION, max_new_tokens=9, temperature=3, seed=s).text for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    model.chat([*QUESTION, reply.message, *QUESTION], max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "--dtype: invalid choice: 'bfloat16'"),
        ({"bits": 3}, "--bits: invalid choice: 3"),
        ({"kv_cache": "small"}, "--kv_cache: invalid choice: 'small'"),
        ({"base": "x"}, "--base x: has no effect"),
        ({"device_map": "auto", "bits": 4}, "a quantised model stays on one device"),
    ],
)
def test_mistakes_of_load(models, options, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        load(str(models / "merged"), **options)
    with pytest.raises(ValueError, match="no such checkpoint directory"):
        load("/nowhere")


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([{"role": "bot", "content": "x"}], {}, "'bot' is not a role"),
        (QUESTION, {"speed": 1}, "speed: not a setting"),
        (QUESTION, {"top_p": 3}, "top_p 3: must be from 0.001 to 1"),
        (QUESTION, {"tools": [TOOL]}, "cannot express tools"),
        (QUESTION, {"template_kwargs": {"x": 1}}, "chat_template_kwargs"),
    ],
)
def test_mistakes_of_chat(models, messages, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(str(models / "merged")).chat(messages, **options)


def test_tools_from_python(caller):
    model = load(str(caller))
    call = model.chat([ASKED], tools=[TOOL])
    assert call.message["tool_calls"] == [{"type": "function", "function": CALL}]
    result = {"role": "tool", "content": '{"sky": "rain"}'}
    assert model.chat([ASKED, call.message, result], tools=[TOOL]).text == ANSWER


# ---- plain continuation ----


def continue_plainly(directory, text, num_tokens, **special):
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([tokenizer(text, **special).input_ids])
    output = model.generate(input_ids=ids, max_new_tokens=num_tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True)


def test_raw_continues_as_plain_transformers_does(models, capsys, tmp_path):
    texts = ["The license says", "你好，", "x"]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    words = [str(models / "merged"), "--raw", "--max_new_tokens", "7"]
    chat.main([*words, "--prompts", str(tmp_path / "texts.txt")])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["answer"] for row in found] == [continue_plainly(models / "merged", text, 7) for text in texts]
    chat.main([*words, "--prompt", texts[0]])
    assert capsys.readouterr().out.startswith(found[0]["answer"])


def test_raw_text_stays_text_and_needs_no_template(tokenizer, tmp_path):
    """A base model of another family: no chat template, no ChatML, a token at the beginning."""
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|endoftext|>", eos_token=None)
    backend = json.loads(plain.backend_tokenizer.to_str())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] == "<|endoftext|>"]
    vocabulary = backend["model"]["vocab"]
    for name in ("<|im_start|>", "<|im_end|>"):
        vocabulary.pop(name, None)
    start = vocabulary.get("<|endoftext|>", backend["added_tokens"][0]["id"])
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [start], "tokens": ["<|endoftext|>"]}},
    }
    build_model(tokenizer, tied=False).save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no chat template"):
        chat.main([str(tmp_path), "--prompt", "x"])
    session = commands.conversation.Continuation(chat.build_parser().parse_args([str(tmp_path), "--raw"]))
    ids = session.encode("a <|endoftext|> b")
    assert ids[0] == start and start not in ids[1:]
    assert session.tokenizer.decode(ids[1:]) == "a <|endoftext|> b"
    assert session.encode("Hello") == AutoTokenizer.from_pretrained(tmp_path)("Hello").input_ids


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--raw", "--system", "x"], "--system: has no effect with --raw"),
        (["--raw", "--tools", "x"], "--tools: has no effect with --raw"),
        (["--prompt", "x", "--tool_module", "x.py"], "--tool_module: only in a conversation"),
        (["--out", "x"], "--out: only with --prompts"),
        (["--prompt", "x", "--batch_size", "4"], "--batch_size: only with --prompts"),
        (["--tools", "/nowhere"], "--tools /nowhere: no such file"),
        (["--prompt", "x", "--tools", "README.md"], "README.md: expected a list of tools as JSON"),
    ],
)
def test_flags_that_would_be_ignored(models, words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        chat.main([str(models / "merged"), *words])


# ---- the quantised cache ----


needs_fp8_cache = pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no 8-bit cache of its own"
)


@needs_fp8_cache
def test_the_quantised_cache(models):
    """A quarter of the memory of fp32 (half of bf16), and logits near the others'."""
    model = load(str(models / "merged"), kv_cache="quantized")
    options = model.choose_options({"max_new_tokens": 40, "temperature": 0})
    ids = torch.tensor([model.template.encode_prompt(QUESTION)])
    found = {}
    for name, each in (("quantized", options), ("full", load(str(models / "merged")).choose_options({}))):
        found[name] = model.model.generate(
            input_ids=ids, **{**each, "max_new_tokens": 40, "do_sample": False, "eos_token_id": None},
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    cache = found["quantized"].past_key_values
    assert isinstance(cache, QuantizedCache)
    layer, full = cache.layers[0], found["full"].past_key_values.layers[0]
    assert layer._quantized_keys[0].nbytes * 4 == full.keys.nbytes
    first, second = (torch.stack(found[name].logits)[:2] for name in ("quantized", "full"))
    assert 0 < (first - second).abs().max() < 0.1 * second.abs().max()
    assert model.chat(QUESTION, max_new_tokens=3).num_tokens == 3


def test_the_quantised_cache_needs_a_transformers_that_has_it(tokenizer, monkeypatch):
    monkeypatch.delattr(cache_utils, "Fp8QuantizedLayer", raising=False)
    with pytest.raises(SettingsError, match=r"--kv_cache quantized: transformers 5\S+ cannot do it .*; pip install -U"):
        choose_cache(build_model(tokenizer, tied=True), "quantized")


@needs_fp8_cache
def test_a_cache_that_cannot_be_quantised_is_refused(tokenizer):
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(SettingsError, match="--kv_cache quantized: not with this model"):
        choose_cache(Gemma3ForCausalLM(config), "quantized")


# ---- tools in a conversation ----


def make_chat(model, *words):
    return commands.conversation.Chat(chat.build_parser().parse_args([str(model), *map(str, words)]))


def test_results_are_typed_or_run_on_request(caller, tmp_path, capsys):
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    (tmp_path / "tools.py").write_text(MODULE, encoding="utf-8")
    asked = []

    def read(answer):
        return lambda question: asked.append(question) or answer

    typed = make_chat(caller)
    assert typed.command(f":tools {tmp_path / 'tools.json'}") == "tools: weather"
    typed.ask(ASKED["content"], read('{"sky": "rain"}'))
    assert asked.pop() == 'weather({"town": "Zürich"}) (type its result): '
    assert [m["role"] for m in typed.history] == ["user", "assistant", "tool", "assistant"]
    assert typed.history[-1]["content"] == ANSWER
    assert 'weather({"town": "Zürich"})' in typed.command(":history")
    run = make_chat(caller, "--tools", tmp_path / "tools.json", "--tool_module", tmp_path / "tools.py")
    run.ask(ASKED["content"], read(""))
    assert asked.pop() == 'weather({"town": "Zürich"}) (Enter runs it; or type a result): '
    assert run.history == typed.history
    run.command(":clear")
    run.ask(ASKED["content"], read("snow"))  # typed, so it was not run
    assert run.history[2] == {"role": "tool", "content": "snow"}

    def leave(_):
        raise EOFError

    run.command(":clear")
    run.ask(ASKED["content"], leave)
    assert run.history == [] and "question forgotten" in capsys.readouterr().out
    assert "no such file" in run.command(":tools /nowhere").lower() and run.tools
    assert run.command(":tools") == "tools: none" and not run.tools


def test_functions_of_a_module_are_tools(tmp_path):
    file = tmp_path / "tools.py"
    file.write_text(MODULE, encoding="utf-8")
    functions = load_functions(str(file))
    assert list(functions) == ["weather"]
    (tool,) = describe_functions(str(file), functions)
    assert tool["function"]["parameters"]["properties"] == {"town": {"type": "string", "description": "its name"}}
    assert call_function(functions["weather"], {"town": "Zürich"}) == '{"sky": "rain"}'
    assert call_function(functions["weather"], {"city": "x"}).startswith("error: TypeError: ")
    for text, message in (
        ("def f(x): return x", "f: .*docstring"),
        ("1/0", "ZeroDivisionError"),
        ("x = 1", "no functions in it"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError, match=message):
            describe_functions(str(file), load_functions(str(file)))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_and_dtypes(models, bits):
    kinds = {type(module).__name__ for module in load(str(models / "adapter"), bits=bits).model.modules()}
    assert {4: "FourBitLinear", 8: "Int8Linear"}[bits] in kinds
    loaded = load(str(models / "merged"), dtype="bf16", device_map="auto")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    loaded.chat(QUESTION, max_new_tokens=2)
