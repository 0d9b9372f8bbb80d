"""lm-eval's tasks: local ones of each kind against a slow computation, and what is refused."""

import json
import math
import random

import pytest
import torch

import chat
import merge_lora
from data_utils.template import ChatTemplate
from inference import evaluate
from tests import runs
from tests.conftest import needs, run_python
from tests.test_saved import write_result

needs("lm_eval")
pytestmark = pytest.mark.slow

COMMON = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
SCORE = {"aggregation": "mean", "higher_is_better": True}
CHOICE = {
    **COMMON,
    "task": "choice",
    "dataset_kwargs": {"data_files": {"test": "choice.json"}},
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", **SCORE}, {"metric": "acc_norm", **SCORE}],
}
GENERATION = {
    **COMMON,
    "task": "generation",
    "dataset_kwargs": {"data_files": {"test": "generation.json", "train": "example.json"}},
    "fewshot_split": "train",
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": [], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match", **SCORE}],
}
GROUP = {
    "group": "both",
    "task": ["choice", "twin"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}
WORDS = ["tree", "你好", "sum of", "Licence", "model", "42", "<|im_end|>", "water", "猫"]
EXAMPLE = {"question": "Say a word", "answer": "word"}


def make_questions(seed, num=14):
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(num * 3)]
    return [{"question": texts.pop(), "choices": [texts.pop(), texts.pop()], "answer": n % 2} for n in range(num)]


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    """An adapter, its merge, and tasks; half of the answers that are expected are the merged model's."""
    root = tmp_path_factory.mktemp("lm-eval")
    write_result(checkpoints["untied"], "tokens", root / "adapter")
    merge_lora.main([str(root / "adapter"), str(root / "merged")])
    tasks = root / "tasks"
    tasks.mkdir()
    twin = {**CHOICE, "task": "twin", "dataset_kwargs": {"data_files": {"test": "twin.json"}}}
    for config in (CHOICE, twin, GENERATION, GROUP):
        write_task(tasks, config)
    (tasks / "choice.json").write_text(json.dumps(make_questions(1)))
    (tasks / "twin.json").write_text(json.dumps(make_questions(2, num=5)))
    (tasks / "example.json").write_text(json.dumps([EXAMPLE]))
    return root


def write_task(directory, config):
    name = config.get("task") if isinstance(config.get("task"), str) else config["group"]
    (directory / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML


def ask_chat(models, messages, capsys):
    (models / "asked.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    chat.main([str(models / "merged"), "--prompts", str(models / "asked.jsonl"), "--max_new_tokens", "6"])
    return [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]


def run(models, *words, code=0):
    out = models / "out.json"
    words = [*words, "--task_path", models / "tasks", "--dataset_dir", models / "tasks", "--json", out, "--overwrite"]
    assert evaluate.main([str(word) for word in words]) == code
    return json.loads(out.read_text())["metrics"]


@torch.no_grad()
def choose_slowly(directory, questions, template):
    """Per question: whether the likeliest choice is the right one, and likewise by its likelihood a character."""
    model = runs.load_plain(directory).eval()
    found = []
    for question in questions:
        prompt = template.encode_prompt([{"role": "user", "content": question["question"]}])
        sums = []
        for choice in question["choices"]:
            ids = template.encoder.encode(template.encoder.escape(choice))
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            sums.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum().item())
        a_character = [total / len(choice) for total, choice in zip(sums, question["choices"], strict=True)]
        found.append(
            [max(range(len(each)), key=each.__getitem__) == question["answer"] for each in (sums, a_character)]
        )
    return torch.tensor(found, dtype=torch.float64)


def test_choices_are_those_of_the_likelihood_and_groups_are_paired(models, checkpoints):
    found = run(models, models / "adapter", models / "merged", "--tasks", "choice", "both", "--batch_size", "4")
    template = ChatTemplate(runs.load_tokenizer(str(models / "merged")))
    files = {name: json.loads((models / "tasks" / f"{name}.json").read_text()) for name in ("choice", "twin")}
    paths = {"untied": checkpoints["untied"], "adapter": models / "merged", "merged": models / "merged"}
    slow = {
        name: {file: choose_slowly(path, rows, template) for file, rows in files.items()}
        for name, path in paths.items()
    }
    for name in paths:
        acc, acc_norm = (found[f"choice/{metric}"][name] for metric in ("acc", "acc_norm"))
        assert [acc["value"], acc_norm["value"]] == pytest.approx(slow[name]["choice"].mean(0).tolist())
        assert acc["standard_error"] == pytest.approx(slow[name]["choice"][:, 0].std().item() / math.sqrt(14))
        whole = torch.cat([slow[name]["choice"], slow[name]["twin"]])[:, 0]
        assert found["both/acc"][name]["value"] == pytest.approx(whole.mean().item())
    gains = [slow["merged"][file][:, 0] - slow["untied"][file][:, 0] for file in files]
    assert any(each.any() for each in gains), "the models must differ for this to tell anything"
    difference = found["both/acc"]["merged"]["difference"]
    assert difference["value"] == pytest.approx(torch.cat(gains).mean().item())
    squares = sum(float(((each - each.mean()) ** 2).sum()) for each in gains)
    assert difference["standard_error"] == pytest.approx(math.sqrt(19 / 18 * squares) / 19)


@pytest.mark.parametrize("num_fewshot", [0, 1])
def test_answers_are_chats(models, capsys, num_fewshot):
    texts = [row["question"] for row in make_questions(3, num=6)]
    before = [{"role": "user", "content": EXAMPLE["question"]}, {"role": "assistant", "content": EXAMPLE["answer"]}]
    asked = [[*before * num_fewshot, {"role": "user", "content": text}] for text in texts]
    answers = ask_chat(models, asked, capsys)
    expected = [answer if n % 2 else f"not {answer}" for n, answer in enumerate(answers)]
    rows = [{"question": text, "answer": answer} for text, answer in zip(texts, expected, strict=True)]
    (models / "tasks" / "generation.json").write_text(json.dumps(rows))
    for size in (1, 4):
        words = ["--tasks", "generation", "--num_fewshot", num_fewshot, "--batch_size", size]
        found = run(models, models / "merged", *words)
        assert found["generation/exact_match"]["merged"]["value"] == 0.5
    run(models, models / "merged", *words, "--limit", "1", "--fail_below", "generation/exact_match=0.1", code=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric_list": [{"metric": "./evil"}]}, "./evil: no metric of lm-eval, which would fetch a script"),
        ({"doc_to_text": "{{question.__class__.__mro__}}"}, "cannot be loaded with its data set"),
        ({"dataset_path": "nobody/nothing", "dataset_kwargs": {}}, "cannot be loaded with its data set"),
        ({"test_split": "other"}, "cannot be loaded with its data set"),
        ({"output_type": "other"}, "(of the hub, or in --dataset_dir): Got invalid output_type"),
    ],
)
def test_tasks_that_cannot_be_run_are_one_line(models, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    write_task(tmp_path, {**CHOICE, **change})
    words = [models / "merged", "--tasks", "choice", "--task_path", tmp_path, "--dataset_dir", models / "tasks"]
    with pytest.raises(ValueError) as caught:
        evaluate.main([str(word) for word in words])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_groups_of_the_original_on_data_sets_in_a_directory(models, tmp_path):
    """C-Eval's and GSM8K's own task files, on data sets that lie under the hub's names."""
    lines = [dict(zip("ABCD", row, strict=True)) for row in (("1", "2", "3", "4"), ("一", "二", "三", "四"))]
    law = [{"id": n, "question": f"{WORDS[n]} ", **lines[n % 2], "answer": "ABCD"[n % 4]} for n in range(8)]
    sums = [{"question": "1 + 1?", "answer": "so\n#### 2"}, {"question": "2 + 2?", "answer": "so\n#### 4"}]
    write_data_set(tmp_path / "ceval" / "ceval-exam", "law", val=law, dev=law[:1])
    write_data_set(tmp_path / "openai" / "gsm8k", "main", train=sums, test=sums)
    words = ["--tasks", "ceval-valid_law", "gsm8k", "--dataset_dir", tmp_path, "--num_fewshot", "0", "--limit", "8"]
    out = models / "out.json"
    assert evaluate.main([str(word) for word in (models / "merged", *words, "--json", out, "--overwrite")]) == 0
    found = json.loads(out.read_text())["metrics"]
    assert {"gsm8k/exact_match,strict-match", "gsm8k/exact_match,flexible-extract"} < found.keys()
    questions = [
        {
            "question": "\n".join(
                [row["question"].strip(), *(f"{letter}. {row[letter]}" for letter in "ABCD"), "答案："]
            ),
            "choices": list("ABCD"),
            "answer": "ABCD".index(row["answer"]),
        }
        for row in law
    ]
    template = ChatTemplate(runs.load_tokenizer(str(models / "merged")))
    expected = choose_slowly(models / "merged", questions, template).mean(0)
    assert found["ceval-valid_law/acc"]["merged"]["value"] == pytest.approx(expected[0].item())


def write_data_set(directory, name, **splits):
    """A data set as the hub keeps it: files, and a card that says which of them are what."""
    directory.mkdir(parents=True)
    files = []
    for split, rows in splits.items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append({"split": split, "path": f"{split}.jsonl"})
    card = json.dumps({"configs": [{"config_name": name, "data_files": files}]})
    (directory / "README.md").write_text(f"---\n{card}\n---\n")


def test_bounds_on_metrics_that_a_task_has_not(models):
    with pytest.raises(ValueError, match="no such metric here; there are choice/acc, choice/acc_norm"):
        run(models, models / "merged", "--tasks", "choice", "--fail_below", "choice/f1=1")


def test_the_originals_groups_are_known_and_code_is_not_run(models, tmp_path):
    from inference.lm_eval_tasks import _find_index, _find_unsafe, _import_manager

    names = ["mmlu", "ceval-valid", "cmmlu", "gsm8k", "humaneval"]
    index = _find_index(_import_manager(False), names, None)
    assert [_find_unsafe(index.task_index, name) for name in names] == [None] * 4 + ["humaneval"]
    with pytest.raises(ValueError, match="gsm8kk: no such task in lm-eval; did you mean gsm8k"):
        _find_index(_import_manager(False), ["gsm8kk"], None)
    write_task(tmp_path, {"group": "mine", "task": ["humaneval"]})
    with pytest.raises(ValueError, match="--tasks mine: humaneval runs code that the model writes"):
        evaluate.main([str(models / "merged"), "--tasks", "mine", "--task_path", str(tmp_path)])


def test_the_script_runs_offline_and_code_only_when_allowed(models, tmp_path):
    """In a fresh process from the project's root, where evaluate.py lies beside the library of that name."""
    directory = tmp_path / "tasks"
    directory.mkdir()
    (directory / "own.py").write_text(
        "import evaluate\n\ndef ask(row):\n    assert evaluate.load\n    return row['question']\n"
    )
    text = json.dumps(CHOICE)[:-1].replace('"{{question}}"', "!function own.ask") + "}"
    (directory / "choice.yaml").write_text(text)
    words = ["evaluate.py", models / "merged", "--tasks", "choice", "--task_path", directory]
    words += ["--dataset_dir", models / "tasks"]
    refused = run_python(*words, check=False, HF_HUB_OFFLINE="1")
    assert refused.returncode == 2 and "!function: not a plain value; it may run code" in refused.stderr
    done = run_python(*words, "--allow_code_execution", HF_HUB_OFFLINE="1")
    plain = run(models, models / "merged", "--tasks", "choice")["choice/acc"]["merged"]["value"]
    assert f"choice/acc       {plain:.4f}" in done.stdout, done.stdout
