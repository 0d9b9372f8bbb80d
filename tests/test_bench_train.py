"""The benchmark of training, in a shape that takes seconds: all arms train the same rows, and it reports them."""

import json

import pytest

from benchmarks import bench_train


@pytest.mark.slow
def test_every_arm_trains_the_rows_and_the_figures_are_kept(tokenizer, tmp_path, monkeypatch, write_json, capsys):
    rows = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n)))} for n in range(1, 25)
    ]
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def run_arm(arm, shape, args):
        args.arm, args.shapes = arm, [shape]
        return bench_train.run_here(args)

    monkeypatch.setattr(bench_train, "run_arm", run_arm)
    arms = [arm for arm in (*bench_train.TIMED, *bench_train.CHECKED) if arm not in ("matmul", "before")]
    words = ["--rows", "16", "--max_length", "128", "--shapes", "tiny", "--repeats", "1", "--arms", *arms]
    files = [str(write_json(rows)), "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out.json")]
    bench_train.main([*files, *words])
    figures = json.loads((tmp_path / "out.json").read_text())["shapes"]["tiny"]
    assert set(figures["tokens_per_s"]) == set(figures["peak_rss_gib"]) == set(arms) - {"padded"}
    assert set(figures["ratios"]) == set(arms) - {"padded", "ours"}
    assert len(figures["runs"]["ours"][0]["steps"]) == 2
    for difference in figures["difference_to_plain_transformers"].values():
        assert difference["loss"] < 1e-4 and difference["gradient_norm"] < 1e-3
    assert "| tiny | trl_packing |" in capsys.readouterr().out
