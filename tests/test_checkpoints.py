"""Checkpoints that are whole or passed over, and folders that one run has for itself."""

import errno
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from modeling_mmgpt.training import checkpoints
from modeling_mmgpt.training.checkpoints import WholeCheckpoints, last_checkpoint, one_run


@pytest.fixture(autouse=True)
def loud():
    logging.enable_propagation()
    yield
    logging.disable_propagation()


@pytest.fixture
def arguments(tmp_path):
    def make(limit=None):
        return TrainingArguments(str(tmp_path / "out"), save_total_limit=limit, use_cpu=True, report_to="none")

    return make


def save(args, callback, step, best=None) -> Path:
    """What a Trainer does at a step that it saves: write the files, then tell the callbacks."""
    folder = Path(args.output_dir, f"checkpoint-{step}")
    (folder / "part").mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_bytes(bytes(step) + b"weights")
    (folder / "part" / "optimizer").write_bytes(b"state of step %d" % step)
    callback.on_save(args, state_at(step, best), TrainerControl())
    return folder


def state_at(step, best=None) -> TrainerState:
    state = TrainerState(best_model_checkpoint=best and str(best))
    state.global_step = step
    return state


def begin(args, data=(), step=0) -> WholeCheckpoints:
    """A run that begins, or goes on from a step."""
    callback = WholeCheckpoints(args, data)
    callback.on_train_begin(args, state_at(step), TrainerControl())
    return callback


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def test_what_is_whole_is_gone_on_from(arguments, tmp_path):
    assert last_checkpoint(tmp_path / "out") is None
    args = arguments()
    callback = begin(args)
    saved = [save(args, callback, step) for step in (2, 10)]
    assert last_checkpoint(args.output_dir) == str(saved[1])  # by number: "10" comes before "2"


def test_old_ones_go_by_their_number_whatever_the_clock_says(arguments):
    args = arguments(2)
    callback = begin(args)
    assert args.save_total_limit is None  # else the Trainer rotates before the new one is whole
    for step in (2, 4, 6):
        folder = save(args, callback, step)
        os.utime(folder, (1e9 - step, 1e9 - step))  # a clock that runs back
    assert names(folder.parent) == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize(("limit", "kept"), [(1, {2, 8}), (2, {2, 8}), (3, {2, 6, 8}), (None, {2, 4, 6, 8})])
def test_the_best_one_stays(arguments, limit, kept):
    args = arguments(limit)
    callback = begin(args)
    best = None
    for step in (2, 4, 6, 8):
        folder = save(args, callback, step, best)
        best = best or folder
    assert names(folder.parent) == {f"checkpoint-{step}" for step in kept}


def test_nothing_is_deleted_before_the_new_one_is_whole(arguments, monkeypatch):
    args = arguments(1)
    callback = begin(args)
    first = save(args, callback, 2)

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "_flush", full)
    with pytest.raises(OSError, match="No space"):
        save(args, callback, 4)
    assert last_checkpoint(args.output_dir) == str(first)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


SPOILED = {
    "a flipped bit": (lambda folder: flip(folder / "weights"), r"weights has changed since .*, 11 bytes .*, 11 bytes"),
    "cut off": (lambda folder: (folder / "weights").write_bytes(b"wei"), "weights has changed since .* 3 bytes"),
    "gone": (lambda folder: (folder / "part" / "optimizer").unlink(), "part/optimizer has changed .* not there now"),
    "not confirmed": (lambda folder: (folder / "complete.json").unlink(), "it has no complete.json"),
    "half confirmed": (lambda folder: (folder / "complete.json").write_text('{"fi'), "complete.json cannot be read"),
    "a list": (lambda folder: (folder / "complete.json").write_text("[]"), "complete.json cannot be read"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_one_is_passed_over_and_why_is_said(arguments, caplog, how):
    spoil, said = SPOILED[how]
    args = arguments()
    callback = begin(args)
    first, second = (save(args, callback, step) for step in (2, 4))
    spoil(second)
    assert last_checkpoint(args.output_dir) == str(first)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"{second} is passed over: ")
    assert re.search(said, record.getMessage())


def test_where_all_are_damaged_the_run_does_not_begin_anew_in_silence(arguments):
    args = arguments()
    flip(save(args, begin(args), 2) / "weights")
    with pytest.raises(ValueError, match=r"no checkpoint to go on from: \['checkpoint-2'\]"):
        last_checkpoint(args.output_dir)


def test_later_steps_of_an_earlier_run_are_not_gone_on_from(arguments):
    args = arguments()
    callback = begin(args)
    for step in (2, 4, 6):
        save(args, callback, step)
    third = save(args, begin(args), 3)
    assert last_checkpoint(args.output_dir) == str(third)
    assert names(third.parent) == {f"checkpoint-{step}" for step in (2, 3, 4, 6)}


def test_data_that_have_changed_are_named(arguments, tmp_path, caplog):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("{}\n")
    second.write_text("{}\n")
    args = arguments()
    save(args, begin(args, [first, second]), 2)
    begin(args, [first, second], step=2)
    assert not caplog.records
    first.write_text("[]\n")
    begin(args, [first], step=2)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith(f"{first} has changed since checkpoint-2 was written: 3 bytes with SHA-256 ca3d16")
    assert f"{second} has changed" in said[1] and "not there now" in said[1]


def hold(folder, ready, done) -> None:
    with one_run(folder):
        ready.set()
        done.wait()


def test_a_folder_is_for_one_run_until_it_ends_or_dies(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", ready, done))
    process.start()
    assert ready.wait(60)
    with pytest.raises(OSError, match=f"Another run writes into {tmp_path / 'out'}"), one_run(tmp_path / "out"):
        pass
    with one_run(tmp_path / "other"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for _ in range(2):
        with one_run(tmp_path / "out"):
            pass


def test_a_folder_that_cannot_be_written_into_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/out cannot be written into: Not a directory\. Give another"):
        with one_run(tmp_path / "file" / "out"):
            pass
    with pytest.raises(OSError, match=r"cannot be written into: .*\. Give another"), one_run("/proc/nothing/out"):
        pass


class Killed(Dataset):
    """Rows whose reader is killed, as where memory runs out."""

    def __len__(self):
        return 1

    def __getitem__(self, number):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_explained(tmp_path):
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught, one_run(tmp_path):
        next(iter(DataLoader(Killed(), num_workers=1)))
    (note,) = caught.value.__notes__
    assert "out of memory" in note and "lower dataloader_num_workers" in note and "--resume" in note
