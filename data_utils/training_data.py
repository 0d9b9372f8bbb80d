"""Everything a run trains and evaluates on, from files to tokenised rows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from data_utils.cache import RowCache
from data_utils.conversations import DataOptions
from data_utils.dataset import TokenizedRows, count_overlap, load_rows
from data_utils.layout import count_epoch
from data_utils.report import Account
from data_utils.sources import read_lines
from data_utils.template import ChatTemplate

GENERAL_FILE = Path(__file__).parent / "general.jsonl"  # prose, code, arithmetic and refusals, in English and Chinese


@dataclass
class TrainingData:
    """What is trained and evaluated on, and how it was rendered.

    eval_account: None where the evaluation's rows are a share of the training data; account is of both then.
    samples: (text, token ids) of prompts to answer. cache: keeps the rows' files, which may be temporary.
    general_rows: on which forgetting is measured.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    rows: TokenizedRows
    account: Account
    eval_rows: TokenizedRows | None
    eval_account: Account | None
    samples: list[tuple[str, list[int]]]
    cache: RowCache
    general_rows: TokenizedRows | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        all_rows = (self.rows, self.eval_rows, self.general_rows)
        return max(int(rows.lengths.max()) for rows in all_rows if rows is not None)

    @property
    def largest_token_id(self) -> int:
        """Of all rows."""
        return max(each.largest_token_id for each in (self.account, self.eval_account) if each is not None)

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """What must be the same in all processes of a run."""
        evaluation = None if self.eval_account is None else self.eval_account.fingerprint
        return {"the tokenised data": self.account.fingerprint, "the tokenised evaluation data": evaluation}


def read_training_data(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    options: DataOptions,
    *,
    paths: list[str],
    eval_paths: list[str] | None,
    eval_share: float | None,
    prompts_path: str | None,
    general_path: str | Path | None,
    cache: RowCache,
    say: Callable[[str], None],
) -> TrainingData:
    """Tokenise the files, or find them tokenised, and account for every row.

    eval_share: of the conversations, held back in place of eval_paths. prompts_path: a file with a prompt a line.
    general_path: text to measure forgetting on.
    say: takes lines for the log.

    Raises: DataError: mistakes in the data.
    """
    rows, account = load_rows(paths, template, options, cache=cache, weighted=True)
    say("data: " + "\n      ".join(account.describe()))
    eval_rows, eval_account = None, None
    if eval_paths:
        eval_rows, eval_account = load_rows(eval_paths, template, options, cache=cache)
        say("evaluation data: " + "\n      ".join(eval_account.describe()))
        if overlap := count_overlap(rows, eval_rows):
            say(f"evaluation data: {overlap:,} conversations are in the training data, too")
    if eval_share is not None:
        rows, eval_rows = rows.split(eval_share, options.seed)
        different = len(np.unique(eval_rows.conversations()))
        say(
            f"evaluation data: {different:,} conversations ({len(eval_rows):,} rows) are held back (--eval_share "
            f"{eval_share:g}); {len(rows):,} rows are trained"
            + (f", {count_epoch(rows.groups):,} an epoch by their files' weights" if rows.groups else "")
        )
    prompts = read_lines(prompts_path) if prompts_path else []
    samples = [(line, template.encode_prompt([{"role": "user", "content": line}])) for line in prompts]
    general_rows = None
    if general_path is not None:
        general_rows, general = load_rows([general_path], template, options, cache=cache)
        say(f"general text, to measure what is forgotten: {general.rows:,} rows, {general.supervised_tokens:,} tokens")
    return TrainingData(tokenizer, template, rows, account, eval_rows, eval_account, samples, cache, general_rows)
