"""`zimage-rt bench`: speed, memory and accuracy of bundles, each combination in a process of its own.

The runner (`run`) starts a worker (`worker`) for each case, watches its memory from outside (`sampling`), judges the
picture (`accuracy`) and appends a row (`schema`) to ``results.jsonl``; reports (`report`, `page`, `plots`) and
comparisons (`compare`) are made from rows alone. Other systems take part through one file each in `systems`.
"""
