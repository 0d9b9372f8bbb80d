import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests import runs
from tests.conftest import build_model
from tuning.model.packing import enable_packing
from tuning.model.training_model import TrainingModel
from tuning.planning.operations import StepOperations, count_operations, measure_matmul_rate


def test_a_step_is_the_sum_of_its_parts():
    flops = StepOperations(per_token=10, per_target=100, per_pair=1)
    assert flops.of({"num_tokens": 5, "num_targets": 2, "num_pairs": 13}) == 50 + 200 + 13


def counted(model, lengths, num_targets):
    """Operations of matrix products, as torch counts what runs; attention apart."""
    assert enable_packing(model, max_length=64, dtype=torch.float32) is None
    model.train()
    total = sum(lengths)
    # Torch's counter does not know the product that is added in place.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **options: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss = model(
            torch.arange(total)[None],
            torch.arange(num_targets),
            torch.arange(num_targets),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            lengths=lengths,
        )
        loss.backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(value for op, value in counts.items() if str(op) in ("aten.mm", "aten.addmm", "aten.addmm_"))


def test_full_training_is_what_torch_counts(tokenizer):
    model = TrainingModel(build_model(tokenizer, tied=False))
    flops = count_operations(model)
    step = {"num_tokens": 24, "num_targets": 10, "num_pairs": 0}
    assert counted(model, [9, 15], 10) == flops.of(step)
    # 2 layers of 4 heads of 8: two products forward and four backward, half of each.
    assert flops.per_pair == 6 * 2 * 32


def test_lora_is_what_torch_counts_but_for_the_first_layers_input(checkpoints):
    _, template = runs.example_rows(checkpoints["untied"])
    model = runs.build(checkpoints["untied"], "lora", template)
    flops = count_operations(model)
    actual = counted(model, [9, 15], 10)
    # Nothing trains below the first layer: the gradient of its input, which q, k and v would give, is not computed.
    layer = model.causal_lm.model.layers[0].self_attn
    first = 2 * 24 * sum(p.numel() for n in "qkv" for p in getattr(layer, f"{n}_proj").parameters() if p.ndim == 2)
    assert flops.of({"num_tokens": 24, "num_targets": 10, "num_pairs": 0}) - actual == pytest.approx(first, rel=0.3)


def test_a_whole_output_matrix_beside_lora_counts_once(checkpoints):
    _, template = runs.example_rows(checkpoints["untied"])
    flops = [count_operations(runs.build(checkpoints["untied"], kind, template)) for kind in ("lora", "matrices")]
    output = runs.build(checkpoints["untied"], "lora", template).causal_lm.get_output_embeddings().weight.numel()
    assert [each.per_target for each in flops] == [4 * output, 6 * output]
    assert flops[0].per_token == flops[1].per_token


def test_gpt2s_layers_count_too():
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    assert count_operations(TrainingModel(GPT2LMHeadModel(config))).per_token == 6 * 12 * 16 * 16


def test_models_whose_cost_goes_by_something_else_are_not_counted():
    config = FalconMambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert count_operations(TrainingModel(FalconMambaForCausalLM(config))) is None
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
    )  # fmt: skip
    assert count_operations(TrainingModel(Qwen3MoeForCausalLM(config))) is None


def test_the_machines_own_rate_is_measured():
    assert measure_matmul_rate(torch.device("cpu"), torch.float32, size=64, seconds=0.01) > 1e6
