"""The training table in a shape that takes seconds: every method, mode and arm gives a cell."""

import json

import pytest

from benchmarks import arms, plan_table, train_table
from benchmarks.cells import LENGTHS, SHAPES, Cell
from benchmarks.random_models import count_work, plan_memory
from tests.conftest import needs


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells without processes of their own, and few steps."""

    def run_cell(cell, arm):
        shape, method, length, mode = cell.split("/")
        few = Cell(shape, method, int(length), lean=mode == "lean", warm_up=1, timed=2)
        return arms.run_cell(few, arm)

    monkeypatch.setattr(train_table, "run_cell", run_cell)


@pytest.mark.slow
def test_every_method_mode_and_arm(in_this_process, tmp_path, capsys):
    needs("bitsandbytes", "gptqmodel", "optimum", "trl", "datasets")
    cells = ["tiny/lora/64/fast", "tiny/lora/64/lean", "tiny/lora_emb/64/fast", "tiny/full/64/lean"]
    train_table.main(
        ["--cells", *cells, "tiny/lora_tokens/64/fast", "tiny/qlora_nf4/64/lean", "--arms", "ours", "plain"]
    )
    train_table.main(["--cells", "tiny/qlora_gptq/64/fast", "--arms", "ours"])
    train_table.main(["--cells", *cells, "--arms", "trl", "--out", str(tmp_path / "table.json")])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert len(rows) == 2 * 6 + 1 + 4 and not any("|  |  |  |" in row for row in rows)
    figures = json.loads((tmp_path / "table.json").read_text())
    assert {entry["arm"] for entry in figures["cells"]} == {"trl"} and figures["device"]
    assert all(entry["s_per_step"] > 0 and 0 < entry["matmul_share"] < 1 for entry in figures["cells"])
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + 4


def test_operations_are_those_of_the_formula():
    cell = Cell("tiny", "lora", 64)
    hidden, inner, layers, vocabulary = 32, 64, 2, 512
    linear = layers * (4 * hidden**2 + 3 * hidden * inner)
    lora = layers * cell.rank * (4 * 2 * hidden + 3 * (hidden + inner))
    attention = 6 * layers * hidden * cell.rows_per_step * cell.length**2
    by_hand = cell.tokens_per_step * (4 * linear + 6 * lora + 4 * 0.5 * hidden * vocabulary) + attention
    assert count_work(cell) == by_hand


def test_a_cell_that_fails_says_why_and_late_ones_are_not_begun(monkeypatch, capsys):
    class Done:
        returncode, stdout, stderr = 1, "", "Traceback\ntorch.OutOfMemoryError: CUDA out of memory"

    monkeypatch.setattr("subprocess.run", lambda *_, **__: Done)
    train_table.main(["--cells", "7b/lora/256/fast", "--arms", "ours"])
    assert "| 7b | lora | 256 | fast | ours |  |  |  | out of memory | 20.1 |" in capsys.readouterr().out
    train_table.main(["--cells", "7b/lora/256/fast", "--arms", "ours", "--minutes", "0"])
    assert "| 7b | lora | 256 | fast | ours |  |  |  |  | 20.1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_table.main(["--cells", "7b/lora/fast"])


@pytest.mark.slow
def test_the_table_of_plans(capsys):
    plan_table.main(["--shape", "tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(plan_table.KINDS)
    assert all(line.count("|") == len(LENGTHS) + 2 for line in lines)


def test_weights_are_counted_once(monkeypatch):
    """By hand: bf16 weights, and nothing else of their size where activations are computed again and rows are short."""
    monkeypatch.setitem(SHAPES, "wide", SHAPES["tiny"] | {"hidden_size": 512, "intermediate_size": 1024})
    memory = plan_memory(Cell("wide", "lora", 16, lean=True), device_type="cuda")
    assert memory.activations + memory.loss < 0.5 * memory.weights
