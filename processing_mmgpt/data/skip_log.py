"""The log of skipped rows, to which many processes add, and its counts."""

import json
import os
from collections import Counter
from pathlib import Path


def log_skip(skip_log: str | os.PathLike, source: str, place: str, problem: str) -> None:
    """Add a line to the log, in one write, so that many processes can share it.

    Args:
        skip_log: The file; it and its folder are made if they are missing.
        source: The source of the row.
        place: The row; one that is logged twice counts once.
        problem: The reason, up to the first ": ", and details.
    """
    reason, _, details = problem.partition(": ")
    entry = {"source": source, "place": place, "reason": reason, "details": details}
    Path(skip_log).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(skip_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(log, (json.dumps(entry) + "\n").encode())
    finally:
        os.close(log)


def count_skips(skip_log: str | os.PathLike) -> Counter[tuple[str, str]]:
    """Count the rows that a log of skips names, by source and reason.

    A row that is logged several times, in several epochs or by several workers, counts once. Lines are only added to
    the log: delete it to start again.
    """
    if not os.path.exists(skip_log):
        return Counter()
    with open(skip_log, encoding="utf-8") as log:
        rows = {(entry["source"], entry["reason"], entry["place"]) for entry in map(json.loads, log)}
    return Counter((source, reason) for source, reason, _ in rows)
