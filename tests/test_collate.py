import numpy as np
import pytest
import torch

from data_utils.collate import StepDataset, pack_rows, pad_rows
from data_utils.dataset import TokenizedRows
from data_utils.template import IGNORE_INDEX, Row


def make_rows(lengths):
    rows = []
    for index, length in enumerate(lengths):
        ids = [100 * (index + 1) + position for position in range(length)]
        rows.append((f"row-{index}", Row(ids, [IGNORE_INDEX] * (length // 2) + ids[length // 2 :], [length], [1.0])))
    return TokenizedRows.from_rows(rows)


def arrays(ids, labels, weights=None):
    return np.array(ids), np.array(labels), None if weights is None else np.array(weights, dtype=np.float32)


def test_padding_and_the_shift_to_the_next_token():
    batch = pad_rows([arrays([1, 2, 3], [-100, 2, 3]), arrays([4, 5], [4, -100])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    # The first token of a row is predicted by nothing, so its label 4 is no target.
    assert batch["target_index"].tolist() == [0, 1] and batch["targets"].tolist() == [2, 3]


def test_packed_rows_lie_one_behind_the_other_and_predict_nothing_of_each_other():
    batch = pack_rows([arrays([1, 2, 3], [-100, 2, 3]), arrays([4, 5], [4, -100]), arrays([6, 7], [6, 7])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["lengths"] == [3, 2, 2] and batch["row_starts"].tolist() == [0, 3, 5, 7]
    assert batch["row_starts"].dtype == torch.int32
    assert batch["target_index"].tolist() == [0, 1, 5] and batch["targets"].tolist() == [2, 3, 7]


def test_weights_go_with_their_targets():
    one, other = arrays([1, 2, 3], [-100, 2, 3], [1, 1, 0.5]), arrays([4, 5], [-100, 5])
    for collate in (pad_rows, pack_rows):
        batch = collate([one, other])
        assert batch["targets"].tolist() == [2, 3, 5] and batch["weights"].tolist() == [1, 0.5, 1]
        assert "weights" not in collate([other])


def test_a_rank_without_rows_runs_a_token_without_target():
    packed = pack_rows([])
    assert packed["lengths"] == [1] and packed["row_starts"].tolist() == [0, 1]
    batch = pad_rows([])
    assert batch["input_ids"].tolist() == packed["input_ids"].tolist()
    assert batch["input_ids"].tolist() == [[0]] and len(batch["targets"]) == len(batch["target_index"]) == 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_together_hold_the_step_and_count_it_alike(num_ranks, packed):
    rows = make_rows([5, 9, 4, 8, 7])
    datasets = [
        StepDataset(rows, rows_per_step=4, max_tokens=20, packed=packed, seed=1, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    whole = StepDataset(rows, rows_per_step=4, max_tokens=20, packed=packed, seed=1)
    for step in range(6):
        items = [dataset[step] for dataset in datasets]
        assert {item["num_targets"] for item in items} == {whole[step]["num_targets"]}
        assert len({len(item["micro_batches"]) for item in items}) == 1
        ids = sorted(row_id for item in items for micro_batch in item["row_ids"] for row_id in micro_batch)
        assert ids == sorted(row_id for micro_batch in whole[step]["row_ids"] for row_id in micro_batch)
        positions = sum(m["input_ids"].numel() for item in items for m in item["micro_batches"])
        assert {item["num_positions"] for item in items} == {positions}
        assert {item["num_pairs"] for item in items} == {whole[step]["num_pairs"]}
        targets = torch.cat([m["targets"] for item in items for m in item["micro_batches"]])
        assert len(targets) == items[0]["num_targets"]


def test_an_epoch_holds_every_row_once_and_evaluation_keeps_their_order():
    rows = make_rows([5, 9, 4, 8, 7])
    dataset = StepDataset(rows, rows_per_step=2, max_tokens=20, packed=True, seed=3)
    epochs = [[i for step in range(e * 3, e * 3 + 3) for m in dataset[step]["row_ids"] for i in m] for e in range(3)]
    assert all(sorted(epoch) == [f"row-{i}" for i in range(5)] for epoch in epochs) and len(dataset) == 3
    assert epochs[0] != epochs[1]
    evaluation = StepDataset(rows, rows_per_step=2, max_tokens=99, packed=True, seed=None)
    assert [sorted(i for m in evaluation[s]["row_ids"] for i in m) for s in range(3)] == [
        ["row-0", "row-1"],
        ["row-2", "row-3"],
        ["row-4"],
    ]
