"""The training table in a shape that takes seconds: every method, mode and arm gives a cell."""

import json

import pytest

from benchmarks import plan_table, train_table


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells without processes of their own, and few steps."""
    monkeypatch.setattr(train_table, "WARM_UP", 1)
    monkeypatch.setattr(train_table, "TIMED", 2)

    def run_cell(cell, arm):
        shape, method, length, mode = cell.split("/")
        return train_table.run_here(arm, shape, method, int(length), mode)

    monkeypatch.setattr(train_table, "run_cell", run_cell)


@pytest.mark.slow
def test_every_method_mode_and_arm(in_this_process, tmp_path, capsys):
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
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tuning.model.training_model import TrainingModel

    hidden, inner, layers, vocabulary, length = 32, 64, 2, 512, 64
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    adapted = TrainingModel(*train_table.adapt(model, "lora"))
    linear = layers * (4 * hidden**2 + 3 * hidden * inner)
    rank = train_table.LORA["r"]
    lora = layers * rank * (4 * 2 * hidden + 3 * (hidden + inner))
    tokens, phi = train_table.ACCUMULATED * length, train_table.SUPERVISED
    attention = 6 * layers * hidden * train_table.ACCUMULATED * length**2
    by_hand = tokens * (4 * linear + 6 * lora + 4 * phi * hidden * vocabulary) + attention
    assert train_table.count_work(adapted, length) == by_hand


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
    assert all(line.count("|") == len(train_table.LENGTHS) + 2 for line in lines)


def test_weights_are_counted_once():
    """By hand: bf16 weights, and nothing else of their size where activations are computed again and rows are short."""
    train_table.SHAPES["wide"] = train_table.SHAPES["tiny"] | {"hidden_size": 512, "intermediate_size": 1024}
    try:
        memory = plan_table.plan("wide", None, 16, lean=True)
    finally:
        del train_table.SHAPES["wide"]
    assert memory.activations + memory.loss < 0.5 * memory.weights
