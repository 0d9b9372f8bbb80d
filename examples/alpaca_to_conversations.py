"""Convert alpaca files to conversations: python examples/alpaca_to_conversations.py OUT.json IN.json[#N] ...

Reads [{"instruction", "input", "output"}, ...]; `#N` takes the first N rows of a file. Rows with an empty output
are counted and left out.
"""

import json
import sys
from pathlib import Path


def convert(row: dict[str, str], row_id: str) -> dict[str, object] | None:
    """One conversation; the input follows the instruction on a line of its own. None for an empty output."""
    if not row["output"].strip():
        return None
    question = "\n".join(text for text in (row["instruction"], row.get("input", "")) if text)
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": row["output"]}]
    return {"id": row_id, "conversations": turns}


def main(out: str, *sources: str) -> None:
    """Write one file of conversations."""
    conversations, num_rows = [], 0
    for source in sources:
        path, _, limit = source.partition("#")
        rows = json.loads(Path(path).read_text(encoding="utf-8"))[: int(limit) if limit else None]
        num_rows += len(rows)
        converted = (convert(row, f"{Path(path).stem}-{index}") for index, row in enumerate(rows))
        conversations += [row for row in converted if row is not None]
    Path(out).write_text(json.dumps(conversations, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(
        f"{out}: {len(conversations)} conversations, {num_rows - len(conversations)} rows with an empty output left out"
    )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
