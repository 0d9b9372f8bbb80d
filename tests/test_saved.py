"""The saved result, in a fresh process: what was trained is what loads, by peft, by transformers, and merged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_lora
from tests import runs
from tests.conftest import CONVERSATIONS, ROOT, build_model, run_python
from tests.test_cli import flags
from tuning.checkpoint.adapter import load_lora
from tuning.checkpoint.changes import Changes
from tuning.checkpoint.manifest import find_fault
from tuning.checkpoint.output_directory import MANIFEST_FILE
from tuning.checkpoint.result import ResultWriter
from tuning.checkpoint.run_record import RunFacts
from tuning.checkpoint.serving import describe_serving
from tuning.model.loading import identify_checkpoint, load_model
from tuning.model.lora import add_lora
from tuning.model.stop_token import align_stop_token
from tuning.model.training_model import TrainingModel

CASES = [(kind, tied) for kind in ("lora", "tokens", "matrices", "full") for tied in ("untied", "tied")]
PROBE = torch.tensor([[1022, 40, 41, 1023, 5, 1022, 7, 8, 1023, 1021]])


def write_result(checkpoint: Path, kind: str, out: Path, **lora) -> torch.Tensor:
    """Save a randomised result as finetune.py does. Returns: the logits of the model in memory."""
    _, template = runs.example_rows(checkpoint)
    training_model = runs.build(checkpoint, kind, template)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in training_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    causal_lm = training_model.causal_lm
    config = align_stop_token(causal_lm, template.tokenizer, stop_id=template.stop_id, is_base=True)
    base = SimpleNamespace(identity=identify_checkpoint(str(checkpoint)), compute_dtype=torch.float32)
    facts = RunFacts({}, {}, "", {}, None)
    writer = ResultWriter(training_model, template.tokenizer, config, base=base, facts=facts)
    writer.write(out, writer.collect())
    writer.seal(out, step=1)
    with torch.no_grad():
        return training_model.eval().causal_lm(input_ids=PROBE).logits


@pytest.fixture(scope="module")
def results(checkpoints, tmp_path_factory):
    """(kind, tied) -> (output directory, logits in memory, logits by loader in a fresh process)."""
    root = tmp_path_factory.mktemp("saved")
    expected = {}
    for kind, tied in CASES:
        out = root / f"{kind}-{tied}"
        expected[kind, tied] = write_result(checkpoints[tied], kind, out)
        if kind != "full":
            merge_lora.main([str(out), str(root / f"{kind}-{tied}-merged")])
    run_python("-m", "tests.test_saved", root, checkpoints["untied"], checkpoints["tied"])
    return {
        (kind, tied): (root / f"{kind}-{tied}", expected[kind, tied], load_file(root / f"{kind}-{tied}.safetensors"))
        for kind, tied in CASES
    }


def _worker(root: Path, untied: Path, tied: Path) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    for kind, name in CASES:
        out = root / f"{kind}-{name}"
        if kind == "full":
            models = {"transformers": AutoModelForCausalLM.from_pretrained(out)}
        else:
            base = AutoModelForCausalLM.from_pretrained(untied if name == "untied" else tied)
            models = {
                "PeftModel": PeftModel.from_pretrained(base, out),
                "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained(out),
                "merged": AutoModelForCausalLM.from_pretrained(root / f"{kind}-{name}-merged"),
            }
        with torch.no_grad():
            logits = {loader: model.eval()(input_ids=PROBE).logits.contiguous() for loader, model in models.items()}
        save_file(logits, root / f"{kind}-{name}.safetensors")


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_every_loader_gives_the_logits_of_the_trained_model(results, kind, tied):
    _, expected, by_loader = results[kind, tied]
    assert set(by_loader) == ({"transformers"} if kind == "full" else {"PeftModel", "AutoPeftModel", "merged"})
    for loader, logits in by_loader.items():
        assert (logits - expected).abs().max().item() < 1e-5 * max(1, expected.abs().max().item()), loader


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_a_result_is_complete_and_stops_on_the_trained_token(results, checkpoints, kind, tied):
    out, _, _ = results[kind, tied]
    standalone = out if kind == "full" else out.with_name(f"{out.name}-merged")
    for directory in {out, standalone}:
        manifest = json.loads((directory / MANIFEST_FILE).read_text())
        assert set(manifest["files"]) == {p.name for p in directory.iterdir() if p.is_file()} - {MANIFEST_FILE}
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
        generation = json.loads((directory / "generation_config.json").read_text())
        assert generation["eos_token_id"][0] == tokenizer.eos_token_id and len(generation["eos_token_id"]) == 2
        assert all(path.stat().st_mode & 0o044 == 0o044 for path in directory.iterdir()), "others cannot read it"
    state = load_file(standalone / "model.safetensors")
    assert ("lm_head.weight" in state) == (tied == "untied"), "tied matrices stay tied"
    config = json.loads((standalone / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id and config["dtype"] == "float32"
    if kind != "full":
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            checkpoints[tied]
        )


@pytest.mark.parametrize(("kind", "tied"), [case for case in CASES if case[0] != "full"])
def test_training_can_go_on_from_a_saved_adapter(results, checkpoints, kind, tied):
    out, expected, _ = results[kind, tied]
    model = TrainingModel(*load_lora(load_model(str(checkpoints[tied]), dtype=torch.float32), out)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.causal_lm(input_ids=PROBE).logits, expected, atol=1e-5, rtol=1e-5)
    model(PROBE, torch.tensor([3]), torch.tensor([1])).backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert any("token_rows" in n for n in trained) == (kind == "tokens")


def test_a_merge_in_bf16_says_how_far_it_is_off(results, tmp_path, capsys):
    out, _, _ = results["tokens", "untied"]
    merge_lora.main([str(out), str(tmp_path / "merged"), "--dtype", "bf16"])
    printed = capsys.readouterr().out
    assert "merge verified: max |dlogits|" in printed and "(bfloat16)" in printed
    assert load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_a_wrong_merge_is_noticed_and_removed(results, tmp_path, monkeypatch):
    monkeypatch.setattr(Changes, "names", property(lambda changes: {*changes._layers}))  # not the rows
    with pytest.raises(ValueError, match="the merged model differs from the adapter"):
        merge_lora.main([str(results["tokens", "untied"][0]), str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out, tmp: [str(tmp / "absent"), str(tmp / "m")], "absent: no such directory"),
        (lambda out, tmp: [str(tmp), str(tmp / "m")], "no adapter_config.json in it"),
        (lambda out, tmp: [str(out), str(out.parent)], "is an input; choose another directory"),
        (lambda out, tmp: [str(out), str(out), "--overwrite"], "is an input; choose another directory"),
        (lambda out, tmp: [str(out), str(out.parent), "--overwrite"], "is an input; choose another directory"),
        (lambda out, tmp: [str(out), str(CONVERSATIONS.parent)], "exists and is not empty"),
        (
            lambda out, tmp: [str(out), str(CONVERSATIONS.parent), "--overwrite"],
            "is no result of this program, so --overwrite",
        ),
        (lambda out, tmp: [str(out), str(tmp / "m"), "--base", str(tmp)], "no config.json, so no model"),
    ],
)
def test_mistakes_in_a_merge_are_named_and_write_nothing(results, tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        merge_lora.main(make(results["lora", "untied"][0], tmp_path))
    assert not (tmp_path / "m").exists()


def test_another_base_a_changed_file_and_a_run_are_refused(results, checkpoints, tmp_path):
    out, _, _ = results["lora", "untied"]
    with pytest.raises(ValueError, match="was trained on another base model"):
        merge_lora.main([str(out), str(tmp_path / "m"), "--base", str(checkpoints["other"])])
    changed = tmp_path / "changed"
    shutil.copytree(out, changed)
    (changed / "adapter_config.json").write_text((out / "adapter_config.json").read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(ValueError, match=r"adapter_config.json is not the file that was saved"):
        merge_lora.main([str(changed), str(tmp_path / "m")])
    (changed / MANIFEST_FILE).unlink()
    (changed / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no manifest.json, so the run did not finish"):
        merge_lora.main([str(changed), str(tmp_path / "m")])
    full = tmp_path / "full"
    shutil.copytree(results["full", "untied"][0], full)
    (full / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result of this program, so --overwrite does not delete it"):
        merge_lora.main([str(out), str(full), "--overwrite"])
    torn = tmp_path / "torn"
    shutil.copytree(out, torn)
    (torn / MANIFEST_FILE).unlink()
    (torn / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: cannot be read"):
        merge_lora.main([str(torn), str(tmp_path / "m")])
    with pytest.raises(ValueError, match="--max_shard_size 1foo: expected a size"):
        merge_lora.main([str(out), str(tmp_path / "m"), "--max_shard_size", "1foo"])
    assert not (tmp_path / "m").exists()


def test_a_plain_peft_adapter_merges_with_its_bases_tokenizer(checkpoints, tmp_path):
    model = get_peft_model(
        load_model(str(checkpoints["tied"]), dtype=torch.float32), LoraConfig(target_modules=["q_proj"])
    )
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).normal_()
    model.save_pretrained(tmp_path / "adapter")
    merge_lora.main([str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|endoftext|>"


def test_a_template_that_writes_eos_keeps_its_eos(checkpoints):
    _, template = runs.example_rows(checkpoints["untied"])
    tokenizer, model = template.tokenizer, load_model(str(checkpoints["untied"]), dtype=torch.float32)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] +", "message['content'] + eos_token +"
    )
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert "Q<|endoftext|><|im_end|>" in rendered
    config = align_stop_token(model, tokenizer, stop_id=template.stop_id, is_base=True)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False) == rendered
    assert config.eos_token_id == [template.stop_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]


def test_sampling_values_without_sampling_do_not_stop_the_save(checkpoints, tmp_path):
    _, template = runs.example_rows(checkpoints["untied"])
    model = load_model(str(checkpoints["untied"]), dtype=torch.float32)
    model.generation_config.update(do_sample=False, temperature=0.5, top_p=0.8, min_p=0.1, typical_p=0.9)
    config = align_stop_token(model, template.tokenizer, stop_id=template.stop_id, is_base=True)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"][0] == template.stop_id


if __name__ == "__main__":
    _worker(*map(Path, sys.argv[1:]))


@pytest.mark.slow
def test_an_adapter_of_a_hub_model_names_it_and_its_revision(checkpoints, tmp_path):
    """Whoever gets the adapter has no snapshot of ours; and the hub's model may have moved on."""
    commits = {"old": "0" * 39 + "1", "new": "0" * 39 + "2"}
    hub = tmp_path / "hub" / "models--acme--tiny-chat"
    shutil.copytree(checkpoints["untied"], hub / "snapshots" / commits["old"])
    shutil.copytree(checkpoints["other"], hub / "snapshots" / commits["new"])
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commits["old"])
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    run_python("finetune.py", *flags("acme/tiny-chat", CONVERSATIONS, out, "--use_lora"), **environment)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny-chat", commits["old"])
    (hub / "refs" / "main").write_text(commits["new"])
    done = run_python("merge_lora.py", out, merged, **environment)
    assert "merge verified" in done.stdout
    assert torch.equal(load_embedding(merged), load_embedding(checkpoints["untied"]))


def load_embedding(directory):
    return load_file(directory / "model.safetensors")["model.embed_tokens.weight"][:100]  # no control token


def test_a_merge_keeps_named_templates_and_takes_nothing_of_the_run(checkpoints, tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    write_result(checkpoints["untied"], "lora", adapter)
    (adapter / "additional_chat_templates").mkdir()
    (adapter / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    for name in ("trainer_state.json", "training_state.json", "optimizer.pt", "training_args.bin", "metrics.jsonl"):
        (adapter / name).write_text("{}")
    merge_lora.main([str(adapter), str(merged)])
    assert (merged / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert {path.name for path in merged.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "additional_chat_templates", "manifest.json",
    }  # fmt: skip
    assert "additional_chat_templates/tool_use.jinja" in json.loads((merged / "manifest.json").read_text())["files"]
    assert set(AutoTokenizer.from_pretrained(merged).chat_template) == {"default", "tool_use"}


def test_matrices_trained_apart_are_not_said_to_be_tied(checkpoints, tmp_path):
    """Of a tied base, with an adapter that trained both matrices, each its own."""
    base = load_model(str(checkpoints["tied"]), dtype=torch.float32)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(base, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "lora_B" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    merge_lora.main([str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.tensor([[5, 6, 7, 8]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model.eval()(ids).logits, atol=1e-4)


def test_an_adapter_that_changes_nothing_is_merged_with_a_word_about_it(checkpoints, tmp_path, capsys):
    base = load_model(str(checkpoints["tied"]), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    merge_lora.main([str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert "every lora_B is zero, so the adapter changes nothing: it is untrained" in capsys.readouterr().out


def test_a_killed_merge_leaves_no_model_and_can_be_run_again(forks, results, tmp_path):
    out = tmp_path / "merged"
    words = [results["lora", "untied"][0], out]
    for at in (1, 4, 9):
        assert forks.run(*words, module="merge_lora", at=at, do="SIGKILL")[0] == 137
        assert not (out / "config.json").exists()
    code, _, stderr = forks.run("--prompt", "Hi", out, module="chat")
    assert code == 2 and stderr.startswith("error: ")
    code, stdout, stderr = forks.run(*words, module="merge_lora")
    assert code == 0 and "merge verified" in stdout, stderr
    assert find_fault(out) is None and not (out / ".unfinished.tmp").exists()


def test_two_merges_do_not_write_into_one_directory(results, tmp_path):
    out = tmp_path / "merged"
    out.mkdir()
    program = "import sys, pathlib; from tuning.checkpoint.ownership import lock; lock(pathlib.Path(sys.argv[1]))"
    holding = subprocess.Popen(
        [sys.executable, "-c", f"{program}; print('held', flush=True); input()", str(out)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holding.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process is writing there"):
        merge_lora.main([str(results["lora", "untied"][0]), str(out)])
    holding.communicate("\n")
    assert [*out.iterdir()] == []


@pytest.mark.parametrize(
    ("options", "quantized", "expected"),
    [
        ({}, False, ("peft, and servers that load adapters of rank 4", None)),
        ({}, True, ("peft, on the same quantised base", "it was trained on quantised weights")),
        ({"embeddings": "tokens", "token_ids": [1, 2]}, False, ("peft", "it holds vocabulary rows, which")),
        ({"embeddings": "full"}, False, ("peft", "it holds whole matrices, which")),
        ({"use_dora": True}, False, ("peft", "it holds DoRA, which")),
        (None, False, ("transformers and servers", None)),
    ],
)
def test_what_can_be_served_as_it_is(tokenizer, options, quantized, expected):
    model = build_model(tokenizer, tied=False)
    parts = (model,) if options is None else add_lora(model, r=4, alpha=8, dropout=0.0, **options)
    serving = describe_serving(TrainingModel(*parts), quantized=quantized)
    assert serving["as_it_is"] == expected[0]
    found = serving["merge_first"]
    assert (found or "").startswith(expected[1] or "") and bool(expected[1]) == bool(found)
