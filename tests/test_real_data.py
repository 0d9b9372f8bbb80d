"""Real instructions, the real vocabulary: trains, merges, and every loader gives the same logits."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import SHARED, build_model, run_python


@pytest.mark.slow
def test_four_hundred_real_conversations(real_tokenizer_path, tmp_path, capsys):
    sources = [SHARED / "data" / name for name in ("alpaca_en.json", "alpaca_zh.json")]
    if not all(source.is_file() for source in sources):
        pytest.skip("the real data are not beside the project")
    data = [f"{source}#200" for source in sources]
    base, out, merged = tmp_path / "base", tmp_path / "out", tmp_path / "merged"
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizer_path)
    changes = {"vocab_size": 151_936, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    build_model(tokenizer, tied=False, **changes).save_pretrained(base)
    tokenizer.save_pretrained(base)

    trained = run_python(
        *("finetune.py", "--model_name_or_path", base, "--data_path", *data, "--output_dir", out, "--use_lora"),
        *("--train_embeddings", "full"),
        *("--num_train_epochs", 1, "--per_device_train_batch_size", 8, "--model_max_length", 512),
        *("--learning_rate", 3e-3, "--lr_scheduler_type", "cosine", "--logging_steps", 10, "--save_strategy", "no"),
        timeout_s=900,
        OMP_NUM_THREADS="2",
    )
    verified = run_python("merge_lora.py", out, merged)
    loaded = run_python(
        "-c",
        f"""
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
probe = torch.tensor([[151644, 872, 198, 108386, 151645, 198, 151644, 77091, 198]])
base = AutoModelForCausalLM.from_pretrained({str(base)!r})
models = [
    AutoModelForCausalLM.from_pretrained({str(merged)!r}),
    PeftModel.from_pretrained(base, {str(out)!r}),
    AutoPeftModelForCausalLM.from_pretrained({str(out)!r}),
]
logits = [model.eval()(input_ids=probe).logits for model in models]
print("largest logit", logits[0].abs().max().item())
print("difference", max((a - logits[0]).abs().max().item() for a in logits[1:]))
""",
    )
    with capsys.disabled():
        print(f"\n{trained.stdout}{verified.stdout}{loaded.stdout}")
    run = json.loads((out / "run.json").read_text())
    assert run["data"]["conversations"] == 400 and run["loss"]["last"] < run["loss"]["first"] - 2
    largest, difference = (float(line.split()[-1]) for line in loaded.stdout.splitlines()[-2:])
    assert difference < 1e-5 * max(1.0, largest)
    assert torch.isfinite(torch.tensor(run["loss"]["last"]))
