"""The plan: what is known before weights load, held against what a run then measures."""

import json
from types import SimpleNamespace

import pytest
import torch

from data_utils.steps import StepDataset
from tests import runs
from tests.conftest import CONVERSATIONS, ROOT, build_model
from tests.test_lora import moe_model
from tuning.errors import SettingsError
from tuning.model.attention import NAME
from tuning.model.lora import add_lora
from tuning.model.training_model import TrainingModel, enable_gradient_checkpointing
from tuning.planning.memory import Memory, MicroBatchShape, _empty_grouped_product, estimate_memory, simulate_step
from tuning.planning.plan import MEASURED_DEVICES, Plan, check_plan
from tuning.planning.survey import Survey

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def meta(tokenizer, kind, **changes):
    with torch.device("meta"):
        model = build_model(tokenizer, tied=False, **{**WIDE, **changes})
    training_model = TrainingModel(model if kind == "full" else add_lora(model, r=4, alpha=8, dropout=0)[0])
    training_model.causal_lm.set_attn_implementation(NAME)
    return training_model


SHAPE = MicroBatchShape((64, 64, 64, 64), 100, packed=True)
OPTIONS = {"engine": "single", "num_processes": 1, "optimizer": "adamw_torch", "device_type": "cpu"}
COMMON = {"dtype": torch.float32, "process_bytes": 0, "accumulates": True}


def estimate(model, shape=SHAPE, **changes):
    return estimate_memory(model, shape, **{**OPTIONS, **COMMON, **changes})


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_parts_are_what_they_are_by_hand(tokenizer, kind):
    model = meta(tokenizer, kind)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = estimate(model)
    assert memory.weights == 4 * sum(p.numel() for p in model.parameters())
    assert memory.gradients == 4 * trained and memory.optimizer == 8 * trained and memory.gathered == 0
    assert memory.total == sum(memory.parts.values())
    assert memory.allocator == pytest.approx(0.12 * (memory.total - memory.allocator), rel=0.01)
    assert all(p.is_meta for p in model.parameters()), "the model is left as it was"


def test_what_a_forward_keeps_is_what_it_really_keeps(tokenizer):
    """Without storage and with it: the same bytes saved for backward."""
    real = TrainingModel(build_model(tokenizer, tied=False, **WIDE))
    real.causal_lm.set_attn_implementation(NAME)
    saved = {}

    def note(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    starts = torch.tensor([0, 64, 128, 192, 256], dtype=torch.int32)
    positions = torch.arange(64).repeat(4)[None]
    ids = torch.randint(10, 900, (1, 256))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = real(ids, torch.arange(100), ids[0, :100], None, positions, [64] * 4, starts)
    assert kept.requires_grad
    simulated = simulate_step(meta(tokenizer, "full"), SHAPE, dtype=torch.float32, casts_weights=True, accumulates=True)
    assert sum(saved.values()) < simulated < 3 * sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora", [False, True])
def test_a_mixture_of_experts_is_planned_in_every_dtype(dtype, lora, capfd):
    model = moe_model()
    adapted = add_lora(model, r=2, alpha=4, dropout=0, target_modules=["q_proj"]) if lora else (model,)
    options = dict(dtype=dtype, casts_weights=False, accumulates=True)
    small, large = (
        simulate_step(TrainingModel(*adapted), MicroBatchShape((tokens,), 8, packed=True), **options)
        for tokens in (64, 256)
    )
    assert 0 < 2 * small < large
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("shapes", [((24, 16), (3, 16, 8)), ((16, 24), (24, 8)), ((3, 24, 16), (16, 24))])
def test_a_grouped_product_without_values_has_the_shape_of_a_real_one(shapes):
    a, b = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    offsets = torch.tensor([8, 16, 24], dtype=torch.int32)
    assert _empty_grouped_product(a, b, offsets).shape == torch._grouped_mm(a, b, offs=offsets).shape


def test_memory_follows_what_it_should(tokenizer):
    small = estimate(meta(tokenizer, "full"))
    large = estimate(meta(tokenizer, "full"), MicroBatchShape((64,) * 8, 200, packed=True))
    assert 1.6 < large.activations / small.activations < 2.1
    deep = {"num_hidden_layers": 8}
    kept = estimate(meta(tokenizer, "full", **deep))
    lean_model = meta(tokenizer, "full", **deep)
    enable_gradient_checkpointing(lean_model.causal_lm)
    assert estimate(lean_model).activations < 0.6 * kept.activations
    padded = meta(tokenizer, "full")
    padded.causal_lm.set_attn_implementation("sdpa")
    one_long = MicroBatchShape((256, 4, 4, 4), 100, packed=False)
    assert estimate(padded, one_long).activations > 3 * small.activations


def test_engines_divide_what_they_divide(tokenizer):
    model = meta(tokenizer, "full")
    whole = estimate(model)
    four = {"num_processes": 4, "dtype": torch.bfloat16}
    zero2, zero3 = (estimate(model, engine=name, **four) for name in ("zero2", "zero3"))
    fsdp = estimate(model, engine="fsdp", **four)
    assert zero2.weights == whole.weights // 2 and zero3.weights == whole.weights // 8
    assert zero2.optimizer == zero3.optimizer == whole.weights * 3 // 4, "masters and two moments, a quarter"
    assert fsdp.weights == whole.weights // 4 and fsdp.gradients == whole.gradients // 4
    assert zero2.gathered == 0 < zero3.gathered == fsdp.gathered


def test_what_is_offloaded_or_kept_whole_counts_so(tokenizer):
    model = meta(tokenizer, "full")
    options = {"engine": "zero3", "num_processes": 4, "device_type": "cuda"}
    both = estimate(model, offloaded=("optimizer", "param"), **options)
    assert both.optimizer == both.gradients == both.weights == 0 < both.gathered
    assert estimate(model, **options).optimizer > 0
    whole = estimate(model, engine="fsdp", num_processes=4, keeps_whole=True)
    assert whole.gathered == sum(p.numel() for p in model.parameters()) * 4


def test_many_short_rows_take_no_longer_to_plan(tokenizer):
    few, many = (MicroBatchShape((length,) * (512 // length), 100, packed=True) for length in (64, 2))
    model = meta(tokenizer, "full")
    assert estimate(model, many).activations == estimate(model, few).activations


@pytest.mark.parametrize("packed", [True, False])
def test_a_survey_counts_what_the_steps_hold(checkpoints, packed):
    rows, _ = runs.example_rows(checkpoints["untied"])
    steps = StepDataset(rows, rows_per_step=8, max_tokens=320, packed=packed, seed=42, num_ranks=2)
    found, items = steps.survey(1000), [steps[number] for number in range(len(steps))]
    for name in ("num_tokens", "num_targets", "num_pairs"):
        assert found[name] == pytest.approx(sum(item[name] for item in items) / len(items))
    assert found["micro_batches"] == sum(len(item["micro_batches"]) for item in items) / len(items)
    lengths, num_targets = found["largest"]
    shape = MicroBatchShape(tuple(lengths), num_targets, packed)
    assert shape.num_positions >= max(b["input_ids"].numel() for item in items for b in item["micro_batches"])


def plan_of(total_gib, limit_gib):
    survey = Survey(1, 1, 1, 1.0, 1, 1, 1, 1, SHAPE)
    memory = Memory(int(total_gib * 2**30), 0, 0, 0, 0, 0, 0)
    return Plan(1, 1, survey, memory, None, int(limit_gib * 2**30), None, None, False)


def test_what_cannot_fit_is_refused_with_the_figures():
    device = SimpleNamespace(type="cpu")
    settings = SimpleNamespace(micro_batch_tokens=None, engine="single", ignore_memory_plan=False, device=device)
    assert check_plan(plan_of(1, 2), settings) is None
    assert check_plan(plan_of(2.2, 2), settings) is None  # within what estimates are off
    with pytest.raises(SettingsError, match=r"memory: 3.00 of 2.0 GiB .*: too much; lower .*--gradient_checkpointing"):
        check_plan(plan_of(3, 2), settings)
    settings.ignore_memory_plan = True
    assert check_plan(plan_of(3, 2), settings) is None


def test_a_plan_that_was_never_measured_on_a_kind_of_device_warns():
    device = SimpleNamespace(type="cuda")
    settings = SimpleNamespace(micro_batch_tokens=None, engine="ddp", ignore_memory_plan=False, device=device)
    assert check_plan(plan_of(1, 2), settings) is None
    warning = check_plan(plan_of(3, 2), settings)
    assert warning.startswith("warning: memory: 3.00 of 2.0 GiB") and "cuda" in warning


def test_devices_that_refuse_have_measured_results():
    results = ROOT / "benchmarks" / "results"
    for kind in MEASURED_DEVICES:
        assert (results / f"memory_{kind}.json").is_file()


# ---- through the command line ----


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
        *("--max_steps", 2, "--per_device_train_batch_size", 2, "--use_lora", "--report_to", "none"),
    ]


def test_a_dry_run_writes_its_plan_and_a_run_may_follow(run_script, words, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # no weights may be loaded
        code, stdout, stderr = run_script("finetune.py", *words, "--dry_run")
    assert code == 0 and stderr == ""
    assert "plan: 28 steps an epoch, 2 in all; 1 micro-batches a step" in stdout and "GiB a device" in stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["data"]["conversations"] == 56 and plan["memory"]["total"] > 0 and plan["trainable"] > 0
    code, stdout, stderr = run_script("finetune.py", *words)
    assert code == 0, stderr
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["plan"]["trainable"] == run["parameters"]["trainable"] == plan["trainable"]
    assert "peak memory: " in stdout and "(planned: " in stdout


def test_a_run_that_cannot_fit_is_refused_unless_told_otherwise(run_script, words, tmp_path):
    code, stdout, stderr = run_script("finetune.py", *words, "--device_memory_gib", "0.01")
    assert code == 2 and "of 0.0 GiB a device at the peak" in stderr and "too much" in stderr
    assert not (tmp_path / "out").exists() and "parameters train" not in stdout
    code, _, stderr = run_script(
        "finetune.py", *words, "--device_memory_gib", "0.01", "--ignore_memory_plan", "--gradient_checkpointing", "auto"
    )
    assert code == 0, stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["plan"]["checkpointing"], "it was needed"


def test_gradient_checkpointing_auto_leaves_it_off_where_all_fits(run_script, words, tmp_path):
    code, _, stderr = run_script("finetune.py", *words, "--gradient_checkpointing", "auto")
    assert code == 0, stderr
    assert not json.loads((tmp_path / "out" / "run.json").read_text())["plan"]["checkpointing"]


def test_micro_batch_tokens_are_the_budget(run_script, words, tmp_path):
    code, _, stderr = run_script("finetune.py", *words, "--gradient_accumulation_steps", 4, "--micro_batch_tokens", 150)
    assert code == 0, stderr
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["plan"]["layout"]["max_tokens"] == 150 and run["plan"]["layout"]["micro_batches"] > 2
    code, _, stderr = run_script("finetune.py", *words, "--micro_batch_tokens", 7, "--overwrite_output_dir")
    assert code == 2 and "--micro_batch_tokens 7: the longest conversation has" in stderr


def test_what_auto_needs_stays_needed_with_both_autos(run_script, words, tmp_path):
    small = ["--device_memory_gib", "0.01", "--gradient_checkpointing", "AUTO", "--micro_batch_tokens", "auto"]
    code, stdout, stderr = run_script("finetune.py", *words, *small, "--dry_run")
    assert code == 0, stderr
    assert "gradient checkpointing on" in stdout
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["checkpointing"] and plan["largest_micro_batch"] == 0
    assert plan["layout"]["max_tokens"] == 147, "the longest row"


@pytest.mark.parametrize(
    "place", ["tuning.planning.plan.estimate_memory", "transformers.AutoModelForCausalLM.from_config"]
)
def test_a_model_that_cannot_be_planned_trains_all_the_same(run_script, words, tmp_path, monkeypatch, place):
    def fail(*_, **__):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(place, fail)
    code, stdout, stderr = run_script("finetune.py", *words)
    assert code == 0, stderr
    assert "memory: cannot be told for this model (data-dependent)" in stdout
