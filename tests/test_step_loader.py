import time

import pytest
import torch
from torch.utils.data import Dataset

from tests import runs
from tuning.settings.arguments import RunArguments
from tuning.training.step_loader import StepSampler, build_loader, move_micro_batch


class Numbers(Dataset):
    """Item n is 10 n; remembers what was asked for."""

    def __init__(self, length=5):
        self.length = length
        self.asked = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.asked.append(index)
        if index == 3 and self.length == 4:
            raise RuntimeError("row 3 cannot be read")
        return 10 * index


def arguments(tmp_path, **options):
    return RunArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def test_the_next_item_is_under_way_while_one_is_trained(tmp_path):
    dataset = Numbers()
    items = iter(build_loader(dataset, arguments(tmp_path)))
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while dataset.asked != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert dataset.asked == [0, 1]
    assert list(items) == [10, 20, 30, 40] and dataset.asked[:5] == [0, 1, 2, 3, 4], "none is built twice"


def test_an_error_comes_with_its_own_item(tmp_path):
    items = iter(build_loader(Numbers(4), arguments(tmp_path)))
    assert [next(items) for _ in range(3)] == [0, 10, 20]
    with pytest.raises(RuntimeError, match="row 3 cannot be read"):
        next(items)


def test_any_order_gives_the_items_of_their_numbers(tmp_path):
    sampler = StepSampler(lambda: 5, 5)
    assert list(build_loader(Numbers(), arguments(tmp_path), sampler)) == [50, 60, 70, 80, 90]
    assert list(build_loader(Numbers(), arguments(tmp_path), [4, 0, 1, 1, 3])) == [40, 0, 10, 10, 30]


def test_steps_are_the_same_from_a_thread_and_from_processes(checkpoints, tmp_path):
    rows, template = runs.example_rows(checkpoints["untied"])
    trainer = runs.train(
        runs.build(checkpoints["untied"], "lora", template), rows, tmp_path, kind="lora", batch=4, accumulation=2,
        steps=1,
    )  # fmt: skip
    loaders = [build_loader(trainer.train_dataset, arguments(tmp_path, dataloader_num_workers=n)) for n in (0, 1)]
    for one, other in zip(*loaders, strict=True):
        assert one["row_ids"] == other["row_ids"] and one["num_pairs"] == other["num_pairs"]
        for left, right in zip(one["micro_batches"], other["micro_batches"], strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(torch.as_tensor(left[key]), torch.as_tensor(right[key])) for key in left)


def test_lengths_stay_on_the_host():
    moved = move_micro_batch({"input_ids": torch.zeros(1, 3), "lengths": [1, 2]}, torch.device("meta"))
    assert moved["input_ids"].device.type == "meta" and moved["lengths"] == [1, 2]
