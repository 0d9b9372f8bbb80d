"""Ollama's Modelfile (https://docs.ollama.com/modelfile)."""

from collections.abc import Sequence

from transformers import GenerationConfig

from data_utils.template import ChatTemplate
from inference.ollama_template import translate
from tuning.errors import SettingsError


def write_modelfile(
    weights: str, template: ChatTemplate, *, stops: Sequence[str], generation_config: GenerationConfig | None
) -> tuple[str, list[str]]:
    """The text of a Modelfile, and what it leaves out, a line each.

    weights: the GGUF file's name, beside the Modelfile. stops: texts of the tokens that end an answer. The template's
    system_message is given in conversations without a system turn.

    Raises: SettingsError: the chat template or the system message cannot be written there.
    """
    translated, notes = translate(template)
    lines = [f"FROM ./{weights}", f'TEMPLATE """{translated}"""']
    if template.system_message is not None:
        lines.append(f'SYSTEM """{_check(template.system_message)}"""')
    lines += [f'PARAMETER stop "{_check(stop)}"' for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in list_parameters(generation_config).items()]
    if template.writes_tools:
        notes.append("tools: not exported; the Modelfile's template does not write them")
    if not template.writes_system:
        notes.append("system turns: the chat template writes none, so that Ollama leaves them out")
    return "\n".join(lines) + "\n", notes


def _check(text: str) -> str:
    lost = [c for c in text if not c.isprintable() and c not in "\n\t"]
    if lost or '"""' in text:
        what = f"the character U+{ord(lost[0]):04X}" if lost else 'three quotes (""")'
        raise SettingsError(
            f"--to ollama: {text[:40]!r}: a Modelfile cannot hold {what}; export it --to gguf, and give Ollama a "
            "Modelfile of your own"
        )
    return text


def list_parameters(config: GenerationConfig | None) -> dict[str, float]:
    """Decoding as transformers does it by this config. All are named: Ollama's own defaults are others."""

    def read(name: str, default: float) -> float:
        value = getattr(config, name, None)
        return default if value is None else value

    penalty = read("repetition_penalty", 1.0)
    parameters: dict[str, float] = {"temperature": 0}
    if config is not None and config.do_sample:
        parameters = {
            "temperature": read("temperature", 1.0),
            "top_k": read("top_k", 50),
            "top_p": read("top_p", 1.0),
            "min_p": read("min_p", 0.0),
        }
    parameters["repeat_penalty"] = penalty
    if penalty != 1:
        parameters["repeat_last_n"] = -1  # of the whole text, as in transformers
    return parameters
