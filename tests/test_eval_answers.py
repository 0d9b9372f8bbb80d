"""--eval_generate: the prompts are those of the data, the measures those of plain transformers, resumed alike."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_utils.conversations import DataOptions
from data_utils.dataset import load_rows
from data_utils.schema import parse_record
from data_utils.sources import Record
from inference.eval_answers import find_questions
from inference.metrics import measure_rouge_l
from tests import runs
from tests.conftest import CONVERSATIONS, tear
from tests.test_chaos import read_metrics, words


def test_questions_are_the_prompts_of_inference(checkpoints):
    rows, template = runs.example_rows(checkpoints["untied"])
    conversations = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))
    questions = find_questions(rows, len(rows))
    assert len(questions) == len(rows) == len(conversations)
    for row, question in zip(conversations, questions, strict=True):
        messages = list(parse_record(Record(row, "x", 0)).messages)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        assert question.prompt == template.encode_prompt(messages[:last])
        assert template.tokenizer.decode(question.expected) == messages[last]["content"] + template.stop
    few = find_questions(rows, 5)
    assert [questions.index(question) for question in few] == [0, 11, 22, 33, 44]


def test_plain_text_asks_nothing(checkpoints, tmp_path, run_script):
    (tmp_path / "text.jsonl").write_text('{"text": "Plain text."}\n')
    _, template = runs.example_rows(checkpoints["untied"])
    rows, _ = load_rows([tmp_path / "text.jsonl"], template, DataOptions())
    assert find_questions(rows, 3) == []


@pytest.mark.slow
def test_measures_of_a_run(forks, checkpoints, tmp_path):
    """The last evaluation is of the result: plain transformers answers as it did, after a resume, too."""
    out = tmp_path / "out"
    command = [*words(checkpoints["untied"], out, "full", steps=6, eval_steps=2), "--eval_generate", 5]
    code, stdout, stderr = forks.run(*command)
    assert code == 0, stderr
    assert stdout.count(" answers: ") == 3
    whole = read_metrics(out)
    (last,) = [line for line in whole if "eval_rouge_l" in line][-1:]
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    rows, _ = runs.example_rows(checkpoints["untied"])
    scores, tokens = [], []
    questions = find_questions(rows, 5)
    for question in questions:
        ids = torch.tensor([question.prompt])
        limit = 2 * max(len(each.expected) for each in questions)
        new = model.generate(input_ids=ids, max_new_tokens=limit, do_sample=False)[0, ids.shape[1] :]
        said, expected = (tokenizer.decode(each, skip_special_tokens=True) for each in (new, question.expected))
        scores.append(measure_rouge_l(said, expected))
        tokens.append(len(new))
    assert last["eval_rouge_l"] == pytest.approx(sum(scores) / 5) and last["step"] == 6
    assert last["eval_answer_tokens"] == sum(tokens) / 5
    tear(out)
    shutil.rmtree(out / "checkpoint-6")
    assert forks.run(*command)[0] == 0 and read_metrics(out) == whole
    code, _, stderr = forks.run(*command, "--fsdp", "full_shard", processes=2)
    assert code == 2 and "--eval_generate: no process holds the full model with --fsdp" in stderr
