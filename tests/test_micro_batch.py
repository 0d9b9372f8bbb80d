import numpy as np
import torch

from data_utils.micro_batch import pack_rows, pad_rows


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
