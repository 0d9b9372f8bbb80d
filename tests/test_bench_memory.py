"""The benchmark of plans, in a shape that takes seconds."""

import json

import pytest

from benchmarks import bench_memory


@pytest.mark.slow
def test_a_cell_holds_the_plan_against_the_peak(tmp_path, capsys):
    bench_memory.main(["--shapes", "tiny", "--modes", "LoRA", "--batch", "1", "--out", str(tmp_path / "out.json")])
    assert "| tiny | LoRA | " in capsys.readouterr().out
    (cell,) = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert cell["planned_gib"] > 0 and 0.5 < cell["planned_gib"] / cell["measured_gib"] < 1.5
