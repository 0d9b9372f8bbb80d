"""The benchmark of packing, in a shape that takes seconds: both ways train the same."""

import json
import sys

import pytest

from benchmarks import bench_packing
from tests.conftest import CONVERSATIONS


@pytest.mark.slow
def test_packed_and_padded_train_the_same(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, head_dim=8, initializer_range=0.1)
    monkeypatch.setattr(bench_packing, "SHAPE", bench_packing.SHAPE | small)
    words = [str(CONVERSATIONS), "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["bench_packing.py", *words, "--steps", "2", "--repeats", "1"])
    bench_packing.main()
    kinds = json.loads((tmp_path / "out.json").read_text())["kinds"]
    assert kinds.keys() == bench_packing.KINDS.keys()
    for found in kinds.values():
        assert found["ratio"] > 0 and found["last_loss"]["packed"] == pytest.approx(
            found["last_loss"]["padded"], rel=1e-4
        )
