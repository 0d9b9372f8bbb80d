import json

import pytest

from tuning.errors import SettingsError
from tuning.settings.arguments import parse_arguments
from tuning.settings.deepspeed_json import read_deepspeed_config

BASE = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "/tmp/never-made", "--use_cpu", "True"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bf16": True}, "bf16: expected an object"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer: expected an object"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights: not supported"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size: not supported"),
        ({"gradient_clipping": 3.0}, "gradient_clipping 3.0, but --max_grad_norm is 1.0"),
    ],
)
def test_what_would_be_ignored_or_is_no_block_is_one_line(tmp_path, changes, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | changes))
    with pytest.raises(SettingsError, match=message) as error:
        read_deepspeed_config(str(path), parse_arguments(BASE).run)
    assert "\n" not in str(error.value)


def test_values_that_mean_off_are_allowed(tmp_path):
    path = tmp_path / "config.json"
    off = {"stage": 2, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}
    path.write_text(json.dumps({"zero_optimization": off}))
    assert read_deepspeed_config(str(path), parse_arguments(BASE).run)["gradient_clipping"] == 1.0
