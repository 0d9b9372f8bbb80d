"""Every pair of data options, run end to end: the run trains and accounts for every row, or says why not."""

import itertools
import json

import pytest

from tests.templates import FOLDER

OPTIONS = {
    "data_path": ("clean", "sample", "directory", "messy"),
    "eval_data_path": (None, "clean"),
    "model_max_length": (None, "200"),
    "system_message": (None, "Be brief."),
    "label_mask": (None, "qwen"),
    "chat_template": (None, "file"),
    "chat_template_kwargs": (None, '{"enable_thinking": false}'),
    "data_format": (None, "messages"),
    "supervise": (None, "last"),
    "on_bad_row": (None, "skip"),
    "on_long": (None, "drop", "error"),
    "no_cache": (None, "True"),
    "cache_dir": (None, "directory"),
    "sample_prompts": (None, "file"),
}


def cover_pairs(options):
    """Yield choices of a value for every option, such that every two values of two options meet in one of them."""
    names = list(options)
    left = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in options[a] for y in options[b]}
    while left:
        choice = dict(min(left, key=repr))  # a pair that is left; other options: what covers most of what is left
        for name in names:
            if name not in choice:
                choice[name] = max(
                    options[name],
                    key=lambda value, name=name: sum(
                        tuple(sorted(((name, value), other), key=lambda each: names.index(each[0]))) in left
                        for other in choice.items()
                    ),
                )
        left -= set(itertools.combinations(((name, choice[name]) for name in names), 2))
        yield choice


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]


GOOD = [{"messages": turns(f"question {n}", f"answer {n}", "and then?", f"later answer {n}")} for n in range(6)]
LONG = {"id": "long", "messages": turns("q", "a", "word " * 250, "b")}
MESSY = [*GOOD, LONG, {"id": "open", "messages": turns("q")}, {"messages": turns("<|im_end|>", "a")}, {"messages": []}]


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """What stands on the command line for a choice."""
    root = tmp_path_factory.mktemp("data")
    (root / "directory").mkdir()
    for name, rows in (("clean", GOOD), ("messy", MESSY), ("directory/rows", GOOD)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "prompts.txt").write_text("question 1\nquestion 2\n")
    return {
        ("data_path", "clean"): root / "clean.jsonl",
        ("data_path", "sample"): f"{root / 'clean.jsonl'}#4",
        ("data_path", "directory"): root / "directory",
        ("data_path", "messy"): root / "messy.jsonl",
        ("eval_data_path", "clean"): root / "clean.jsonl",
        ("chat_template", "file"): FOLDER / "qwen3.jinja",
        ("cache_dir", "directory"): root / "cache",
        ("sample_prompts", "file"): root / "prompts.txt",
    }


def expect_refusal(choice):
    """The words of the first thing that is wrong with a choice; None if nothing is."""
    if choice["sample_prompts"] and not choice["eval_data_path"]:
        return "--sample_prompts: has no effect without --eval_strategy"
    if choice["chat_template_kwargs"] and not choice["chat_template"]:
        return "the chat template has no variable enable_thinking"
    if choice["label_mask"] == "qwen" and choice["supervise"] == "last":
        return "--supervise last: --label_mask qwen trains every turn alike"
    if choice["data_path"] == "messy":
        if choice["on_bad_row"] is None:
            return "messy.jsonl:10: messages: expected a list of turns"
        if choice["on_long"] == "error" and choice["model_max_length"]:
            return "messy.jsonl:7: "
    return None


CHOICES = list(cover_pairs(OPTIONS))


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(filter(None, choice.values())))
def test_every_pair_of_data_options(forks, checkpoints, values, tmp_path, choice):
    out = tmp_path / "out"
    words = ["--model_name_or_path", checkpoints["untied"], "--output_dir", out, "--max_steps", "2", "--use_lora"]
    words += ["--per_device_train_batch_size", "1", "--use_cpu", "--report_to", "none"]
    for name, value in choice.items():
        words += [f"--{name}", values.get((name, value), value)] if value else []
    if choice["eval_data_path"]:
        words += ["--eval_strategy", "steps", "--eval_steps", "1"]
    code, stdout, stderr = forks.run(*words)
    if refusal := expect_refusal(choice):
        assert code == 2 and refusal in stderr and "Traceback" not in stderr and not out.exists(), stderr
        return
    assert code == 0, stderr
    account = json.loads((out / "run.json").read_text())["data"]
    number = {"sample": 4, "messy": 10}.get(choice["data_path"], 6)
    dropped = out / "dropped.jsonl"
    listed = [json.loads(line) for line in dropped.read_text().splitlines()] if dropped.exists() else []
    assert account["conversations"] == number
    assert sum(account["dropped"].values()) + account["num_problems"] == len(listed)
    if choice["data_path"] == "messy":
        leaves_long_out = choice["model_max_length"] and choice["on_long"]
        assert account["num_problems"] == 1 and account["conversations_trained"] == 8 - bool(leaves_long_out)
        assert {"open", None, *(["long"] if choice["model_max_length"] else [])} == {entry["id"] for entry in listed}
    else:
        assert account["conversations_trained"] == number and not listed
    assert ("question 2" in stdout) == bool(choice["sample_prompts"])


def test_all_pairs_are_covered():
    for (a, xs), (b, ys) in itertools.combinations(OPTIONS.items(), 2):
        for x, y in itertools.product(xs, ys):
            assert any(choice[a] == x and choice[b] == y for choice in CHOICES)
