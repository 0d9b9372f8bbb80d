"""Base or chat, and what trains of each."""

import pytest
import torch

from tests.conftest import build_model
from tuning.errors import SettingsError
from tuning.model.base_or_chat import judge_base_or_chat
from tuning.model.build import TokensInUse, build_training_model
from tuning.model.loading import load_model
from tuning.settings.options import LoraArguments

LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def model(tokenizer):
    return build_model(tokenizer, tied=False)


@pytest.fixture
def judge(tmp_path):
    """Judges a model as it lies on disk."""

    def judge(model, stop_id=7, vocabulary_size=None, **options):
        options = {"max_shard_size": "5GB"} | options
        model.save_pretrained(tmp_path / "judged", **options)
        meta_model = load_model(str(tmp_path / "judged"), dtype=torch.float32, meta=True)
        size = vocabulary_size or model.config.vocab_size
        judged = [
            judge_base_or_chat(str(tmp_path / "judged"), each, stop_id=stop_id, stop="<|im_end|>", vocabulary_size=size)
            for each in (meta_model, None)
        ]
        assert judged[0] == judged[1], "the names of the matrices are found without the model, too"
        return judged[0]

    return judge


def test_a_stop_token_that_does_not_end_generation_is_a_base_model(model, judge):
    evidence = judge(model)
    assert evidence.is_base and "does not end generation" in evidence.describe()


def test_a_trained_stop_token_that_ends_generation_is_a_chat_model(model, judge):
    model.generation_config.eos_token_id = [7, 3]
    evidence = judge(model)
    assert not evidence.is_base and evidence.describe().startswith("chat model: stop token <|im_end|> (7) ends")


def test_the_original_chat_checkpoints_say_chatml(model, judge):
    model.generation_config.chat_format = "chatml"
    assert not judge(model).is_base


@pytest.mark.parametrize("matrix", ["embedding", "output"])
@pytest.mark.parametrize("kind", ["near zero", "equals"])
def test_untrained_rows_are_a_base_model_whatever_the_configuration_says(model, matrix, kind, judge):
    model.generation_config.eos_token_id = 7
    weight = (model.get_input_embeddings() if matrix == "embedding" else model.get_output_embeddings()).weight
    with torch.no_grad():
        weight[7] = weight[-1] if kind == "equals" else weight[7] * 1e-3
    evidence = judge(model, vocabulary_size=len(weight) - 4)
    assert evidence.is_base and f"its {matrix} row is untrained" in evidence.describe() and kind in evidence.describe()


@pytest.mark.parametrize("kind", ["shards", "pickle", "nothing"])
def test_rows_are_read_from_whatever_the_checkpoint_has(model, tmp_path, kind):
    model.generation_config.eos_token_id = 7
    with torch.no_grad():
        model.get_input_embeddings().weight[7] *= 1e-3
    model.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "shards" else "5GB")
    if kind == "shards":
        assert (tmp_path / "model.safetensors.index.json").exists()
    else:
        (tmp_path / "model.safetensors").unlink()
        if kind == "pickle":
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    options = {"stop_id": 7, "stop": "<|im_end|>", "vocabulary_size": model.config.vocab_size}
    evidence = judge_base_or_chat(str(tmp_path), allow_pickle=kind == "pickle", **options)
    assert evidence.is_base == (kind != "nothing")
    expected = "was not found in the checkpoint's files" if kind == "nothing" else "its embedding row is untrained"
    assert expected in evidence.describe()


def test_control_tokens_without_a_row_are_refused(model):
    with pytest.raises(SettingsError, match="token 9999 has no row"):
        build_training_model(
            model, LoraArguments(use_lora=True), is_base=True, tokens=TokensInUse(9999, "", [5], 0, 100), adapter=None,
        )  # fmt: skip


@pytest.mark.parametrize(("choice", "eos", "rows"), [("auto", 3, True), ("auto", [7, 3], False), ("off", 3, False)])
def test_auto_trains_rows_on_a_base_model_only(model, choice, eos, rows, judge):
    model.generation_config.eos_token_id = eos
    evidence = judge(model, stop_id=7)
    training_model = build_training_model(
        model, LoraArguments(use_lora=True, train_embeddings=choice), is_base=evidence.is_base,
        tokens=TokensInUse(7, "<|im_end|>", [5, 7], 0, 100), adapter=None,
    )  # fmt: skip
    assert (training_model.token_rows is not None) == rows
    if rows:
        assert training_model.token_rows.ids_of("embedding").tolist() == [5, 7]
