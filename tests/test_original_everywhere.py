"""Original Qwen checkpoints in every script, and the cache of conversions: killed, damaged, two at once."""

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import chat
import commands.chat
import commands.original
import merge_lora
import quantize
from commands.original import find_loadable
from data_utils.tokenizer import load_tokenizer
from tests.conftest import CONVERSATIONS, needs, run_python
from tests.original_checkpoint import (
    CONFIG,
    change,
    convert_to,
    logits_of,
    packed_state,
    random_state,
    read_all,
    truncate,
    write_original,
)
from tests.test_chaos import ENGINES
from tests.test_cli import flags
from tuning.errors import SettingsError
from tuning.model.loading import load_model


def test_plain_transformers_loads_the_result(golden, tmp_path):
    source, ids, expected = golden
    out = convert_to(source, tmp_path / "out")
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    code = (
        "import sys, torch; from safetensors.torch import load_file, save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): logits = model(input_ids=load_file(sys.argv[2] + '/ids.safetensors')['ids']).logits\n"
        "save_file({'logits': logits}, sys.argv[2] + '/logits.safetensors')\n"
        "print(type(model).__name__, AutoTokenizer.from_pretrained(sys.argv[1]).decode([802]))"
    )
    assert run_python("-c", code, out, tmp_path).stdout.strip() == "Qwen2ForCausalLM <|im_end|>"
    assert (load_file(tmp_path / "logits.safetensors")["logits"] - expected).abs().max() < 1e-4


def test_chat_takes_it_as_it_is(golden, capsys):
    source, ids, expected = golden
    session = commands.chat.Chat(chat.build_parser().parse_args([str(source)]))
    with torch.no_grad():
        assert (session.model(input_ids=ids).logits - expected).abs().max() < 1e-4
    told = capsys.readouterr()
    assert "an original Qwen checkpoint" in told.err and not told.out


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_training_starts_from_the_golden_logits_and_learns(golden, forks, tmp_path, kind):
    """A run at a rate of nearly zero ends where the original is; one at a real rate learns."""
    source, ids, expected = golden
    still, out = tmp_path / "still", tmp_path / "out"
    more = ["--use_lora", "--lora_r", 4, "--lora_dropout", 0] if kind == "lora" else []
    code, stdout, stderr = forks.run(*flags(source, CONVERSATIONS, still, *more, "--learning_rate", 1e-12))
    assert code == 0 and stdout.count("an original Qwen checkpoint") == 1, stderr
    code, stdout, stderr = forks.run(*flags(source, CONVERSATIONS, out, *more))
    assert code == 0, stderr
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert losses[-1] < losses[0]
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["model"]["model_name_or_path"] == run["base_model"]["name"] == str(source)
    if kind == "lora":
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(source)
        session = commands.chat.Chat(chat.build_parser().parse_args([str(out)]))
        with torch.no_grad():
            trained = session.model(input_ids=ids).logits
        for adapter in (still, out):
            merge_lora.main([str(adapter), f"{adapter}-merged"])
        still, out = (Path(f"{each}-merged") for each in (still, out))
        assert (logits_of(out, ids) - trained).abs().max() < 1e-4
    assert (logits_of(still, ids) - expected).abs().max() < 1e-4
    assert (logits_of(out, ids) - expected).abs().max() > 1e-2


def test_an_adapters_base_is_found_again_when_the_cache_is_gone(golden, forks, tmp_path, monkeypatch):
    source, *_ = golden
    shutil.copytree(source, mine := tmp_path / "mine")
    words = flags(mine, CONVERSATIONS, tmp_path / "out", "--use_lora", "--cache_dir", tmp_path / "cache")
    code, _, stderr = forks.run(*words)
    assert code == 0, stderr
    first = next((tmp_path / "cache" / "finetune" / "converted").glob("mine-*/manifest.json")).read_bytes()
    assert first.count(b"sha256") > 3
    shutil.rmtree(tmp_path / "cache")
    code, stdout, _ = forks.run(*words, "--resume_from_checkpoint", "auto")
    assert code == 0 and "this run is finished" in stdout
    shutil.rmtree(tmp_path / "cache")
    merge_lora.main([str(tmp_path / "out"), str(tmp_path / "merged"), "--cache_dir", str(tmp_path / "cache")])
    again = next((tmp_path / "cache" / "finetune" / "converted").glob("mine-*/manifest.json")).read_bytes()
    assert again == first
    # One that was converted by hand is the same base; a moved original is named by --base, another one refused.
    by_hand = convert_to(mine, tmp_path / "by-hand")
    merge_lora.main([str(tmp_path / "out"), str(tmp_path / "merged-2"), "--base", str(by_hand)])
    mine.rename(tmp_path / "moved")
    with pytest.raises(SettingsError, match="name it with --base"):
        merge_lora.main([str(tmp_path / "out"), str(tmp_path / "merged-3")])
    merge_lora.main([str(tmp_path / "out"), str(tmp_path / "merged-3"), "--base", str(tmp_path / "moved")])
    one, *others = (read_all(tmp_path / f"merged{end}") for end in ("", "-2", "-3"))
    assert all(torch.equal(one[name], other[name]) for other in others for name in one)


def test_data_utils_needs_the_vocabulary_only(original, tokenizer, tmp_path):
    source = original(random_state())
    (source / "model.safetensors").unlink()
    done = run_python("-m", "data_utils", "check", CONVERSATIONS, "--model", source)
    assert "targets that end with the stop token: 100 %" in done.stdout
    assert not list(tmp_path.glob("**/converted"))


def test_a_system_message_becomes_the_templates_own(original, tmp_path):
    out = convert_to(original(random_state()), tmp_path / "out")
    written = load_tokenizer(str(out), system_message="Be kind.").apply_chat_template(
        [{"role": "user", "content": "Q"}], tokenize=False
    )
    assert written.startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_rows_beyond_seq_length_are_warned_of(original, forks, tmp_path):
    words = flags(original(random_state()), CONVERSATIONS, tmp_path / "out", "--use_lora", "--dry_run")
    code, stdout, stderr = forks.run(*words)
    assert code == 0, stderr
    assert "was made for 64 tokens (seq_length)" in stdout
    assert "GiB a device at the peak" in stdout
    code, stdout, _ = forks.run(*words, "--model_max_length", 64)
    assert code == 0 and "(seq_length)" not in stdout


@pytest.mark.slow
def test_quantize_takes_it_as_it_is(golden, tmp_path):
    needs("gptqmodel", "optimum")
    source, ids, expected = golden
    words = ["--data", str(CONVERSATIONS), "--bits", "8", "--group_size", "32"]
    quantize.main([str(source), str(tmp_path / "int8"), *words])
    assert (logits_of(tmp_path / "int8", ids) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_convert_once_and_engines_train_alike(original, forks, tmp_path):
    """On rows within and beyond seq_length, between which the rotary embedding switches."""
    source, losses = original(random_state()), []
    for engine in ("ddp", "zero3", "fsdp"):
        out, cache = tmp_path / engine, tmp_path / f"cache-{engine}"
        words = flags(source, CONVERSATIONS, out, "--learning_rate", 1e-3, "--cache_dir", cache, *ENGINES[engine])
        code, stdout, stderr = forks.run(*words, processes=2)
        assert code == 0, stderr
        assert stdout.count("an original Qwen checkpoint; converted once") == 1
        assert "rotary embedding dynamic: a micro-batch with a row beyond 64 tokens" in stdout
        assert len(list((cache / "finetune" / "converted").glob("*/manifest.json"))) == 1
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    for other in losses[1:]:
        assert losses[0] == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_a_hub_name_is_converted_and_recorded(original, tmp_path, monkeypatch):
    """As the hub's cache lies, without the hub."""
    source = original(random_state(), num_shards=2)
    repository = tmp_path / "hub" / "models--Qwen--Qwen-small-Chat"
    shutil.copytree(source, repository / "snapshots" / ("c" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    done = run_python(
        "-c",
        "import sys; from commands.original import _find\nprint(_find('Qwen/Qwen-small-Chat', sys.argv[1]))\n"
        "from data_utils.tokenizer import load_tokenizer\n"
        "print(len(load_tokenizer('Qwen/Qwen-small-Chat', cache_dir=sys.argv[1])))",
        tmp_path / "hub",
        HF_HUB_OFFLINE="1",
    )
    assert f"name='Qwen/Qwen-small-Chat', revision='{'c' * 40}'" in done.stdout
    assert done.stdout.splitlines()[-1] == "1008"


@pytest.mark.slow
def test_q_lora_trains_on_it_and_merges(original, tokenizer, forks, tmp_path):
    needs("gptqmodel", "optimum")
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}
    config = {**CONFIG, "seq_length": 512, "fp32": False, "fp16": True, "quantization_config": quantization}
    packed, plain = packed_state(config, bits=4, group_size=16)
    source, out = original(packed, config=config), tmp_path / "out"
    code, stdout, stderr = forks.run(*flags(source, CONVERSATIONS, out, "--q_lora", "--max_steps", 6))
    assert code == 0, stderr
    assert "its linear layers: GPTQ, 4 bits, groups of 16" in stdout
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert losses[-1] < losses[0]
    merge_lora.main([str(out), str(tmp_path / "merged")])
    assert load_model(str(tmp_path / "merged"), dtype="auto").config.model_type == "qwen2"
    # Onto the unquantised checkpoint, in the original layout as well; here it has the same weights.
    plain_config = {name: value for name, value in config.items() if name != "quantization_config"}
    base = write_original(tmp_path / "plain", tokenizer, plain, config=plain_config)
    merge_lora.main([str(out), str(tmp_path / "onto-base"), "--onto", "base", "--base", str(base)])
    one, other = read_all(tmp_path / "merged"), read_all(tmp_path / "onto-base")
    assert all(torch.allclose(one[name].float(), other[name].float(), atol=1e-3) for name in one)


def test_the_command(original, tmp_path, run_script):
    source, out = original(random_state()), tmp_path / "out"
    code, stdout, stderr = run_script("tuning/convert.py", source, out)
    assert (code, stdout, stderr) == (0, f"converted: {out}\n", "")
    code, _, stderr = run_script("tuning/convert.py", source, out)
    assert code == 2 and stderr.count("\n") == 1 and "use --overwrite" in stderr
    assert run_script("tuning/convert.py", source, out, "--overwrite")[0] == 0
    code, _, stderr = run_script("tuning/convert.py", out, tmp_path / "other")
    assert code == 2 and "is no original Qwen checkpoint" in stderr
    assert run_script("tuning/convert.py", source, source / "inside")[0] == 0
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    assert run_script("tuning/convert.py", source, tmp_path / "theirs", "--overwrite")[0] == 2
    assert (tmp_path / "theirs" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("script", ["finetune.py", "chat.py", "quantize.py", "-m data_utils"])
def test_a_damaged_original_is_one_line_in_every_script(original, tmp_path, run_script, script):
    source = original(random_state())
    if script == "-m data_utils":
        truncate(source / "qwen.tiktoken")
        done = run_python("-m", "data_utils", "check", CONVERSATIONS, "--model", source, check=False)
        code, stderr = done.returncode, done.stderr
    else:
        truncate(source / "model.safetensors")
        words = {
            "finetune.py": flags(source, CONVERSATIONS, tmp_path / "out", "--use_lora"),
            "chat.py": [source, "--prompt", "Hi"],
            "quantize.py": [source, tmp_path / "out", "--data", CONVERSATIONS],
        }[script]
        code, _, stderr = run_script(script, *words)
    told = [line for line in stderr.splitlines() if "converted once" not in line]
    assert code == 2 and len(told) == 1 and "again" in told[0], stderr
    assert not (tmp_path / "out").exists()


# ---- killed, and two at once ----


def fork(function):
    """Call a function in a forked process. Returns: its number."""
    if not (number := os.fork()):
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return number


def convert_killed(source, cache, at):
    """Convert, and die at one of the moments when a file gets its name."""
    replaced, whole = [], Path.replace

    def replace(self, target):
        replaced.append(target)
        if len(replaced) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, target)

    Path.replace = replace
    find_loadable(str(source), str(cache))


@pytest.mark.slow
def test_a_killed_conversion_is_never_taken_as_complete(original, tmp_path):
    source = original(random_state(), num_shards=2)
    expected = find_loadable(str(source), str(tmp_path / "whole"))
    files = {path.name: path.read_bytes() for path in Path(expected).iterdir()}
    for at in range(1, 100):
        cache = tmp_path / f"killed-{at}"
        _, status = os.waitpid(fork(partial(convert_killed, source, cache, at)), 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = Path(find_loadable(str(source), str(cache)))
        assert {path.name: path.read_bytes() for path in found.iterdir()} == files, at
        shutil.rmtree(cache)
    assert at > len(files)


def test_two_at_once_convert_once(original, tmp_path, monkeypatch):
    source, log = original(random_state()), tmp_path / "log"
    write = commands.original.write_conversion

    def slow(*args, **options):
        with open(log, "a") as file:
            file.write("begun\n")
        time.sleep(0.3)
        write(*args, **options)

    monkeypatch.setattr(commands.original, "write_conversion", slow)
    numbers = [fork(partial(find_loadable, str(source), str(tmp_path / "cache"))) for _ in range(3)]
    assert [os.waitpid(number, 0)[1] for number in numbers] == [0, 0, 0]
    assert log.read_text() == "begun\n"


def test_a_damaged_conversion_is_made_again_and_a_changed_original_anew(original, tmp_path):
    source = original(random_state())
    cache = str(tmp_path / "cache")
    first = Path(find_loadable(str(source), cache))
    content = (first / "model.safetensors").read_bytes()
    truncate(first / "model.safetensors")
    assert Path(find_loadable(str(source), cache)) == first and (first / "model.safetensors").read_bytes() == content
    change(source, "generation_config.json", top_p=0.5)
    assert Path(find_loadable(str(source), cache)) != first


def test_a_cache_that_cannot_be_written_to_is_one_line(original, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot keep converted checkpoints here"):
        find_loadable(str(original(random_state())), str(tmp_path / "file"))
    monkeypatch.setattr(commands.original, "default_root", lambda *_: None)
    with pytest.raises(SettingsError, match="no home directory"):
        find_loadable(str(original(random_state())))


def test_other_models_are_left_alone(checkpoints, tmp_path):
    assert find_loadable(str(checkpoints["untied"]), str(tmp_path)) == str(checkpoints["untied"])
    assert find_loadable(str(tmp_path / "absent"), str(tmp_path)) == str(tmp_path / "absent")
    assert not list(tmp_path.iterdir())
