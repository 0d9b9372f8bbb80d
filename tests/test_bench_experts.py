"""The benchmark of LoRA on experts, in a shape that takes seconds: ours and peft's have one loss."""

import pytest

from benchmarks import bench_experts


@pytest.mark.slow
def test_all_arms_with_experts_have_one_loss(monkeypatch):
    small = dict(hidden_size=64, moe_intermediate_size=32, num_experts=8, head_dim=16)
    monkeypatch.setattr(bench_experts, "SHAPE", bench_experts.SHAPE | small)
    losses = {arm: bench_experts.measure(arm, 1)["loss"] for arm in bench_experts.ARMS}
    alone = losses.pop("attention alone")
    assert len(losses) == 3 and all(loss == pytest.approx(losses["ours"], rel=1e-6) for loss in losses.values())
    assert alone != pytest.approx(losses["ours"], rel=1e-6)
