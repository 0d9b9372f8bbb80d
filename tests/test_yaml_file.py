import pytest
import yaml

from tests.conftest import ROOT
from tuning.errors import SettingsError
from tuning.settings.arguments import parse_arguments

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
RECIPES = sorted((ROOT / "finetune" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_parses_and_names_files_that_exist(path):
    arguments = parse_arguments([str(path)])
    for named in [*arguments.data.data_path, *(arguments.data.eval_data_path or []), arguments.run.sample_prompts]:
        assert named is None or (ROOT / named).is_file()
    assert arguments.model.model_name_or_path == "examples/tiny-qwen3-base"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_parses_and_leaves_model_data_and_output_to_the_user(path):
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not {"model_name_or_path", "data_path", "output_dir"} & settings.keys()
    arguments = parse_arguments([str(path), "--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"])
    assert arguments.lora.use_lora == (path.stem != "full") and arguments.lora.q_lora == (path.stem == "qlora")
    run = arguments.run
    assert (run.save_strategy, run.save_steps, run.save_total_limit, run.report_to) == ("steps", 1000, 10, [])


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: m\noutput_dir: o\ndata_path: [a.json, b c.json]\n{text}", encoding="utf-8")
    return str(path)


def test_a_file_is_a_command_line_that_flags_win_over(tmp_path):
    text = """
learning_rate: 1e-4
use_lora: true
lora_r: null
chat_template_kwargs: {enable_thinking: false}
seed: 7
"""
    arguments = parse_arguments([write(tmp_path, text), "--learning_rate", "2e-4", "--seed=8"])
    assert arguments.data.data_path == ["a.json", "b c.json"]
    assert arguments.run.learning_rate == 2e-4 and arguments.run.seed == 8
    assert arguments.lora.use_lora and arguments.lora.lora_r == 64
    assert arguments.data.chat_template_kwargs == '{"enable_thinking": false}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "run.yaml:4: learning_rat: unknown setting; did you mean learning_rate?"),
        ("lora_r: 8", "--lora_r: has no effect without --use_lora"),
        ("a: [1", "run.yaml:4: invalid YAML"),
        ("seed: 1\nseed: 2", "run.yaml:5: invalid YAML: the key 'seed' stands twice"),
        ("seed: !!python/object:os.system x", "run.yaml:4: invalid YAML"),
    ],
)
def test_mistakes(tmp_path, text, message):
    with pytest.raises(SettingsError) as error:
        parse_arguments([write(tmp_path, text)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(SettingsError, match="No such file"):
        parse_arguments([str(tmp_path / "absent.yaml")])
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(SettingsError, match="expected settings, one `name: value` a line"):
        parse_arguments([str(tmp_path / "list.yaml")])
