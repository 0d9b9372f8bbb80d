"""The benchmark of merging, in a size that takes seconds: all arms end, and ours is peft's result."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import bench_merge


@pytest.mark.slow
def test_ours_is_pefts_result(tmp_path):
    small = dict(vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16)  # fmt: skip
    bench_merge.build(tmp_path, bench_merge.SHAPE | small, shard_bytes=100_000)
    results = {}
    for arm in bench_merge.ARMS:
        bench_merge.run_arm(arm, tmp_path)
        files = sorted((tmp_path / "out").glob("*.safetensors"))
        results[arm] = {name: value for file in files for name, value in load_file(file).items()}
        (tmp_path / "out").rename(tmp_path / arm)
    base, ours, verified, theirs = results.values()
    assert base.keys() == ours.keys() == theirs.keys() and len(base) > 20
    assert all(torch.equal(ours[name], verified[name]) for name in ours)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) or (value - theirs[name]).abs().max() < 0.01 * value.abs().max(), name
        assert torch.equal(value, base[name]) == ("proj" not in name)
