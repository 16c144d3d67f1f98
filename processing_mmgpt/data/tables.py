"""Tables of annotation records: written to the disk once, each record checked, and mapped into memory.

No file of a source is opened here, because `datasets` replaces `open` and `os.path` in the module of a builder.
"""

import itertools
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import pyarrow as pa

from .annotations import problem_of, read_file
from .kept import open_table, table_folder


NAME = "mmgpt_annotations"
FORMAT = "1"  # to be raised where readers or checks change: tables that were checked otherwise are not used
ROWS_PER_TABLE = 5_000
COLUMNS = datasets.Features(
    {
        "source": datasets.Value("string"),
        "file": datasets.Value("int32"),  # its number in the source
        "row": datasets.Value("int64"),  # its line, or its place in the list, from 0
        "record": datasets.Value("large_string"),  # JSON
        "problem": datasets.Value("string"),  # "reason" or "reason: details"; null if it can be read
    }
)


@dataclass
class AnnotationsConfig(datasets.BuilderConfig):
    """What the table of a source depends on; a change makes another table."""

    files: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()
    reader: str = ""
    root: str | None = None
    where: str = "{}"
    stamps: tuple = ()


class Annotations(datasets.ArrowBasedBuilder):
    """Write the rows of a source into a table on the disk once, or stream them; a file is a shard."""

    BUILDER_CONFIG_CLASS = AnnotationsConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=COLUMNS)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        files = list(self.config.files)
        answers = list(self.config.annotations) or [None] * len(files)
        kwargs = {"files": files, "annotations": answers, "numbers": list(range(len(files)))}
        return [datasets.SplitGenerator(name="train", gen_kwargs=kwargs)]

    def _generate_tables(self, files: list, annotations: list, numbers: list) -> Iterator[tuple[Any, pa.Table]]:
        rng, where = random.Random(0), json.loads(self.config.where)
        for number, path, answers in zip(numbers, files, annotations, strict=True):
            checked = (
                (row, text, problem or problem_of(record, text, self.config.reader, self.config.root, rng))
                for row, text, record, problem in read_file(path, answers, self.config.reader, where)
            )
            while batch := list(itertools.islice(checked, ROWS_PER_TABLE)):
                rows, texts, problems = zip(*batch, strict=True)
                table = {
                    "source": pa.repeat(self.config.name, len(batch)),
                    "file": pa.repeat(pa.scalar(number, pa.int32()), len(batch)),
                    "row": rows,
                    "record": texts,
                    "problem": problems,
                }
                yield datasets.builder.Key(number, rows[0]), pa.table(table, schema=COLUMNS.arrow_schema)


def open_annotations(
    name: str, files: list[str], annotations: list[str], reader: str, root: str | None, where: dict, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    """Open the rows of a source, with the columns of `COLUMNS`.

    Raises:
        ValueError: If a file is not JSON, or not a document that the reader knows.
    """
    files, annotations = ([os.path.abspath(path) for path in paths] for paths in (files, annotations))
    stats = [os.stat(path) for path in (*files, *annotations)]
    given = {
        "files": tuple(files),
        "annotations": tuple(annotations),
        "reader": reader,
        "root": root and os.path.abspath(root),
        "where": json.dumps(where, sort_keys=True),
        "stamps": tuple((stat.st_size, stat.st_mtime_ns) for stat in stats),
    }
    folder = table_folder(NAME, FORMAT, name, given)
    make = partial(Annotations, cache_dir=str(folder), config_name=name, dataset_name=NAME, hash=FORMAT, **given)
    if streaming:
        return make().as_streaming_dataset(split="train")
    return open_table(folder, lambda: _prepare(make()))


def _prepare(builder: Annotations) -> datasets.Dataset:
    builder.download_and_prepare()
    if not builder.info.splits["train"].num_examples:
        return datasets.Dataset.from_dict({name: [] for name in COLUMNS}, features=COLUMNS)
    return builder.as_dataset(split="train")
