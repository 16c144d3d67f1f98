"""Checkpoints that are complete or skipped, in a folder that belongs to one run."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..saving.whole import whole


logger = logging.get_logger(__name__)

COMPLETE = "complete.json"  # in a checkpoint: size and SHA-256 of each of its files, and of the data it was made from


class WholeCheckpoints(TrainerCallback):
    """Confirm a checkpoint when all of it is on the disk, and only then delete older ones.

    The Trainer of transformers writes `checkpoint-N` file by file, and deletes old ones by the clock before all is
    on the disk. Use it with [`last_checkpoint`]:

        trainer = Trainer(..., args=args, callbacks=[WholeCheckpoints(args, data)])
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))

    Args:
        args: The Trainer's arguments. Their `save_total_limit` is taken over and set to `None`.
        data: The files that the run learns from. A checkpoint remembers them; a resume warns of each that has
            changed.
    """

    def __init__(self, args: TrainingArguments, data: Iterable[str | os.PathLike] = ()):
        self.limit, args.save_total_limit = args.save_total_limit, None
        self.data = [Path(path) for path in data]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Warn of data that have changed since the checkpoint that the run resumes from."""
        if not args.should_save:
            return
        self.data_sums = {str(path): _sums(path) for path in self.data}
        kept = _folder(args, state) / COMPLETE
        before = json.loads(kept.read_text())["data"] if kept.is_file() else self.data_sums
        for path in sorted({*before, *self.data_sums}):
            was, now = before.get(path), self.data_sums.get(path)
            if was != now:
                logger.warning(
                    f"{path} has changed since {kept.parent.name} was written: {_say(was)} then, {_say(now)} now. The "
                    "run goes on with what is there now; the rows that it passes over may be others than it has used."
                )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Confirm the checkpoint that all processes have written, then delete older ones."""
        PartialState().wait_for_everyone()
        if not args.should_save:
            return
        folder = _folder(args, state)
        files = [path for path in folder.rglob("*") if path.is_file() and path != folder / COMPLETE]
        sums = {path.relative_to(folder).as_posix(): _sums(path) for path in files}
        with whole(folder / COMPLETE) as unfinished:
            unfinished.write_text(json.dumps({"files": sums, "data": self.data_sums}, indent=1) + "\n")
            for path in (*files, unfinished):
                _flush(path)
        _rotate(folder, state.best_model_checkpoint, self.limit)


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Find the last complete checkpoint of a run with [`WholeCheckpoints`]; `None` if there is none.

    Later ones that are cut off or damaged are skipped, with a warning that says why. All processes have to call this,
    and get what the main one finds.

    Args:
        output_dir: The folder that the run writes into.

    Raises:
        ValueError: If there are checkpoints and all are damaged.
    """
    return _by_main_process(_find_last, Path(output_dir))


@contextmanager
def one_run(output_dir: str | os.PathLike) -> Iterator[None]:
    """Reserve an output folder for one run, of any number of processes, until the block or the processes end.

    If a worker that reads data dies in the block, its error gets a note on the likely cause.

    Args:
        output_dir: The folder, made if it does not exist. A file `.lock` stays in it.

    Raises:
        OSError: If another run has it, or it cannot be written to.
    """
    lock = FileLock(Path(output_dir, ".lock"), timeout=0)
    _by_main_process(_acquire, lock)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "DataLoader worker" in str(error):
            error.add_note(
                "A worker that reads data has died. If it was killed or ran out of memory, the machine has too little "
                "for so many: lower dataloader_num_workers or dataloader_prefetch_factor. --resume goes on from "
                "the last whole checkpoint."
            )
        raise
    finally:
        lock.release()


def _by_main_process(function: Callable, *given: object) -> object:
    """Call a function on the main process, and return its result, or raise its error, on all."""
    said = [None, None]
    if PartialState().is_main_process:
        try:
            said[0] = function(*given)
        except (OSError, ValueError) as error:
            said[1] = error
    result, error = broadcast_object_list(said)
    if error is not None:
        raise error
    return result


def _acquire(lock: FileLock) -> None:
    """Take the lock of an output folder for this process."""
    folder = Path(lock.lock_file).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OSError(f"Another run writes into {folder}: wait for its end, or give another output_dir.") from None
    except OSError as error:
        raise OSError(f"{folder} cannot be written into: {error.strerror}. Give another output_dir.") from error


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint of the step that the run is at."""
    return Path(args.output_dir, f"checkpoint-{state.global_step}")


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, the last step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _step(path) is not None]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def _find_last(output_dir: Path) -> str | None:
    damaged = []
    for path in _checkpoints(output_dir):
        problem = _problem(path)
        if problem is None:
            return str(path)
        logger.warning(f"{path} is passed over: {problem}.")
        if (path / COMPLETE).exists():
            damaged.append(path.name)
    if damaged:
        raise ValueError(
            f"{output_dir} holds no checkpoint to go on from: {damaged} were whole once, and are damaged. Take them "
            "away to begin anew."
        )
    return None


def _problem(checkpoint: Path) -> str | None:
    """Say why a checkpoint is not complete; `None` if it is."""
    try:
        kept = json.loads((checkpoint / COMPLETE).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {COMPLETE}, for its writing was cut off, or it is none of WholeCheckpoints"
    except (ValueError, KeyError, TypeError) as error:
        return f"its {COMPLETE} cannot be read ({error!r})"
    for name, was in kept.items():
        now = _sums(checkpoint / name)
        if now != was:
            return f"{name} has changed since it was written, {_say(was)} then, {_say(now)} now"
    return None


def _sums(path: Path) -> dict[str, int | str] | None:
    """Size in bytes and SHA-256 of a file; `None` if it is not there."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
    except FileNotFoundError:
        return None


def _say(sums: dict[str, int | str] | None) -> str:
    """Say what [`_sums`] found."""
    return "not there" if sums is None else f"{sums['bytes']:,} bytes with SHA-256 {sums['sha256'][:12]}..."


def _flush(path: Path) -> None:
    """Flush a file to the disk, in case the machine fails with the process."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _rotate(newest: Path, best: str | None, limit: int | None) -> None:
    """Keep the best checkpoint and the newest ones up to the limit, by their steps; all without a limit.

    Those of later steps belong to an abandoned run and are not continued.
    """
    others = [path for path in _checkpoints(newest.parent) if path != newest]
    for path in others:
        if _step(path) > _step(newest):
            (path / COMPLETE).unlink(missing_ok=True)
    if limit is None or limit <= 0:
        return
    first = [path for path in others if best is not None and path.name == Path(best).name]
    kept = first + [path for path in others if path not in first and (path / COMPLETE).exists()]
    for path in others:
        if path not in kept[: max(limit - 1, len(first))]:
            shutil.rmtree(path, ignore_errors=True)
