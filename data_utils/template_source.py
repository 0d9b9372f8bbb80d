"""What the text of a chat template says by itself: the texts in it, and the variables that it reads."""

from collections.abc import Iterator

from jinja2 import meta, nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

# What transformers passes to every chat template, whatever a caller says.
_PASSED = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
}


def list_literals(template: str) -> list[str]:
    """The texts that a chat template writes or looks for. Raises: jinja2.TemplateSyntaxError."""
    tree, _ = _parse(template)
    written = [node.data for node in tree.find_all(nodes.TemplateData)]
    constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return [*written, *constants]


def find_variables(template: str) -> set[str]:
    """Names of the variables that a caller can set. Raises: jinja2.TemplateSyntaxError.

    These are the names that are read before the template gives them a value.
    """
    tree, known = _parse(template)
    read_first: dict[str, bool] = {}
    for name in _list_names(tree):
        read_first.setdefault(name.name, name.ctx == "load")
    return {name for name in meta.find_undeclared_variables(tree) if read_first[name]} - known - _PASSED


def explain_no_variable(name: str, known: set[str]) -> str:
    """What to say of a name that is none of a template's variables."""
    those = f"it has {', '.join(sorted(known))}" if known else "it has none"
    return f"the chat template has no variable {name}; {those}"


def _list_names(node: nodes.Node) -> Iterator[nodes.Name]:
    """The names under a node, in the order in which they are read and assigned."""
    if isinstance(node, nodes.Name):
        yield node
    children = list(node.iter_child_nodes())
    if isinstance(node, nodes.Assign | nodes.AssignBlock):
        children.sort(key=lambda child: child is node.target)
    if isinstance(node, nodes.For):
        children.sort(key=lambda child: child is not node.iter)
    for child in children:
        yield from _list_names(child)


def _parse(template: str) -> tuple[nodes.Template, set[str]]:
    """The syntax tree, and the names that every template knows."""
    environment = chat_template_utils._compile_jinja_template(template).environment
    return environment.parse(template), set(environment.globals)
