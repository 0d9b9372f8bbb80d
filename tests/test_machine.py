import pytest
import torch

from tests import runs
from tuning.errors import MachineError


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("batch", "checkpointing", "advice"),
    [
        (4, False, "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps"),
        (1, False, "pass --gradient_checkpointing True"),
        (1, True, "lower --model_max_length"),
    ],
)
def test_out_of_memory_names_the_micro_batch_and_what_to_change(
    checkpoints, tmp_path, batch, checkpointing, advice, packed
):
    from tuning.model.training_model import enable_gradient_checkpointing

    rows, template = runs.example_rows(checkpoints["untied"])
    model = runs.build(checkpoints["untied"], "lora", template)
    if checkpointing:
        enable_gradient_checkpointing(model.causal_lm)

    def run_out(module, _):
        if module.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    model.causal_lm.model.layers[1].mlp.register_forward_pre_hook(run_out)
    with pytest.raises(MachineError) as error:
        runs.train(model, rows, tmp_path, kind="lora", batch=batch, accumulation=1, steps=1, packed=packed)
    message = str(error.value)
    assert message.startswith("out of memory in a micro-batch of ") and advice in message and "demo-" in message
    assert "\n" not in message


def test_other_errors_stay_what_they_are(checkpoints, tmp_path):
    rows, template = runs.example_rows(checkpoints["untied"])
    model = runs.build(checkpoints["untied"], "lora", template)

    def break_down(module, _):
        if module.training:
            raise RuntimeError("a bug")

    model.causal_lm.model.layers[1].mlp.register_forward_pre_hook(break_down)
    with pytest.raises(RuntimeError, match="a bug"):
        runs.train(model, rows, tmp_path, kind="lora", batch=1, accumulation=1, steps=1)
