"""`zimage-rt bench`: speed, memory and accuracy of bundles, each combination in a process of its own.

The runner (`run`) starts a worker (`worker`) for each case, watches its memory from outside (`sampling`), checks the
image (`accuracy`) and appends a row (`schema`) to ``results.jsonl``. Reports (`report`, `row_tables`, `plots`) and
comparisons (`compare`) are made from rows alone. Each system is one file in `systems`.
"""
