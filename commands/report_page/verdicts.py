"""What may be said of a row, in words, and the orders in which rows are listed. Nothing heavy: for --help."""

# Losses of a row are those of its epochs, each the mean of its visits there.
VERDICTS = {
    "not finite": "a loss of it is not a finite number",
    "never fell": "no later loss is below 0.9 times its first one, and the last is above the median of all last losses",
    "spiked": "a loss is more than twice the one before, by more than a tenth of the median of all first losses",
    "forgotten": "its last loss is over 1.5 times its lowest, by more than a tenth of the median of all first losses",
    "known from the start": "its first loss is below a fifth of the median of all first losses",
    "disagrees": "another row has the same prompt and another answer",
}

SORTS = {
    "excess": "mean loss over the first three epochs, against rows of like length",
    "loss": "last loss",
    "rise": "last loss above the lowest",
    "first": "first loss",
    "tokens": "supervised tokens",
    "place": "the order of the data",
}
