r"""A report on a mixture, to be read before a training is started.

    python -m processing_mmgpt.data.report mixture.yaml --processor FOLDER --output report --max_length 512

It reads every row once, one at a time: rows for each source, records that cannot be read, pictures missing or broken,
lengths in tokens, rows that are too long, the lengths of answers, and three samples with what is learnt in colour.
`--output` gets `report.txt` and `report.png`.
"""

import argparse
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..processing_mmgpt import MMGPTProcessor
from .collator import MMGPTCollator
from .mixture import open_source
from .reading import Reading
from .recipe import Mixture, Source, read_mixture


SHORT = 5  # words that a short answer has at most
# Multimodal-GPT (https://arxiv.org/abs/2305.04790) found that short answers, even few, make every reply short.
SHORT_SHARE = 0.2
EDGES = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200)  # of the histogram of words in an answer: 0, 1, 2, 3-4, 5-9, ...
TOKEN_BIN = 32
LEARNT, PLAIN = "\x1b[32m", "\x1b[0m"


@dataclass
class Findings:
    """Findings in one source; only counts, so that it stays small.

    Args:
        rows: Records in its files.
        problems: Rows that cannot be trained on, by reason.
        tokens: Rows by length, in steps of `TOKEN_BIN` tokens.
        answers: Answers by words, in the classes of `EDGES`.
        cut: Rows that lose a turn at `max_length`.
        lost: Rows of which nothing is left at `max_length`.
        short: Answers of `SHORT` words or less.
        longest: The most tokens of a row.
    """

    rows: int = 0
    problems: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)
    answers: Counter = field(default_factory=Counter)
    cut: int = 0
    lost: int = 0
    short: int = 0
    longest: int = 0


def examine(
    source: Source,
    mixture: Mixture,
    processor: MMGPTProcessor,
    max_length: int | None = None,
    limit: int | None = None,
) -> tuple[Findings, list[dict[str, Any]]]:
    """Read a source row by row.

    Args:
        source: One of the sources of `mixture`.
        mixture: A mixture that `read_mixture` read.
        processor: What renders and tokenizes.
        max_length: The most tokens of a row in the training.
        limit: The most rows to look at, from the start.

    Returns:
        The findings, and a record for a sample, if there is one.
    """
    findings, samples = Findings(), []
    for record in _records(source, mixture, findings, limit):
        length = len(processor.encode_chat(record["messages"], record["images"]).input_ids)
        findings.tokens[length // TOKEN_BIN] += 1
        findings.longest = max(findings.longest, length)
        if max_length is not None and length > max_length:
            _too_long(record, MMGPTCollator(processor, max_length), findings)
        for message in record["messages"]:
            if message["role"] == "assistant":
                words = len("".join(part["text"] for part in message["content"]).split())
                findings.answers[max(edge for edge in EDGES if edge <= words)] += 1
                findings.short += words <= SHORT
        if not samples:
            samples.append(record)
    return findings, samples


def _records(source: Source, mixture: Mixture, findings: Findings, limit: int | None) -> Iterator[dict[str, list]]:
    """The records of a source that can be trained on; what is wrong with the others is counted."""
    reading = Reading(mixture.model_copy(update={"on_bad_image": "skip"}), 0, {})  # so that pictures are opened
    for row in itertools.islice(open_source(source, mixture), limit):
        findings.rows += 1
        try:
            record = reading.record(row)
            images = [reading.image(image) for image in record["images"]]
        except ValueError as error:
            findings.problems[str(error).partition(": ")[0]] += 1
        else:
            yield {**record, "images": images}


def _too_long(record: dict[str, Any], collator: MMGPTCollator, findings: Findings) -> None:
    """Count a row that is too long as the collator cuts it."""
    try:
        collator.encode(record)
        findings.cut += 1
    except ValueError:  # not even its first exchange fits
        findings.lost += 1


# What is printed


def describe(name: str, findings: Findings, max_length: int | None = None) -> list[str]:
    """Describe the findings in a source, in lines."""
    rows = sum(findings.tokens.values())
    lines = [f"{name}: {findings.rows:,} rows, {rows:,} of them can be trained on"]
    lines += [f"  ! {count:,} rows: {reason}" for reason, count in findings.problems.most_common()]
    if rows == 0:
        return lines
    median, most = _quantile(findings.tokens, 0.5), _quantile(findings.tokens, 0.99)
    lines.append(f"  tokens: half of the rows below {median}, 99 % below {most}, the longest {findings.longest:,}")
    if max_length is not None:
        lines.append(f"  at max_length {max_length}, {findings.cut:,} rows lose a turn and {findings.lost:,} are lost")
    answers = sum(findings.answers.values())
    tallest = max(findings.answers.values())
    for start, end in zip(EDGES, [*EDGES[1:], None], strict=True):
        words = f"{start}+" if end is None else str(start) if end == start + 1 else f"{start}-{end - 1}"
        count = findings.answers[start]
        lines.append(f"  {words:>8} words {count:>9,} {'#' * round(40 * count / tallest)}")
    share = findings.short / answers
    lines.append(f"  short answers ({SHORT} words or less): {share:.0%}")
    if share > SHORT_SHARE:
        lines.append("  ! So many short answers make every reply short, whatever is asked (arXiv 2305.04790).")
    return lines


def _quantile(counts: Counter, share: float) -> int:
    seen, wanted = 0, share * sum(counts.values())
    for step in sorted(counts):
        seen += counts[step]
        if seen >= wanted:
            return (step + 1) * TOKEN_BIN
    return 0


def render(record: dict[str, Any], processor: MMGPTProcessor) -> str:
    """Render a record as it is tokenized, with what is learnt in colour."""
    chat = processor.encode_chat(record["messages"], record["images"])
    text, run, inside = "", [], 0
    for token, learnt in [*zip(chat.input_ids, chat.learnt, strict=True), (None, None)]:
        if run and learnt != inside:
            # Somebody else's text on somebody's terminal: no control characters but line breaks and tabs.
            piece = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "?", processor.tokenizer.decode(run))
            text, run = text + (f"{LEARNT}{piece}{PLAIN}" if inside else piece), []
        run, inside = [*run, token], learnt
    return text


def draw(findings: dict[str, Findings], path: Path) -> None:
    """Draw the histograms of tokens and answers, a row of the picture for each source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 2 * len(findings)), layout="constrained")
    axes = figure.subplots(len(findings), 2, squeeze=False)
    for (left, right), (name, found) in zip(axes, findings.items(), strict=True):
        steps = sorted(found.tokens)
        left.bar([(step + 0.5) * TOKEN_BIN for step in steps], [found.tokens[s] for s in steps], width=TOKEN_BIN)
        left.set(title=name, xlabel="tokens of a row", ylabel="rows")
        right.bar([str(edge) for edge in EDGES], [found.answers[edge] for edge in EDGES])
        right.set(title=name, xlabel="words of an answer, from", ylabel="answers")
    figure.savefig(path)


def report(
    mixture: Mixture, processor: MMGPTProcessor, max_length: int | None = None, limit: int | None = None
) -> tuple[str, dict[str, Findings]]:
    """Report on a mixture.

    Args:
        mixture: A mixture that `read_mixture` read.
        processor: What renders and tokenizes.
        max_length: The most tokens of a row in the training.
        limit: The most rows of each source to look at.

    Returns:
        The text, and the findings in each source.
    """
    findings, samples, lines = {}, [], []
    for source in mixture.sources:
        found, sample = examine(source, mixture, processor, max_length, limit)
        findings[source.name] = found
        samples += sample
        kind = "with pictures" if source.has_images() else "text"
        lines += describe(f"{source.name} ({source.reader}, {kind})", found, max_length)
    total = sum(found.rows for found in findings.values())
    bad = sum(sum(found.problems.values()) for found in findings.values())
    lines.append(f"In all: {total:,} rows, {bad:,} cannot be trained on.")
    # The first, the middle and the last source.
    for record in [samples[number] for number in sorted({0, len(samples) // 2, len(samples) - 1})] if samples else []:
        lines += ["", "-" * 40, render(record, processor)]
    return "\n".join(lines) + "\n", findings


def main() -> None:
    """Read the command line and report."""
    parser = argparse.ArgumentParser(description="Report on a mixture before it is trained on.")
    parser.add_argument("mixture", help="the YAML file")
    parser.add_argument("--processor", required=True, help="folder or Hub id of the model")
    parser.add_argument("--output", type=Path, help="folder for report.txt and report.png")
    parser.add_argument("--max_length", type=int, help="the most tokens of a row in the training")
    parser.add_argument("--limit", type=int, help="the most rows of each source to look at")
    arguments = parser.parse_args()
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)  # before the work, not after
    processor = MMGPTProcessor.from_pretrained(arguments.processor)
    text, findings = report(read_mixture(arguments.mixture), processor, arguments.max_length, arguments.limit)
    sys.stdout.write(text)
    if arguments.output:
        plain = text.replace(LEARNT, "").replace(PLAIN, "")
        (arguments.output / "report.txt").write_text(plain, encoding="utf-8")
        draw(findings, arguments.output / "report.png")


if __name__ == "__main__":
    main()
