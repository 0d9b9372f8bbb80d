"""Weights and optimizer state, saved and loaded, are the same to the bit, and so is the next step."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from tests.conftest import needs
from tuning.checkpoint.training_state import (
    load_optimizer,
    load_weights,
    read_counters,
    save_training_state,
    trained_parameters,
)
from tuning.planning.operations import StepOperations
from tuning.training.metrics import StepMetrics

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adafactor": lambda p: Adafactor(p, lr=0.1, relative_step=False, scale_parameter=False),
}


class Tiny(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(4, 6, dtype=dtype).requires_grad_(False)
        self.first = nn.Linear(6, 5, dtype=dtype)
        self.tied = nn.Linear(5, 5, bias=False, dtype=dtype)
        self.also_tied = self.tied

    def forward(self, x):
        return self.also_tied(self.tied(self.first(self.frozen(x)))).float().square().mean()


def steps(model, optimizer, seeds):
    for seed in seeds:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).to(model.first.weight.dtype)
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()


def build(name, dtype):
    model = Tiny(dtype)
    groups = [{"params": [model.tied.weight], "lr": 0.01}, {"params": list(model.first.parameters())}]
    return model, OPTIMIZERS[name](groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_is_the_same_to_the_bit(tmp_path, name, dtype):
    model, optimizer = build(name, dtype)
    steps(model, optimizer, range(3))
    save_training_state(tmp_path, model, optimizer, {"tokens_seen": 5})
    kept = copy.deepcopy(dict(optimizer.state))
    resumed, fresh = build(name, dtype)
    with torch.no_grad():
        for parameter in trained_parameters(resumed).values():
            parameter.zero_()
    load_weights(tmp_path, resumed)
    load_optimizer(tmp_path, resumed, fresh)
    assert read_counters(tmp_path)["tokens_seen"] == 5
    for (_, was), now in zip(kept.items(), (fresh.state[p] for p in optimizer_parameters(fresh)), strict=True):
        assert was.keys() == now.keys()
        for key, value in was.items():
            same = torch.equal(value, now[key]) if isinstance(value, torch.Tensor) else value == now[key]
            assert same and type(value) is type(now[key]), key
            assert not isinstance(value, torch.Tensor) or value.dtype == now[key].dtype
    steps(model, optimizer, range(3, 6))
    steps(resumed, fresh, range(3, 6))
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def optimizer_parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)]


def test_another_order_of_parameters_does_not_matter(tmp_path):
    model, optimizer = build("adamw", torch.float32)
    steps(model, optimizer, range(2))
    save_training_state(tmp_path, model, optimizer, {})
    resumed, _ = build("adamw", torch.float32)
    fresh = torch.optim.AdamW(
        [{"params": list(resumed.first.parameters())[::-1]}, {"params": [resumed.tied.weight], "lr": 0.01}], lr=0.1
    )
    load_weights(tmp_path, resumed)
    load_optimizer(tmp_path, resumed, fresh)
    steps(model, optimizer, [7])
    steps(resumed, fresh, [7])
    assert torch.equal(model.first.bias, resumed.first.bias) and torch.equal(model.tied.weight, resumed.tied.weight)


def test_a_state_for_another_model_is_refused(tmp_path):
    model, optimizer = build("adamw", torch.float32)
    save_training_state(tmp_path, model, optimizer, {})
    model.first = nn.Linear(6, 7)
    with pytest.raises(ValueError, match=r"holds first.bias \(float32 \[5\]\); this run has float32 \[7\]"):
        load_weights(tmp_path, model)
    with pytest.raises(ValueError, match=r"holds .* this run has bfloat16"):
        load_weights(tmp_path, Tiny(torch.bfloat16))
    with pytest.raises(ValueError, match=r"holds first.bias .* this run has no such trained parameter"):
        load_weights(tmp_path, Tiny(torch.float32).first.requires_grad_(False))
    more = Tiny(torch.float32)
    more.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lacks frozen.weight, which this run trains"):
        load_weights(tmp_path, more)


def test_a_state_that_cannot_be_kept_exactly_is_refused(tmp_path):
    model, optimizer = build("adamw", torch.float32)
    optimizer.state[model.tied.weight]["exotic"] = object()
    with pytest.raises(ValueError, match=r"--optim: AdamW keeps a object that cannot be saved exactly"):
        save_training_state(tmp_path, model, optimizer, {})


def window(saved=None, rank=0, num_ranks=1):
    return StepMetrics(torch.device("cpu"), saved=saved, rank=rank, num_ranks=num_ranks)


def step(*rows):
    return {"row_ids": [list(rows)], "num_tokens": 10, "num_targets": 4, "num_positions": 16, "num_pairs": 50}


def test_a_window_that_a_checkpoint_cut_gives_the_same_line():
    losses = [torch.tensor(value) for value in (0.1, 0.7, 1.3)]
    whole, first = window(), window()
    for number, loss in enumerate(losses):
        whole.add(number, step("a"), [loss])
    first.add(0, step("a"), [losses[0]])
    second = window(saved=first.state([first.loss_sum.item()]))
    for loss in losses[1:]:
        second.add(1, step("a"), [loss])
    sums = [[each.loss_sum.item()] for each in (whole, second)]
    assert whole.mean_loss(sums[0]) == second.mean_loss(sums[1]) == pytest.approx(0.7)
    flops = StepOperations(per_token=2, per_target=3, per_pair=1)
    rates = second.rates(flops, 1e-3)
    assert rates["supervised_tokens"] == 12 and rates["padding_share"] == 1 - 10 / 16
    assert rates["matmul_share"] == pytest.approx((2 * 30 + 3 * 12 + 150) / 30 * rates["tokens_per_s"] * 1e3, rel=1e-2)
    assert "matmul_share" not in second.rates(flops, None)
    halves = [window(saved=first.state([0.5, 1.5]), rank=rank, num_ranks=3) for rank in range(3)]
    assert [each.loss_sum.item() for each in halves] == [1.0, 1.0, 1.0], "another number of processes: the mean"


def test_the_first_loss_that_is_no_number_is_found_and_an_fp16_overflow_is_not_one():
    each = window()
    each.add(1, step("a", "b"), [torch.tensor(1.0)])
    each.add_gradient_norm(1, torch.tensor(float("inf")))
    assert each.find_non_finite(gradients=False) is None
    assert each.find_non_finite(gradients=True) == "the gradient norm is inf at step 1 (conversations a, b)"
    each.add(
        2, {**step(), "row_ids": [["c"], [f"d{i}" for i in range(9)]]}, [torch.tensor(1.0), torch.tensor(torch.nan)]
    )
    message = each.find_non_finite(gradients=False)
    assert message == "the loss is nan at step 2 (conversations d0, d1, d2, d3, d4, d5, d6, d7 and 1 more)"


def test_the_loss_scale_is_kept():
    from types import SimpleNamespace

    from tuning.training.optimizer import describe_schedules, restore_schedules

    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule = SimpleNamespace(last_epoch=3, _step_count=4, base_lrs=[0.1], lr_lambdas=[lambda _: 1.0])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(parameter * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    resumed = torch.amp.GradScaler("cpu")
    saved = describe_schedules(optimizer, schedule, scaler)
    restore_schedules(json.loads(json.dumps(saved)), optimizer, schedule, resumed)
    assert resumed.state_dict() == scaler.state_dict() and resumed.get_scale() == 512.0


def test_weights_that_are_no_numbers_are_not_saved(checkpoints, tmp_path):
    from tests import runs

    rows, template = runs.example_rows(checkpoints["untied"])
    model = runs.build(checkpoints["untied"], "lora", template)
    trainer = runs.train(model, rows, tmp_path, kind="lora", batch=8, accumulation=1, steps=1)
    next(iter(trained_parameters(trainer.model).values())).data.view(-1)[0] = float("inf")
    with pytest.raises(RuntimeError, match=r"lora_A.default.weight is not finite at step 1"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_tables_that_parameters_share_come_back_for_each(tmp_path):
    needs("bitsandbytes")
    import bitsandbytes as bnb

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
        return model, bnb.optim.AdamW8bit(model.parameters(), lr=0.01)

    def step(model, optimizer):
        model(torch.ones(2, 128)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = build()
    step(model, optimizer)
    save_training_state(tmp_path, model, optimizer, {})
    resumed, fresh = build()
    load_weights(tmp_path, resumed)
    load_optimizer(tmp_path, resumed, fresh)
    step(model, optimizer)
    step(resumed, fresh)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), resumed.parameters(), strict=True))
