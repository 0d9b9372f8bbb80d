"""The scripts as users run them: a whole run, and every mistake as one line with exit code 2."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from tests.conftest import CONVERSATIONS, needs, run_python
from tests.runs import MAX_LENGTH


def flags(checkpoint, data, out, *more):
    return [
        *("--model_name_or_path", checkpoint, "--data_path", data, "--output_dir", out, "--report_to", "none"),
        *("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--model_max_length", MAX_LENGTH),
        *("--learning_rate", 3e-3, "--max_steps", 4, "--lr_scheduler_type", "constant", *more),
    ]


def test_a_run_leaves_a_whole_result(run_script, checkpoints, tmp_path):
    out = tmp_path / "out"
    data = [CONVERSATIONS, CONVERSATIONS]
    words = flags(checkpoints["untied"], data[0], out, "--use_lora", "--lazy_preprocess", "--save_steps", 1)
    words += ["--save_total_limit", 2, "--eval_data_path", data[1], "--eval_strategy", "steps", "--eval_steps", 2]
    code, stdout, stderr = run_script("finetune.py", *words)
    assert code == 0, stderr
    assert "base model: stop token <|im_end|>" in stdout
    assert "--lazy_preprocess: conversations are always tokenised first" in stdout
    assert "56 conversations: 56 trained" in stdout
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json", "run.json", "metrics.jsonl", "manifest.json",
        "loss.png",
        "rows.parquet",
        "checkpoint-3", "checkpoint-4",
    }  # fmt: skip

    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "finished" and run["steps"] == 4 and run["rows_per_step"] == 8
    assert run["data"]["files"][0]["conversations"] == 56 and len(run["data"]["files"][0]["sha256"]) == 64
    assert run["loss"]["last"] < run["loss"]["first"] and run["eval_loss"] > 0 and run["tokens_per_s"] > 0
    assert run["parameters"]["trainable"] < run["parameters"]["total"]
    assert run["settings"]["run"]["gradient_accumulation_steps"] == 2 and run["versions"]["torch"]
    assert run["base_model"]["path"] == str(checkpoints["untied"]) and run["stop_token"]["text"] == "<|im_end|>"

    assert "batches: packed sequences" in stdout and run["layout"]["packed"]

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2, 3, 4]
    assert {m["padding_share"] for m in metrics if "loss" in m} == {0.0}
    assert [m["step"] for m in metrics if "eval_loss" in m] == [2, 4]
    assert sum(m["supervised_tokens"] for m in metrics if "loss" in m) == run["supervised_tokens_trained"]
    saved, last = (load_file(directory / "adapter_model.safetensors") for directory in (out, out / "checkpoint-4"))
    assert all((saved[name] == last[name]).all() for name in saved)

    # The trained data evaluated on is the training loss by another road: plain transformers on the merged model.
    code, stdout, stderr = run_script("merge_lora.py", out, tmp_path / "merged")
    assert code == 0 and "merge verified: max |dlogits|" in stdout and "top-1 100 %" in stdout
    assert _plain_loss(tmp_path / "merged") == pytest.approx(metrics[-1]["eval_loss"], abs=1e-4)
    assert metrics[-1]["eval_perplexity"] == pytest.approx(2.718281828 ** metrics[-1]["eval_loss"], rel=1e-4)

    # Another run into the same directory is refused, then replaces it on request; nothing of the old one stays.
    code, _, stderr = run_script("finetune.py", *flags(checkpoints["untied"], CONVERSATIONS, out))
    assert code == 2 and "holds another run (run.json)" in stderr
    code, *_ = run_script("finetune.py", *flags(checkpoints["untied"], CONVERSATIONS, out, "--overwrite_output_dir"))
    assert code == 0
    assert not (out / "adapter_config.json").exists() and (out / "model.safetensors").exists()
    assert not (out / "checkpoint-3").exists()


def test_a_model_that_cannot_be_packed_is_padded_and_says_so(run_script, tokenizer, tmp_path):
    config = MistralConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attn_temperature_tuning=True, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    code, stdout, stderr = run_script("finetune.py", *flags(tmp_path / "model", CONVERSATIONS, out, "--use_lora"))
    assert code == 0, stderr
    run = json.loads((out / "run.json").read_text())
    reason = run["layout"]["padded_because"]
    assert reason == "it scales attention by the place in the micro-batch"
    assert f"batches: padded sequences; this model cannot pack: {reason}" in stdout
    assert run["layout"]["packed"] is False and run["peak_gib"] > 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < entry["padding_share"] < 1 for entry in metrics if "loss" in entry)


def _plain_loss(directory) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.runs import example_rows

    rows, _ = example_rows(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    total, count = 0.0, 0
    for index in range(len(rows)):
        input_ids, labels = (torch.tensor(values)[None] for values in rows[index][:2])
        with torch.no_grad():
            total += model(input_ids=input_ids, labels=labels, num_items_in_batch=1).loss.item()
        count += int(rows.num_targets[index])
    return total / count


def test_training_goes_on_from_an_adapter_of_the_same_base_only(run_script, checkpoints, tmp_path):
    first = tmp_path / "first"
    words = flags(checkpoints["untied"], CONVERSATIONS, first, "--use_lora", "--lora_r", 4, "--save_steps", 2)
    assert run_script("finetune.py", *words)[0] == 0
    more = ["--use_lora", "--lora_weight_path", first]
    assert run_script("finetune.py", *flags(checkpoints["untied"], CONVERSATIONS, tmp_path / "second", *more))[0] == 0
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if '"loss"' in line
        ]
        for name in ("first", "second")
    ]
    assert losses[1][0] < losses[0][0] and (tmp_path / "second" / "adapter_config.json").exists()
    for adapter in (first, first / "checkpoint-2"):
        more = ["--use_lora", "--lora_weight_path", adapter]
        words = flags(checkpoints["other"], CONVERSATIONS, tmp_path / "third", *more)
        code, _, stderr = run_script("finetune.py", *words)
        assert code == 2 and "was trained on another base model" in stderr and not (tmp_path / "third").exists()


USER, ANSWER = {"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}
BAD_DATA = {
    "empty list": ("[]", "data.json: no rows in it"),
    "invalid JSON": ('[\n{"id" 2}]', "data.json:2:7: invalid JSON"),
    "no list": ('{"conversations": []}', "data.json:1: not a JSON list"),
    "no conversations": ([{"txt": "x"}], "data.json:1: no 'conversations' or 'messages'"),
    "unknown role": (
        [{"conversations": [USER, {"from": "gpt4", "value": "A"}]}],
        "data.json:1: conversations[1].from: 'gpt4' is not a role (user, human, assistant,",
    ),
    "empty assistant turn": (
        [{"conversations": [USER, ANSWER]}, {"conversations": [USER, {"from": "gpt", "value": ""}]}],
        "data.json:1: conversations[1].value: empty assistant turn",
    ),
    "no supervised token": ([{"conversations": [USER]}], "no supervised token in the whole set"),
    "nothing fits": (
        [{"conversations": [USER, {"from": "gpt", "value": "A " * 400}]}],
        "first turn does not fit in 160 tokens (--model_max_length) (",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_is_one_line_and_leaves_nothing(run_script, checkpoints, write_json, tmp_path, content, message):
    out = tmp_path / "out"
    code, _, stderr = run_script("finetune.py", *flags(checkpoints["untied"], write_json(content), out))
    _assert_one_line(code, stderr, message, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data_path": "absent.json"}, "absent.json: no such file"),
        ({"--model_name_or_path": "/nowhere/model"}, "/nowhere/model: no such checkpoint directory"),
        ({"--model_name_or_path": "tests/model"}, "tests/model: no such checkpoint directory"),
        ({"--model_name_or_path": "tests"}, "tests: no tokenizer in this directory"),
        ({"--lora_weight_path": "tests"}, "tests: no adapter_config.json in it"),
        ({"--learning_rat": "1"}, "--learning_rat: unknown setting; did you mean --learning_rate?"),
        ({"--output_dir": "README.md"}, "--output_dir README.md: is a file"),
    ],
)
def test_mistakes_on_the_command_line(run_script, checkpoints, tmp_path, change, message):
    out = tmp_path / "out"
    words = [str(word) for word in flags(checkpoints["untied"], CONVERSATIONS, out, "--use_lora")]
    for flag, value in change.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    code, _, stderr = run_script("finetune.py", *words)
    _assert_one_line(code, stderr, message, out)


def test_directories_that_are_no_run_and_places_that_cannot_be_written(run_script, checkpoints, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for out, message in (
        (tmp_path / "mine", "is not empty (notes.txt) and holds no run"),
        (tmp_path / "mine" / "notes.txt" / "sub", "notes.txt is a file"),
    ):
        for more in ([], ["--overwrite_output_dir"]):
            code, _, stderr = run_script("finetune.py", *flags(checkpoints["untied"], CONVERSATIONS, out, *more))
            assert code == 2 and message in stderr and len(stderr.splitlines()) == 1
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_loss_that_is_no_number_stops_the_run(run_script, checkpoints, tmp_path):
    out = tmp_path / "out"
    words = flags(checkpoints["untied"], CONVERSATIONS, out, "--use_lora", "--learning_rate", "1e30", "--optim", "sgd")
    code, _, stderr = run_script("finetune.py", *words)
    assert (
        code == 1
        and "error: the gradient norm is nan at step 2 (conversations demo-" in stderr
        and len(stderr.splitlines()) == 1
    )
    assert json.loads((out / "run.json").read_text())["status"].startswith("failed: the gradient norm is nan")
    assert not (out / "manifest.json").exists() and not (out / "adapter_config.json").exists()


def test_the_base_model_is_never_the_output(run_script, checkpoints):
    before = {path: path.stat().st_mtime_ns for path in checkpoints["untied"].iterdir()}
    words = flags(checkpoints["untied"], CONVERSATIONS, checkpoints["untied"], "--overwrite_output_dir")
    code, _, stderr = run_script("finetune.py", *words)
    assert code == 2 and "is an input of this run" in stderr
    assert before == {path: path.stat().st_mtime_ns for path in checkpoints["untied"].iterdir()}


def _assert_one_line(code: int, stderr: str, message: str, out: Path) -> None:
    lines = stderr.strip().splitlines()
    assert code == 2 and len(lines) == 1, stderr
    assert lines[0].startswith("error: ") and message in lines[0]
    assert not out.exists()


def test_a_fresh_process_says_nothing_else(checkpoints, tmp_path):
    done = run_python("finetune.py", *flags(checkpoints["untied"], "absent.json", tmp_path / "out"), check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --data_path absent.json: no such file; expected a .json or .jsonl file\n"
    assert done.stdout == ""
    done = run_python("merge_lora.py", tmp_path, tmp_path / "out", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_show_prints_text_with_the_trained_parts_marked(checkpoints, capsys, monkeypatch):
    needs("rich")
    from data_utils.__main__ import main

    monkeypatch.setattr(sys, "argv", ["data_utils", "show", str(CONVERSATIONS), "--model", str(checkpoints["untied"])])
    assert main() == 0
    shown = capsys.readouterr()
    assert shown.out.count("--- demo-") == 3
    assert "«<|im_start|>»assistant\n[[I am Sparrow, a small model" in shown.out and shown.err == ""
    monkeypatch.setattr(sys, "argv", ["data_utils", "show", "absent.json", "--model", str(checkpoints["untied"])])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: absent.json: no such file")


@pytest.mark.dist
def test_two_processes_under_torchrun_leave_one_result(checkpoints, tmp_path):
    out = tmp_path / "out"
    words = flags(checkpoints["untied"], CONVERSATIONS, out, "--use_lora", "--save_steps", 2)
    words += ["--eval_data_path", CONVERSATIONS, "--eval_strategy", "epoch", "--max_steps", 2]
    done = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "finetune.py", *words)
    assert done.stdout.count("the training loss ") == 1
    run = json.loads((out / "run.json").read_text())
    assert run["processes"] == 2 and run["rows_per_step"] == 16 and run["status"] == "finished"
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2] and (out / "checkpoint-2" / "manifest.json").is_file()
