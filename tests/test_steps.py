import pytest
import torch

from data_utils.rows import IGNORE_INDEX, Row, TokenizedRows
from data_utils.steps import StepDataset


def make_rows(lengths):
    rows = []
    for index, length in enumerate(lengths):
        ids = [100 * (index + 1) + position for position in range(length)]
        rows.append((f"row-{index}", Row(ids, [IGNORE_INDEX] * (length // 2) + ids[length // 2 :], [length], [1.0])))
    return TokenizedRows.from_rows(rows)


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
