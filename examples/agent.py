"""An agent with two tools, by OpenAI's client: python examples/agent.py "How old is the Eiffel Tower?" --model NAME.

Serve a model that was trained to call tools (python serve.py MODEL), then ask. The model calls, this program runs
what was called and tells the result, until the model answers.
"""

import argparse
import json
from collections.abc import Callable
from datetime import date
from typing import Any

import openai

_BUILT = {"Eiffel Tower": 1889, "长城": -220}


def year_built(name: str) -> str:
    """When something was built."""
    return str(_BUILT.get(name, "not known"))


def subtract(a: int, b: int) -> str:
    """A difference."""
    return str(a - b)


FUNCTIONS: dict[str, Callable[..., str]] = {"year_built": year_built, "subtract": subtract}


def describe(function: str, description: str, **parameters: str) -> Any:
    """A tool as the API wants it. parameters: JSON types by name."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": function, "description": description, "parameters": schema}}


TOOLS = [
    describe("year_built", "The year in which something was built", name="string"),
    describe("subtract", "a minus b", a="integer", b="integer"),
]


def run_call(call: Any) -> str:
    """What a call gives; of a wrong one its error, from which the model may go on."""
    try:
        return FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
    except (KeyError, TypeError, ValueError) as error:
        return f"error: {type(error).__name__}: {error}"


def answer(client: openai.OpenAI, model: str, question: str, most_rounds: int = 8) -> str:
    """Ask, run what is called, and go on until there are no calls."""
    messages: list[Any] = [
        {"role": "system", "content": f"Today is {date.today()}."},
        {"role": "user", "content": question},
    ]
    for _ in range(most_rounds):
        reply = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0)
        message: Any = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            result = run_call(call)
            print(f"{call.function.name}({call.function.arguments}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return f"no answer after {most_rounds} rounds of calls"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="its name at the server (/v1/models)")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api_key", default="none")
    args = parser.parse_args()
    print(answer(openai.OpenAI(base_url=args.url, api_key=args.api_key), args.model, args.question))


if __name__ == "__main__":
    main()
