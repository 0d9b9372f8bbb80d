"""The report of runs: what is read of them, what the losses of rows say, and the page."""
