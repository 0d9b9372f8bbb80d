"""What only a GPU shows. Skipped without one; test_attention.py and test_loss.py have the kernels' own tests."""

import json

import pytest
import torch

from benchmarks import bench_memory
from tests.conftest import CONVERSATIONS, ROOT, needs, run_python, tear
from tuning.checkpoint.manifest import find_fault

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture
def words(checkpoints, tmp_path):
    return [
        *(
            "--model_name_or_path",
            checkpoints["untied"],
            "--data_path",
            CONVERSATIONS,
            "--output_dir",
            tmp_path / "out",
        ),
        *("--max_steps", 6, "--save_steps", 3, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3),
        *("--report_to", "none", "--resume_from_checkpoint", "auto"),
    ]


def losses(out):
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_lora_trains_merges_and_the_merge_is_verified(words, tmp_path, precision):
    run_python("finetune.py", *words, "--use_lora", precision)
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    done = run_python("merge_lora.py", tmp_path / "out", tmp_path / "merged")
    assert "merge verified" in done.stdout and find_fault(tmp_path / "out") is None


@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq"])
def test_q_lora_trains_and_merges_onto_what_it_was_trained_on(words, request, tmp_path, kind):
    if kind == "gptq":
        words[words.index("--model_name_or_path") + 1] = request.getfixturevalue("gptq")[4]
    else:
        needs("bitsandbytes")
    run_python("finetune.py", *words, "--q_lora", *(["--bits", 8] if kind == "int8" else []))
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    done = run_python("merge_lora.py", tmp_path / "out", tmp_path / "merged")
    assert "merge verified" in done.stdout and "model it was trained on" in done.stdout
    run_python("chat.py", tmp_path / "out", "--prompt", "Hi", "--max_new_tokens", 8)


def test_a_paged_optimizer_goes_on(words, tmp_path):
    needs("bitsandbytes")
    run_python("finetune.py", *words, "--optim", "paged_adamw_8bit")
    out = tmp_path / "out"
    calm = losses(out)
    tear(out)
    tear(out / "checkpoint-6")
    run_python("finetune.py", *words, "--optim", "paged_adamw_8bit")
    assert losses(out) == pytest.approx(calm, rel=1e-3)


def test_fp16_keeps_its_loss_scale_over_a_resume(words, tmp_path):
    run_python("finetune.py", *words, "--fp16")
    out = tmp_path / "out"
    calm, scaler = losses(out), json.loads((out / "checkpoint-3" / "training_state.json").read_text())["scaler"]
    assert scaler["scale"] > 1
    tear(out)
    tear(out / "checkpoint-6")
    run_python("finetune.py", *words, "--fp16")
    assert losses(out) == pytest.approx(calm, rel=1e-3)


def test_zero2_goes_on_with_the_optimizers_steps_on_the_gpu(words, tmp_path):
    needs("deepspeed")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1, "finetune.py", *words]
    launch += ["--deepspeed", ROOT / "finetune" / "ds_config_zero2.json"]
    run_python(*launch)
    out = tmp_path / "out"
    calm = losses(out)
    tear(out)
    tear(out / "checkpoint-6")
    run_python(*launch)
    assert losses(out) == pytest.approx(calm, rel=1e-3)


@pytest.mark.parametrize("mode", ["LoRA, bf16", "full"])
def test_the_plan_is_within_15_percent_of_allocated_memory(tmp_path, mode):
    model = bench_memory.build_model(tmp_path / "model", bench_memory.SHAPES["512 x 12"])
    data = bench_memory.write_rows(tmp_path / "data.json")
    cell = bench_memory.measure(model, data, bench_memory.MODES[mode], 8, str(tmp_path))
    assert cell["planned_gib"] == pytest.approx(cell["measured_gib"], rel=0.15)
