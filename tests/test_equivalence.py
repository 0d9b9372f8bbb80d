"""A step is a set of rows: every layout gives the trajectory of plain transformers, one row at a time."""

import json

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests import runs

LAYOUTS = [(1, 8), (2, 4), (4, 2), (8, 1)]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for (loss, norm), (expected_loss, expected_norm) in zip(actual, expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.fixture(scope="module")
def references(checkpoints):
    """(checkpoint, kind) -> the reference's losses and gradient norms, computed once."""
    known = {}

    def get(name, kind):
        if (name, kind) not in known:
            rows, template = runs.example_rows(checkpoints[name])
            fresh = runs.build(checkpoints[name], kind, template)
            known[name, kind] = runs.reference(checkpoints[name], kind, fresh, rows)
        return known[name, kind]

    return get


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(("batch", "accumulation"), LAYOUTS)
@pytest.mark.parametrize("kind", ["full", "lora", "tokens"])
def test_every_layout_is_plain_transformers(checkpoints, references, tmp_path, kind, batch, accumulation, packed):
    rows, template = runs.example_rows(checkpoints["untied"])
    model = runs.build(checkpoints["untied"], kind, template)
    trainer = runs.train(model, rows, tmp_path, kind=kind, batch=batch, accumulation=accumulation, packed=packed)
    assert_same(runs.measured(trainer), references("untied", kind))


def test_weights_scale_the_loss_of_their_tokens_and_not_the_denominator(checkpoints):
    _, template = runs.example_rows(checkpoints["untied"])
    model = runs.build(checkpoints["untied"], "full", template)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 900, (2, 12), generator=generator)
    index, weights = torch.tensor([3, 4, 9, 14, 20]), torch.tensor([1.0, 0.5, 0.0, 2.0, 0.25])
    targets = ids.roll(-1, 1).flatten()[index]
    losses = [model(ids, index[i : i + 1], targets[i : i + 1]).item() for i in range(len(index))]
    weighted = model(ids, index, targets, weights)
    assert weighted.item() == pytest.approx(sum(x * w for x, w in zip(losses, weights.tolist(), strict=True)), rel=1e-5)
    weighted.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "kind"), [("tied", "full"), ("tied", "tokens"), ("tied", "matrices"), ("untied", "matrices")]
)
def test_tied_and_whole_matrices_too(checkpoints, references, tmp_path, name, kind):
    rows, template = runs.example_rows(checkpoints[name])
    model = runs.build(checkpoints[name], kind, template)
    trainer = runs.train(model, rows, tmp_path, kind=kind, batch=4, accumulation=2)
    assert_same(runs.measured(trainer), references(name, kind))


def test_gradient_checkpointing_and_workers_change_nothing(checkpoints, references, tmp_path):
    from tuning.model.training_model import enable_gradient_checkpointing

    rows, template = runs.example_rows(checkpoints["untied"])
    model = runs.build(checkpoints["untied"], "tokens", template)
    enable_gradient_checkpointing(model.causal_lm)
    options = {"gradient_checkpointing": True, "dataloader_num_workers": 1}
    trainer = runs.train(model, rows, tmp_path, kind="tokens", batch=4, accumulation=2, **options)
    assert model.causal_lm.training, "a model in eval mode ignores checkpointing"
    forwards = []
    model.causal_lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    trainer.training_step(model, trainer.train_dataset[0], trainer.train_dataset[0]["num_targets"])
    assert len(forwards) == 2 * len(trainer.train_dataset[0]["micro_batches"]), "once forward, once again in backward"
    assert_same(runs.measured(trainer), references("untied", "tokens"))


def test_dropout_follows_seed_and_step_not_the_past(checkpoints, tmp_path):
    def losses(noise):
        rows, template = runs.example_rows(checkpoints["untied"])
        model = runs.build(checkpoints["untied"], "lora", template, dropout=0.5)
        torch.manual_seed(noise)
        return runs.measured(
            runs.train(model, rows, tmp_path / str(noise), kind="lora", batch=4, accumulation=2, steps=3)
        )

    assert losses(1) == losses(2)


def test_evaluating_changes_nothing_even_with_dropout_in_the_model(tokenizer, checkpoints, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def losses(name, **options):
        rows, _ = runs.example_rows(checkpoints["untied"])
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer) + 8, n_embd=16, n_layer=1, n_head=2, n_positions=256, attn_pdrop=0.3
        )
        model = runs.TrainingModel(GPT2LMHeadModel(config).eval())
        return runs.measured(
            runs.train(model, rows, tmp_path / name, kind="full", batch=4, accumulation=2, steps=3, **options)
        )

    assert losses("plain") == losses("evaluated", eval_on_start=True, eval_strategy="steps", eval_steps=1)


@pytest.mark.dist
def test_two_processes_give_the_same_trajectory(forks, checkpoints, references, tmp_path):
    kinds = ["full", "lora", "tokens"]
    code, _, stderr = forks.run(
        checkpoints["untied"], tmp_path, *kinds, module="tests.test_equivalence", processes=2, timeout_s=300
    )
    assert code == 0, stderr[-3000:]
    for kind in kinds:
        results = [json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for rank in (0, 1)]
        assert [result["engine"] for result in results] == ["DistributedDataParallel"] * 2
        assert results[0]["measured"] == results[1]["measured"]
        assert_same(results[0]["measured"], references("untied", kind))
        # Ranks hold the same weights at the end, and did not train the same rows.
        assert results[0]["weights"] == results[1]["weights"]
        assert results[0]["rows"] != results[1]["rows"]


def _worker(checkpoint, output, *kinds):
    for kind in kinds:
        rows, template = runs.example_rows(checkpoint)
        trainer = runs.train(
            runs.build(checkpoint, kind, template), rows, output / kind, kind=kind, batch=2, accumulation=2
        )
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        weights = [p.double().sum().item() for p in trainer.model.parameters() if p.requires_grad]
        result = {
            "engine": type(trainer.model_wrapped).__name__,
            "measured": runs.measured(trainer),
            "weights": weights,
            "rows": trainer.train_dataset[0]["row_ids"],
        }
        (output / f"{kind}-{trainer.args.process_index}.json").write_text(json.dumps(result))
    trainer.close()


if __name__ == "__main__":
    import sys
    from pathlib import Path

    _worker(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
