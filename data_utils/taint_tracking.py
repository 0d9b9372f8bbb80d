"""What a chat template asks about the texts it is given.

A template is a program. Texts that answer every question it asks alike take the same way through it, so their
rendering is the same but for the texts themselves. Here a template runs on marked texts that write down each question:
whether a word stands in them, whether they equal one. Anything else it may do with a text (its length, its letters)
leaves the question open, and says so.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils


class Questions:
    """words: were looked for in a text. equals: were compared with one. open: something else was asked."""

    def __init__(self) -> None:
        self.words: set[str] = set()
        self.equals: set[str] = set()
        self.open = False


class _Text(str):
    """A text that writes down what it is asked. Joined with others it is not whole, and may only be written."""

    questions: Questions
    whole: bool

    @classmethod
    def of(cls, text: str, questions: Questions, *, whole: bool) -> "_Text":
        made = cls(text)
        made.questions, made.whole = questions, whole
        return made

    def _ask(self, words: Any) -> None:
        self.questions.open |= not self.whole
        for word in words if isinstance(words, tuple) else (words,):
            if type(word) is str:
                self.questions.words.add(word)
            else:  # another text, or nothing that can be looked for
                self.questions.open = True

    def _leave_open(self, name: str, *args: Any, **options: Any) -> Any:
        self.questions.open = True
        return getattr(str, name)(self, *args, **options)

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True  # empty texts are another matter

    def __contains__(self, word: Any) -> bool:
        self._ask(word)
        return str.__contains__(self, word)

    def __eq__(self, other: object) -> bool:
        self.questions.open |= not self.whole or type(other) is _Text
        if type(other) is str:
            self.questions.equals.add(other)
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        self.questions.open = True  # a key that is looked for
        return str.__hash__(self)

    def startswith(self, *args: Any) -> bool:
        self._ask(args[0])
        return str.startswith(self, *args)

    def endswith(self, *args: Any) -> bool:
        self._ask(args[0])
        return str.endswith(self, *args)

    def split(self, sep: Any = None, maxsplit: Any = -1) -> list[str]:
        self._ask(sep)
        self.questions.open |= sep is None or str.__contains__(self, sep)
        return [self] if sep is not None else str.split(self)

    def replace(self, old: Any, new: Any, count: Any = -1) -> str:
        self._ask(old)
        self.questions.open |= str.__contains__(self, old)
        return self

    def _strip(self, name: str, characters: str | None) -> str:
        # White space at the ends is not harmless to begin with; other characters might stand there.
        self.questions.open |= characters is not None and bool(characters.strip())
        stripped = getattr(str, name)(self, characters)
        return self if len(stripped) == str.__len__(self) else _Text.of(stripped, self.questions, whole=False)

    def strip(self, characters: Any = None) -> str:
        return self._strip("strip", characters)

    def lstrip(self, characters: Any = None) -> str:
        return self._strip("lstrip", characters)

    def rstrip(self, characters: Any = None) -> str:
        return self._strip("rstrip", characters)

    def __add__(self, other: str) -> str:
        return _Text.of(str.__add__(self, other), self.questions, whole=False)

    def __radd__(self, other: str) -> str:
        return _Text.of(str.__add__(str(other), self), self.questions, whole=False)


def _define_the_rest() -> None:
    defined = set(vars(_Text)) | {"__new__", "__init__", "__class__", "__getattribute__", "__doc__", "__repr__"}
    kept = {"__init_subclass__", "__subclasshook__", "__setattr__", "__delattr__", "__sizeof__", "__dir__",
            "__getstate__", "__reduce__", "__reduce_ex__", "__getnewargs__"}  # fmt: skip
    for name in set(dir(str)) - defined - kept:
        setattr(_Text, name, lambda self, *args, _name=name, **options: self._leave_open(_name, *args, **options))


_define_the_rest()


# Filters that leave a text as it is or ask it through its methods. Any other may ask unseen.
_FILTERS = {
    "capitalize", "count", "d", "default", "dictsort", "first", "items", "join", "last", "length", "list",
    "lower", "map", "reject", "rejectattr", "replace", "reverse", "safe", "select", "selectattr", "sort",
    "string", "title", "tojson", "trim", "upper",
}  # fmt: skip


class TrackedTemplate:
    """A tokenizer's chat template in an environment where pieces of a text stay tracked when they are joined.

    opaque: it does something that may ask a text unseen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._variables = dict(tokenizer.special_tokens_map)
        source = tokenizer.get_chat_template()
        environment = chat_template_utils._compile_jinja_template(source).environment.overlay()
        environment.concat = _join
        environment.filters = {
            **environment.filters,
            "join": lambda value, d="", attribute=None: _join_by(value, d, attribute, environment),
            "safe": lambda value: value,
            **{name: _open_filter(environment.filters[name]) for name in ("tojson", "string")},
        }
        tree = environment.parse(source)
        self.opaque = _is_opaque(tree)
        tree = _TrackOperators().visit(tree)
        self._template = environment.template_class.from_code(
            environment,
            environment.compile(tree),
            environment.make_globals({_JOIN_NAME: lambda *parts: _join(parts), _IN_NAME: _is_in}),
        )

    def render(
        self, messages: list[dict[str, Any]], texts: list[tuple[int, str]], *, add_generation_prompt: bool
    ) -> tuple[str, Questions]:
        """Render with some texts tracked, each named by (number of its message, key). Returns: text and questions."""
        questions = Questions()
        tracked = [dict(message) for message in messages]
        for index, name in texts:
            if index < len(tracked):
                tracked[index][name] = _Text.of(tracked[index][name], questions, whole=True)
        rendered = self._template.render(
            messages=tracked, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._variables
        )
        return str.__str__(rendered), questions


_JOIN_NAME, _IN_NAME = "join_tracked_texts", "is_in_tracked"


class _TrackOperators(NodeTransformer):
    """`a ~ b` and `a in b` work outside of everything that can be tracked; here they become calls."""

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) != 1 or node.ops[0].op not in ("in", "notin"):
            return node
        name = nodes.Name(_IN_NAME, "load")
        call = nodes.Call(name, [node.expr, node.ops[0].expr], [], None, None, lineno=node.lineno)
        return call if node.ops[0].op == "in" else nodes.Not(call, lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.Name(_JOIN_NAME, "load"), node.nodes, [], None, None, lineno=node.lineno)


def _is_opaque(tree: nodes.Template) -> bool:
    filters = {node.name for node in tree.find_all(nodes.Filter)}
    formats = any(isinstance(node.left, nodes.Const) for node in tree.find_all(nodes.Mod))
    methods = {node.attr for node in tree.find_all(nodes.Getattr)} & {"join", "format", "format_map"}
    chained = any(len(node.ops) > 1 for node in tree.find_all(nodes.Compare))
    of_constants = any(isinstance(node.node, nodes.Const) for node in tree.find_all(nodes.Getattr))
    tests = any(
        isinstance(arg, nodes.Const) and arg.value == "in" for node in tree.find_all(nodes.Filter) for arg in node.args
    )
    return bool(filters - _FILTERS or formats or methods or chained or of_constants or tests)


def _is_in(value: Any, container: Any) -> bool:
    if type(value) is _Text and not isinstance(container, list | tuple):
        value.questions.open = True
    return value in container


def _open_filter(function: Any) -> Any:
    def asked(*args: Any, **options: Any) -> Any:
        for text in _texts_in(args):
            text.questions.open = True
        return function(*args, **options)

    for name, value in vars(function).items():  # jinja's marks: pass_context and the like
        setattr(asked, name, value)
    return asked


def _texts_in(value: Any) -> Iterator[_Text]:
    if type(value) is _Text:
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner)


def _join(pieces: Iterable[Any]) -> str:
    parts = [piece if isinstance(piece, str) else str(piece) for piece in pieces]
    parts = [part for part in parts if type(part) is _Text or part]
    tracked = [part for part in parts if type(part) is _Text]
    if not tracked:
        return "".join(parts)
    return parts[0] if len(parts) == 1 else _Text.of("".join(parts), tracked[0].questions, whole=False)


def _join_by(values: Iterable[Any], separator: str, attribute: str | None, environment: Any) -> str:
    if attribute is not None:
        values = [environment.getitem(value, attribute) for value in values]
    parts: list[Any] = []
    for value in values:
        parts += [separator, value] if parts else [value]
    return _join(parts)
