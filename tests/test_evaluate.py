"""evaluate.py: the loss is training's, answers are chat.py's, columns are what they say, bounds and mistakes exit."""

import json
import math

import numpy as np
import pytest
import torch

import chat
import merge_lora
from commands.loading import load_answering
from data_utils.template import ChatTemplate
from inference import evaluate
from inference.held_out import HeldOut, measure_losses
from inference.metrics import DATA_METRICS
from tests import runs
from tests.conftest import CONVERSATIONS, build_model, needs
from tests.test_cli import flags
from tests.test_saved import write_result
from tests.tool_model import ANSWER, ASKED, CALL, CALLED, RESULT, TOOL, write_tool_model

ROWS = [
    {"messages": [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello 你好"}]},
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "A long one. " * 6},
            {"role": "assistant", "content": "Said.", "weight": 0.5},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "And more of it."},
        ]
    },
    {"conversations": [{"from": "user", "value": "你好"}, {"from": "assistant", "value": "您好"}]},
    {"instruction": "Say", "input": "it", "output": "it"},
    {"text": "Plain text without turns."},
]


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    write_result(checkpoints["untied"], "tokens", root / "adapter")
    merge_lora.main([str(root / "adapter"), str(root / "merged")])
    (root / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    return root


def run(models, *words, data="rows.jsonl", tokens=6, code=0):
    """Evaluate. Returns: the JSON file."""
    needs("rich")
    out = models / "out.json"
    words = [*words, "--data", models / data, "--max_new_tokens", tokens, "--json", out, "--overwrite"]
    assert evaluate.main([str(word) for word in words]) == code
    return json.loads(out.read_text())


def column(report, name):
    """Values of a model, and what it said to each conversation."""
    answers = [row["answers"][name] for row in report["conversations"] if "answers" in row]
    losses = [row["loss"][name] for row in report["conversations"]]
    return {metric: found[name]["value"] for metric, found in report["metrics"].items()}, losses, answers


def assert_same(first, second):
    (values, losses, answers), (other_values, other_losses, other_answers) = first, second
    assert values == pytest.approx(other_values, rel=1e-5) and losses == pytest.approx(other_losses, abs=1e-5)
    assert answers == other_answers


@pytest.fixture(scope="module")
def report(models):
    return run(models, models / "adapter", models / "merged")


def test_an_adapter_brings_its_base_and_equals_its_merge(models, report, checkpoints):
    assert report["order"] == ["untied", "adapter", "merged"]
    assert_same(column(report, "adapter"), column(report, "merged"))
    assert column(report, "untied")[1] != pytest.approx(column(report, "adapter")[1], abs=0.01)
    assert [row["source"] for row in report["conversations"]] == [
        f"{models / 'rows.jsonl'}:{line}" for line in range(1, 6)
    ]
    apart = run(models, checkpoints["untied"], models / "adapter")
    assert apart["order"] == ["untied", "adapter"], "a base that is named is not shown twice"
    for name in apart["order"]:
        assert_same(column(apart, name), column(report, name))
    loss = report["metrics"]["loss"]
    difference = loss["adapter"]["difference"]
    assert difference["value"] == pytest.approx(loss["adapter"]["value"] - loss["untied"]["value"])
    assert 0 < difference["standard_error"] < math.inf and "difference" not in loss["untied"]


def test_batches_change_nothing_and_the_table_is_whole(models, report, capsys):
    alone = run(models, models / "adapter", models / "merged", "--batch_size", "1")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["untied", "adapter", "difference", "merged", "difference"] in lines
    assert all(line.count("±") == 5 for line in lines if line[0] in DATA_METRICS)
    assert [line[0] for line in lines if line[0] in DATA_METRICS] == list(alone["metrics"])
    for name in report["order"]:
        assert_same(column(alone, name), column(report, name))


def test_answers_are_chats(models, report, capsys):
    chat.main([str(models / "merged"), "--prompts", str(write_conversations(models)), "--max_new_tokens", "6"])
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    _, _, answers = column(report, "merged")
    assert [(row["answer"], row["ended_by"]) for row in said] == [
        (answer["message"]["content"], answer["ended_by"]) for answer in answers
    ]


def write_conversations(models):
    path = models / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS if "text" not in row))
    return path


def test_losses_are_those_of_plain_transformers(models, checkpoints):
    args = evaluate.build_parser().parse_args([str(models / "adapter"), "--data", "x"])
    args.model, args.base = str(models / "adapter"), None
    loaded = load_answering(args)
    rows, _ = runs.example_rows(checkpoints["untied"])
    chosen = rows.select(np.arange(0, len(rows), 5))
    merged, plain = (runs.load_plain(path).eval() for path in (models / "merged", checkpoints["untied"]))
    adapted = measure_losses(loaded.model, chosen, batch_size=4)
    with loaded.kept.without_adapter():
        base = measure_losses(loaded.model, chosen, batch_size=4)
    for index in range(len(chosen)):
        ids, labels, _ = chosen[index]
        inputs = {"input_ids": torch.tensor(ids)[None], "labels": torch.tensor(labels)[None]}
        for model, found in ((merged, adapted), (plain, base)):
            with torch.no_grad():
                expected = model(**inputs, num_items_in_batch=1).loss.item()
            assert found[index] == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_that_of_training(models, checkpoints, run_script, tmp_path):
    out, asked = tmp_path / "out", write_conversations(models)
    words = flags(checkpoints["tied"], CONVERSATIONS, out, "--use_lora", "--eval_data_path", asked)
    code, _, stderr = run_script("finetune.py", *words, "--eval_strategy", "steps", "--eval_steps", 4)
    assert code == 0, stderr
    trained = json.loads((out / "run.json").read_text())["eval_loss"]
    found = run(models, out, "--model_max_length", runs.MAX_LENGTH, tokens=1, data=asked.name)
    assert found["metrics"]["loss"]["out"]["value"] == pytest.approx(trained, rel=1e-5)
    assert found["metrics"]["perplexity"]["out"]["value"] == pytest.approx(math.exp(trained), rel=1e-5)


@pytest.mark.slow
def test_calls_of_tools(tokenizer, tmp_path):
    model = write_tool_model(tokenizer, tmp_path / "caller")
    other = {**CALLED, "tool_calls": [{"type": "function", "function": {**CALL, "arguments": {"town": "Bern"}}}]}
    said = {"role": "assistant", "content": ANSWER}
    rows = [
        {"messages": [ASKED, CALLED], "tools": [TOOL]},
        {"messages": [ASKED, other], "tools": [TOOL]},
        {"messages": [ASKED, CALLED, RESULT, said], "tools": [TOOL]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    values, _, answers = column(run(tmp_path, model, tokens=64), "caller")
    assert [answer["exact_match"] for answer in answers] == [True, False, True]
    assert values["tool_call_f1"] == 0.5 and values["stopped"] == 1.0


def test_bounds_are_held_against_the_last_model(models, capsys):
    words = ["--fail_below", "exact_match=0.5", "stopped=0", "--fail_above", "loss=0.1", "answer_tokens=9"]
    run(models, models / "merged", *words, code=1)
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    assert failed[0] == "failed: exact_match of merged is 0.0000, below 0.5"
    assert failed[1].startswith("failed: loss of merged is ") and failed[1].endswith(", above 0.1")


def test_the_table_and_the_worst_are_shown_and_written(models, capsys):
    (models / "odd.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "\x1b[2J|<b>"}, {"role": "assistant", "content": "a\nb"}]})
    )
    run(models, models / "merged", "--markdown", models / "out.md", "--worst", "2", data="odd.jsonl")
    shown, written = capsys.readouterr().out, (models / "out.md").read_text()
    for text in (shown, written):
        assert "\x1b" not in text and "> \\u001b[2J|<b>" in text and "expected: a\\nb" in text
        assert f"{models / 'odd.jsonl'}:1: loss merged " in text
    lines = written.splitlines()
    assert lines[:2] == ["|  | merged |", "| --- | ---: |"] and lines[2].startswith("| loss | ")
    assert all(line.startswith("    ") for line in lines[lines.index("") + 1 :])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name --data FILE, --tasks NAME, or both"),
        (["--data", "absent.json"], "absent.json: no such file"),
        (["--data", CONVERSATIONS, "--limit", "3"], "--limit: has no effect without --tasks"),
        (["--tasks", "mmlu", "--worst", "3"], "--worst: has no effect without --data"),
        (["--data", CONVERSATIONS, "--max_new_tokens", "0"], "--max_new_tokens 0: must be at least 1"),
        (["--tasks", "mmlu", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--tasks", "humaneval"], "runs code that the model writes; --allow_code_execution lets it"),
        (["--tasks", "mmlu", "--kv_cache", "quantized"], "--kv_cache quantized: not with --tasks"),
        (["--tasks", "mmlu", "--dataset_dir", "absent"], "--dataset_dir absent: no such directory"),
        (["--data", CONVERSATIONS, "--json", "absent/x.json"], "its directory is not there"),
        (["--data", CONVERSATIONS, "--markdown", "README.md"], "--markdown README.md: is there; name another file"),
        (["--data", CONVERSATIONS, "--json", "x", "--markdown", "./x"], "--json, --markdown ./x: name two files"),
        (["--data", CONVERSATIONS, "--fail_below", "loss=1"], "lower is better; use --fail_above"),
        (["--data", CONVERSATIONS, "--fail_above", "stopped=1"], "more is better; use --fail_below"),
        (["--data", CONVERSATIONS, "--fail_below", "accuracy=1"], "no metric (loss, perplexity, "),
        (["--data", CONVERSATIONS, "--fail_below", "exact_match"], "expected METRIC=NUMBER"),
        (["--data", CONVERSATIONS, "--fail_below", "exact_match=nan"], "expected METRIC=NUMBER"),
        (["--data", CONVERSATIONS, "--fail_below", "mmlu/acc=1"], "mmlu is not among --tasks"),
        (["--tasks", "mmlu", "--fail_below", "stopped=1"], "stopped needs --data"),
        (["--data", CONVERSATIONS, "--base", "x"], "--base x: has no effect, as no adapter is named"),
    ],
)
def test_mistakes_are_named(models, words, message):
    assert_refused(models, words, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", CONVERSATIONS, "--fail_below", "tool_call_f1=1"], "no such metric here; there are answer_tokens, "),
        (["--data", CONVERSATIONS, CONVERSATIONS, "--worst", "0"], "is read twice; name each file once"),
    ],
)
def test_mistakes_that_the_data_show_are_named(models, words, message):
    needs("rich")
    assert_refused(models, words, message)


def assert_refused(models, words, message):
    with pytest.raises(ValueError) as caught:
        evaluate.main([str(models / "merged"), *map(str, words)])
    assert message in str(caught.value)


def test_models_that_cannot_be_compared_are_refused(models, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="named twice"):
        evaluate.main([str(models / "merged"), str(models / "merged"), "--data", str(CONVERSATIONS)])
    from examples.tiny_model import build_tokenizer, read_texts

    other = build_tokenizer(read_texts(), vocabulary_size=900)
    build_model(other, tied=False).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: its token \d+ is .*different vocabularies"):
        run(models, tmp_path / "other", models / "merged")
    small = build_model(tokenizer, tied=False, vocab_size=600, eos_token_id=5, pad_token_id=5)
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="small: has 600 vocabulary rows, and the prompts have token"):
        run(models, tmp_path / "small", models / "merged")


def test_all_are_asked_by_the_template_of_the_last(models, checkpoints, monkeypatch):
    seen = []
    measure = HeldOut.measure
    monkeypatch.setattr(
        HeldOut, "measure", lambda self, chat, **k: seen.append((self, chat)) or measure(self, chat, **k)
    )
    run(models, checkpoints["untied"], models / "adapter", tokens=1)
    (held_out, base), (same, adapted) = seen
    assert held_out is same and base.tokenizer is adapted.tokenizer
    assert base.model.generation_config.eos_token_id == adapted.model.generation_config.eos_token_id
    template = ChatTemplate(adapted.tokenizer)
    assert template.stop_id in adapted.model.generation_config.eos_token_id
    assert held_out.questions[0].prompt == template.encode_prompt(ROWS[0]["messages"][:1])
