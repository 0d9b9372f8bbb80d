"""llama.cpp's converter, in a process of its own: python run_converter.py LLAMA_CPP PRE_TOKENIZER ARGUMENT...

The converter knows a tokenizer by a hash of what it makes of one text, so every vocabulary that it has not seen is
unknown to it. For those PRE_TOKENIZER is what it takes (may be empty: then it fails as it does).
"""

import runpy
import sys
from pathlib import Path
from typing import Any


def main(llama_cpp: str, pre_tokenizer: str, arguments: list[str]) -> None:
    """Convert. arguments: of convert_hf_to_gguf.py."""
    sys.path[:1] = [llama_cpp, str(Path(llama_cpp) / "gguf-py")]  # in the place of this file's directory
    from conversion.base import TextModel

    by_hash = TextModel.get_vocab_base_pre

    def find(model: Any, tokenizer: Any) -> str:
        try:
            return str(by_hash(model, tokenizer))
        except NotImplementedError:
            if not pre_tokenizer:
                raise
            return pre_tokenizer

    TextModel.get_vocab_base_pre = find
    sys.argv[1:] = arguments
    runpy.run_path(str(Path(llama_cpp) / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
