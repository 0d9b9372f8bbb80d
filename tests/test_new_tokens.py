"""New tokens: read and refused, parsed where they stand, their rows trained, saved, merged and resumed."""

import json
import shutil

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_utils.conversations import DataOptions
from data_utils.dataset import load_rows
from data_utils.new_tokens import add_new_tokens, find_pieces, list_content_tokens, read_new_tokens
from data_utils.render_cache import RowEncoder
from data_utils.rows import encode_row
from data_utils.schema import parse_record
from data_utils.show import as_text
from data_utils.sources import DataError, Record
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from examples.tiny_model import build_tokenizer, read_texts
from inference.generate import decode_answer
from tests.conftest import CONVERSATIONS, build_model, needs
from tuning.errors import SettingsError
from tuning.model.new_tokens import NewTokens, add_rows, append_rows, count_rows, resize_model
from tuning.model.token_rows import is_tied
from tuning.settings.command_line import read_settings
from tuning.settings.other_tools import translate

TOKENS = ["<|tool|>", "<|end_tool|>", "[[语音]]"]
MANY = [*TOKENS, *(f"<|t{number}|>" for number in range(9))]  # more than the checkpoints have spare rows (8)


@pytest.fixture(scope="module")
def make_tokenizer(checkpoints):
    def make(*tokens, template=None):
        tokenizer = load_tokenizer(str(checkpoints["untied"]), new_tokens=tokens)
        if template is not None:
            tokenizer.chat_template = template
        return tokenizer

    return make


# ---- reading ----


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.txt", "<|a|>\n\n<|b|>\r\n"),
        ("t.json", '["<|a|>", "<|b|>"]'),
        ("tokens", '["<|a|>", "<|b|>"]'),
        ("tokens", "\ufeff<|a|>\n<|b|>"),
    ],
)
def test_tokens_from_words_and_files(write_json, name, text):
    assert read_new_tokens(["<|a|>", "<|b|>"]) == ["<|a|>", "<|b|>"]
    assert read_new_tokens([str(write_json(text, name))]) == ["<|a|>", "<|b|>"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.txt"], "none.txt: No such file"),
        (["tests/none"], "tests/none: No such file"),
        (["tests"], "tests: Is a directory"),
        ([" "], "is empty or white space"),
        (["<|a|>", "<|a|>"], "<|a|> stands twice"),
        (["<|a|> "], "begins or ends with white space"),
        (["<a>,<b>"], "holds a comma; write tokens as separate words"),
        (["<\x07>"], "'<\\x07>': holds a control character"),
        (["<\u200b>"], "holds a control character"),
        (["<e\u0301>"], "normal form"),
        (["x" * 101], "longer than 100"),
    ],
)
def test_what_cannot_be_a_token_is_refused(words, message):
    with pytest.raises(DataError) as error:
        read_new_tokens(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("", "invalid JSON"), ("{}", "no"), ('["a', "invalid JSON"), ("[1]", "list")]
)
def test_files_that_hold_none_are_refused(write_json, text, message):
    with pytest.raises(DataError, match=message):
        read_new_tokens([str(write_json(text))])


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<|im_end|>", "is a token of this tokenizer already (1023); leave it out"),
        ("e", "a piece of ordinary words in this vocabulary"),
        ("im_end", "is a part of the token <|im_end|>"),
        ("a<|im_end|>", "holds the token <|im_end|>"),
        ("a<|", "would swallow the beginning of <|endoftext|>"),
        ("<é>", "<é> would be written as '<\ufffd>' by this tokenizer; use ASCII"),
    ],
)
def test_tokens_that_would_break_others_are_refused(make_tokenizer, token, message):
    with pytest.raises(DataError) as error:
        make_tokenizer(token)
    assert message in str(error.value)


def test_settings_that_would_learn_nothing_are_refused(checkpoints, tmp_path):
    words = [
        "--model_name_or_path",
        checkpoints["untied"],
        "--data_path",
        CONVERSATIONS,
        "--output_dir",
        tmp_path / "o",
    ]
    for more, message in (
        (["--use_lora", "--train_embeddings", "off"], "new tokens would never be learnt"),
        (["--use_lora", "--lora_weight_path", "x"], "whose adapter brings its tokens along"),
    ):
        with pytest.raises(SettingsError, match=message):
            read_settings([*map(str, words), "--add_special_tokens", "<|a|>", *more])


# ---- conversations ----

PIECES = st.sampled_from(
    [*TOKENS, "<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<|", "tool", " ", "\n", "é", "中", "Who"]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=8).map("".join).filter(str.strip)


@settings(max_examples=60)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=2), system=st.none() | TEXTS)
def test_new_tokens_are_parsed_in_every_role_and_control_tokens_stay_text(
    make_tokenizer, tmp_path_factory, turns, system
):
    tokenizer = make_tokenizer(*TOKENS)
    template = _template(tokenizer)
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    conversation = parse_record(Record({"messages": messages}, "f:1", 0))
    rows = template.encode_conversation(conversation)
    fast = RowEncoder(template).encode(conversation)
    assert [row.input_ids.tolist() for row in fast] == [encode_row(row).input_ids.tolist() for row in rows]
    ids = [token_id for row in rows for token_id in row.input_ids]
    for token, token_id in zip(TOKENS, tokenizer.convert_tokens_to_ids(TOKENS), strict=True):
        assert ids.count(token_id) == sum(message["content"].count(token) for message in messages)
    assert ids.count(template.stop_id) == len(messages) + (not system), "one a turn, whatever the texts say"
    assert tokenizer.decode(ids).count("<|im_end|>") >= ids.count(template.stop_id)


_TEMPLATES = {}


def _template(tokenizer):
    return _TEMPLATES.setdefault(tuple(list_content_tokens(tokenizer)), ChatTemplate(tokenizer))


def test_the_saved_tokenizer_parses_and_writes_them_alike(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(*TOKENS)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    asked = [{"role": "user", "content": "call <|tool|>x<|end_tool|> <|im_end|>"}]
    ids = ChatTemplate(tokenizer).encode_prompt(asked)
    assert ChatTemplate(loaded).encode_prompt(asked) == ids and list_content_tokens(loaded) == TOKENS
    assert decode_answer(loaded, ids).endswith("user\ncall <|tool|>x<|end_tool|> <|im_end|>\nassistant\n")
    assert AutoTokenizer.from_pretrained(tmp_path)("<|tool|>").input_ids == tokenizer.convert_tokens_to_ids(
        ["<|tool|>"]
    )


def test_show_marks_them(make_tokenizer):
    template = _template(make_tokenizer(*TOKENS))
    messages = [{"role": "user", "content": "a<|tool|>"}, {"role": "assistant", "content": "[[语音]]"}]
    (row,) = template.encode_conversation(parse_record(Record({"messages": messages}, "f:1", 0)))
    needs("rich")
    shown = as_text("0", row, template, colour=False, ids=False)
    assert "a«<|tool|>»" in shown and "[[«[[语音]]»«<|im_end|>»]]" in shown


def test_tokens_that_the_template_writes_follow_its_rules(make_tokenizer):
    custom = (
        "{%- for m in messages %}{{ '<|' + m.role + '|>' if false else '' }}{%- if m.role == 'user' %}{{ '<|u|>' }}"
        "{%- else %}{{ '<|a|>' }}{%- endif %}{{ m.content }}{{ '<|im_end|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|a|>' }}{%- endif %}"
    )
    tokenizer = make_tokenizer("<|u|>", "<|a|>", "<|tool|>", template=custom)
    ids = ChatTemplate(tokenizer).encode_prompt([{"role": "user", "content": "<|a|><|u|><|tool|>"}])
    u, a, tool = tokenizer.convert_tokens_to_ids(["<|u|>", "<|a|>", "<|tool|>"])
    assert [ids.count(each) for each in (u, a, tool)] == [1, 1, 1], "those that delimit turns stay text in a question"


def test_cached_rows_depend_on_which_tokens_are_for_the_text(checkpoints, tmp_path, write_json):
    from data_utils.cache import RowCache

    data = write_json([{"messages": [{"role": "user", "content": "<|tool|>"}, {"role": "assistant", "content": "A"}]}])
    lengths = []
    for tokens in ((), ("<|tool|>",)):
        tokenizer = load_tokenizer(str(checkpoints["untied"]), new_tokens=tokens)
        rows, _ = load_rows([data], ChatTemplate(tokenizer), DataOptions(), cache=RowCache(tmp_path))
        lengths.append(int(rows.lengths[0]))
    assert lengths[1] < lengths[0]


WORDS = st.text(st.sampled_from("<|>/[]_-:toolé语音 A1"), min_size=1, max_size=10)


@settings(max_examples=25)
@given(words=st.lists(WORDS, min_size=1, max_size=4), around=TEXTS)
def test_any_tokens_are_refused_or_parsed_and_leave_control_tokens_alone(checkpoints, words, around):
    try:
        tokens = read_new_tokens(words)
        tokenizer = load_tokenizer(str(checkpoints["untied"]), new_tokens=tokens)
    except DataError as error:
        assert "--add_special_tokens" in str(error) and "\n" not in str(error)
        return
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert ids == list(range(1024, 1024 + len(tokens)))
    template = ChatTemplate(tokenizer)
    plain = _TEMPLATES.get(()) or _template(load_tokenizer(str(checkpoints["untied"])))
    for token, token_id in zip(tokens, ids, strict=True):
        for text in (token, f"{around}{token}", f"{token}{around}", f"{token}<|im_end|>{token}"):
            asked = [{"role": "user", "content": text}]
            found = template.encode_prompt(asked)
            control = template.encoder.control_ids.values()
            expected = [each for each in plain.encode_prompt(asked) if each in control]
            assert [each for each in found if each in control] == expected
            assert tokenizer.decode(found) == plain.tokenizer.decode(plain.encode_prompt(asked))
        assert token_id in template.encode_prompt([{"role": "user", "content": token}])


def test_the_fast_encoder_reads_them_alike(real_tokenizer_path):
    tokenizer = load_tokenizer(str(real_tokenizer_path), new_tokens=TOKENS)
    template = ChatTemplate(tokenizer)
    texts = [
        f"{before}{token}{after}"
        for token in TOKENS
        for before in ("", "Hi ", "\n", "中")
        for after in ("", " x", "\n\n")
    ]
    expected = [template.encoder.encode(template.encoder.escape(text)) for text in texts]
    assert expected == [tokenizer(text).input_ids for text in texts]
    template.encoder._pieces.clear()
    with template.encoder.use_tiktoken():
        assert template.encoder._tiktoken is not None
        assert [template.encoder.encode(template.encoder.escape(text)) for text in texts] == expected


# ---- rows ----


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 1, 200])
def test_rows_begin_as_the_means_of_what_they_replace(tied, spare):
    tokenizer = build_tokenizer(read_texts(), vocabulary_size=1024)
    model = build_model(tokenizer, tied=tied, vocab_size=len(tokenizer) + spare)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pieces = find_pieces(tokenizer, TOKENS)
    assert [tokenizer(token, add_special_tokens=False).input_ids for token in TOKENS] == pieces
    add_new_tokens(tokenizer, TOKENS)
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    assert find_pieces(tokenizer, TOKENS) == pieces and ids == [1024, 1025, 1026]
    add_rows(model, NewTokens(tuple(ids), tuple(map(tuple, pieces))))
    num_rows = 1224 if spare == 200 else 1088
    assert model.config.vocab_size == num_rows and is_tied(model) == tied
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        after, old = model.state_dict()[name], before[name]
        assert after.shape == (num_rows, 32)
        for token_id, replaced in zip(ids, pieces, strict=True):
            mean = torch.zeros(32)
            for piece in replaced:
                mean += old[piece] / len(replaced)
            torch.testing.assert_close(after[token_id], mean)
        kept = [row for row in range(len(old)) if row not in ids]
        assert torch.equal(after[kept], old[kept]) and not after[max(len(old), 1027) :].any()
    model.generate(torch.tensor([[ids[0], 5]]), max_new_tokens=2, do_sample=False)


@given(num_rows=st.integers(1, 500), largest=st.integers(0, 700))
def test_matrices_grow_to_a_multiple_of_64_and_never_shrink(num_rows, largest):
    rows = count_rows(num_rows, largest)
    assert rows >= num_rows and rows > largest and (rows == num_rows or (rows % 64 == 0 and rows - largest <= 64))
    grown = append_rows(torch.ones(num_rows, 2), rows)
    assert grown.shape == (rows, 2) and grown[:num_rows].all() and not grown[num_rows:].any()


def test_a_meta_model_grows_alike(tokenizer):
    with torch.device("meta"):
        model = build_model(tokenizer, tied=False)
    add_rows(model, NewTokens((1100,), ((1, 2),)))
    assert [len(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())] == [1152] * 2
    assert model.lm_head.weight.is_meta and model.lm_head.out_features == 1152


def test_a_second_table_of_tokens_is_refused(tokenizer):
    model = build_model(tokenizer, tied=False)
    model.model.other = torch.nn.Embedding(model.config.vocab_size, 4)
    with pytest.raises(SettingsError, match=r"second table of tokens \(model.other\)"):
        resize_model(model, 2048)


# ---- runs ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The example's conversations, with markers in questions and answers."""
    rows = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))[:16]
    for row in rows:
        for turn in row.get("conversations") or row["messages"]:
            key = "value" if "value" in turn else "content"
            turn[key] = f"<|tool|>{turn[key][:40]}<|end_tool|> [[语音]]"
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


KINDS = {
    "full": [],
    "rows": ["--use_lora", "--lora_r", 4],
    "matrices": ["--use_lora", "--lora_r", 4, "--train_embeddings", "full"],
    "nf4": ["--q_lora", "--lora_r", 4],
}


def command(checkpoint, data, out, kind, *, steps=3, accumulation=2):
    return [
        *("--model_name_or_path", checkpoint, "--data_path", data, "--output_dir", out, *KINDS[kind]),
        *("--max_steps", steps, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", accumulation),
        *("--learning_rate", 3e-3, "--save_strategy", "no", "--lr_scheduler_type", "constant", "--no_cache"),
        *(() if kind == "full" else ("--lora_dropout", 0.0)),
        *("--add_special_tokens", *MANY),
    ]


def train(forks, *words, processes=1):
    code, stdout, stderr = forks.run(*words, processes=processes)
    assert code == 0, stderr[-3000:] + stdout[-2000:]
    return stdout


@torch.no_grad()
def logits(model, tokenizer):
    ids = ChatTemplate(tokenizer).encode_prompt([{"role": "user", "content": "Who [[语音]] <|tool|>x<|end_tool|>"}])
    assert set(tokenizer.convert_tokens_to_ids(TOKENS)) <= set(ids)
    return model.eval()(input_ids=torch.tensor([ids])).logits


def check_result(run_script, checkpoint, out, tmp_path, kind):
    """A result in plain transformers and peft, and merged: the same logits."""
    tokenizer = load_tokenizer(str(out))
    if kind == "full":
        return logits(AutoModelForCausalLM.from_pretrained(out), tokenizer)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    base.resize_token_embeddings(1088)
    expected = logits(PeftModel.from_pretrained(base, out), tokenizer)
    code, stdout, stderr = run_script("merge_lora.py", out, tmp_path / "merged")
    assert code == 0 and "merge verified" in stdout, stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    found = logits(merged, load_tokenizer(str(tmp_path / "merged")))
    if kind != "nf4":  # trained, and merged, on the dequantised weights
        real = len(tokenizer)
        torch.testing.assert_close(found[..., :real], expected[..., :real], atol=1e-4, rtol=0)
    assert merged.config.vocab_size == 1088
    if kind != "matrices":  # there, rows of no token train with the others
        assert not load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"][1040:].any()
    return found


FAST = [("untied", "rows"), ("tied", "full")]
SLOW = [("tied", "rows"), ("untied", "full"), ("untied", "matrices"), ("tied", "matrices"), ("untied", "nf4")]


@pytest.mark.parametrize(("name", "kind"), [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_a_result_is_saved_merged_and_answers(forks, run_script, checkpoints, data, tmp_path, name, kind):
    if kind == "nf4":
        needs("bitsandbytes")
    out = tmp_path / "out"
    stdout = train(forks, *command(checkpoints[name], data, out, kind))
    assert "12 new tokens, from 1024 on; the vocabulary matrices now have 1,088 rows" in stdout
    check_result(run_script, checkpoints[name], out, tmp_path, kind)
    answers = []
    for path in [out] if kind == "full" else [out, tmp_path / "merged"]:
        code, answer, stderr = run_script("chat.py", path, "--prompt", "<|tool|>?", "--max_new_tokens", 4)
        assert code == 0, stderr
        answers.append(answer)
    assert len(set(answers)) == 1
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["data"]["add_special_tokens"] == MANY


def test_a_chat_model_trains_the_new_rows_alone(forks, checkpoints, data, tmp_path):
    """Auto means rows where tokens are new; the control tokens of a chat model stay as they are."""
    chat = tmp_path / "chat"
    shutil.copytree(checkpoints["untied"], chat)
    path = chat / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_format": "chatml"}))
    train(forks, *command(chat, data, tmp_path / "out", "rows", steps=1))
    indices = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["trainable_token_indices"]
    assert indices == {name: list(range(1024, 1036)) for name in ("embed_tokens", "lm_head")}


def read_losses(out):
    return [each["loss"] for line in (out / "metrics.jsonl").open() if "loss" in (each := json.loads(line))]


ENGINES = {
    "ddp": [],
    "zero2": ["--deepspeed", "finetune/ds_config_zero2.json"],
    "zero3": ["--deepspeed", "finetune/ds_config_zero3.json"],
    "fsdp": ["--fsdp", "full_shard"],
}
ARMS = [(engine, kind, "tied") for engine in ENGINES for kind in ("rows", "full", "matrices")]
ARMS += [(engine, kind, "untied") for engine in ("zero3", "fsdp") for kind in ("rows", "matrices")]
ARMS += [("zero2", "nf4", "tied"), ("fsdp", "nf4", "untied")]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("engine", "kind", "name"),
    [pytest.param(*arm, marks=[] if arm == ("ddp", "rows", "tied") else pytest.mark.slow) for arm in ARMS],
)
def test_two_processes_train_as_one(forks, run_script, checkpoints, data, tmp_path, engine, kind, name):
    if kind == "nf4":
        needs("bitsandbytes")
    one, two = tmp_path / "one", tmp_path / "two"
    train(forks, *command(checkpoints[name], data, one, kind))
    words = command(checkpoints[name], data, two, kind, accumulation=1)
    train(forks, *words, *ENGINES[engine], processes=2)
    assert read_losses(two) == pytest.approx(read_losses(one), abs=1e-5)
    assert json.loads((two / "run.json").read_text())["engine"] == engine
    found = [check_result(run_script, checkpoints[name], out, tmp_path / out.name, kind) for out in (one, two)]
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "full"])
def test_a_resumed_run_is_the_same_to_the_bit(forks, checkpoints, data, tmp_path, kind):
    at_once, resumed = tmp_path / "at_once", tmp_path / "resumed"

    def words(out, *more):
        given = command(checkpoints["untied"], data, out, kind, steps=4)
        at = given.index("--save_strategy")
        return [*given[:at], "--save_steps", 2, *given[at + 2 :], *more]

    train(forks, *words(at_once))
    code, _, _ = forks.run(*words(resumed), at=7, do="SIGTERM")
    assert code == 143
    train(forks, *words(resumed, "--resume_from_checkpoint", "auto"))
    (name,) = {path.name for path in at_once.glob("*model.safetensors")}
    assert (at_once / name).read_bytes() == (resumed / name).read_bytes()
    words_of_others = [word if word != TOKENS[0] else "<|other|>" for word in map(str, words(resumed))]
    code, _, stderr = forks.run(*words_of_others, "--resume_from_checkpoint", "auto")
    assert code == 2 and "add_special_tokens" in stderr


@pytest.mark.slow
def test_a_gptq_checkpoint_takes_new_tokens(forks, run_script, gptq, checkpoints, data, tmp_path):
    out = tmp_path / "out"
    train(forks, *command(gptq[4], data, out, "nf4"))
    code, stdout, stderr = run_script("merge_lora.py", out, tmp_path / "merged")
    assert code == 0 and "merge verified" in stdout, stderr
    words = ("--prompt", "<|tool|>?", "--max_new_tokens", 4, "--temperature", 0)
    code, _, stderr = run_script("chat.py", out, *words)
    assert code == 0, stderr
    code, _, stderr = run_script(
        "merge_lora.py", out, tmp_path / "onto", "--onto", "base", "--base", checkpoints["untied"]
    )
    assert code == 0, stderr


def test_an_adapter_with_new_tokens_is_trained_further(forks, checkpoints, data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(forks, *command(checkpoints["untied"], data, first, "rows"))
    words = command(checkpoints["untied"], data, second, "rows")
    words = [*words[: words.index("--lora_dropout")], "--lora_weight_path", first]
    del words[words.index("--lora_r") : words.index("--lora_r") + 2]
    train(forks, *words)
    assert read_losses(second)[0] < read_losses(first)[0]
    states = [load_file(out / "adapter_model.safetensors") for out in (first, second)]
    assert {n: t.shape for n, t in states[0].items()} == {n: t.shape for n, t in states[1].items()}
    assert list_content_tokens(load_tokenizer(str(second))) == MANY


def test_lists_of_other_tools_become_lists_here():
    for name in ("add_special_tokens", "new_special_tokens", "tokens"):
        assert yaml.safe_load(translate({name: "<a>,<b>"}))["add_special_tokens"] == ["<a>", "<b>"]
