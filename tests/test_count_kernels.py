"""What a step starts on a GPU, counted without one; and that it copies no frozen weight."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import count_kernels
from benchmarks.cells import Cell
from benchmarks.random_models import adapt, build_model
from data_utils.micro_batch import pack_rows
from tuning.model.packing import enable_packing
from tuning.model.training_model import TrainingModel


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("shape", ["tiny", "tiny3"])
def test_a_layer_starts_fewer_kernels_than_transformers_and_peft(shape, dropout):
    cell = Cell(shape, "lora", 64, rank=4, dropout=dropout)
    ours, plain = (count_kernels.count_layer(arm, cell) for arm in ("ours", "plain"))
    assert sum(ours.kernels.values()) < 0.75 * sum(plain.kernels.values())
    assert sum(ours.bytes.values()) < 0.75 * sum(plain.bytes.values())
    # The work itself is the same, but for products with A that are taken together, which are no less work.
    assert sum(ours.flops.values()) == sum(plain.flops.values())
    assert ours.kernels["forward", "attention"] == ours.kernels["backward", "attention"] == 1
    assert ours.kernels["forward", "rms_norm"] == {"tiny": 2, "tiny3": 4}[shape]


def test_the_table_is_printed_and_kept(tmp_path, capsys, monkeypatch):
    out = tmp_path / "kernels.json"
    monkeypatch.setattr("sys.argv", ["count_kernels.py", "--shape", "tiny", "--length", "64", "--out", str(out)])
    count_kernels.main()
    assert "ours: a decoder layer, forward and backward" in capsys.readouterr().out and out.exists()


class NoCopies(TorchDispatchMode):
    """Refuses conversions of some tensors, or of views of them."""

    def __init__(self, tensors):
        super().__init__()
        self.storages = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("_to_copy", "clone", "copy_"):
            source = args[1] if function.overloadpacket.__name__ == "copy_" else args[0]
            assert source.untyped_storage()._cdata not in self.storages, "a frozen matrix was copied"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("shape", ["tiny", "tiny3"])
def test_no_frozen_matrix_is_copied_under_autocast(shape, dropout):
    model = build_model(shape, torch.device("cpu"), torch.bfloat16)
    training_model = TrainingModel(*adapt(model, Cell(shape, "lora", 16, rank=4, dropout=dropout))).train()
    assert enable_packing(training_model, max_length=16, dtype=torch.bfloat16) is None
    ids = torch.arange(1, 17).numpy()
    frozen = [p for p in training_model.parameters() if p.ndim == 2 and not p.requires_grad]
    with NoCopies(frozen):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = training_model.train()(**pack_rows([(ids, ids, None)] * 2))
        loss.backward()
    weight = training_model.causal_lm.get_output_embeddings().weight
    with NoCopies([weight]), pytest.raises(AssertionError, match="a frozen matrix was copied"):
        weight.float()
