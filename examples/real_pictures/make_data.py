"""Make what is trained and tested: pictures of cut-outs before backgrounds, and dialogues about them.

    apt-get download tuxpaint-stamps-default gcompris-qt-data      # on Debian or Ubuntu, then dpkg-deb -x
    python -m examples.real_pictures.make_data --stamps STAMPS --photos PHOTOS --output_dir outputs/real_pictures

STAMPS is a folder of RGBA pictures with `stamps.jsonl`, a line each: {"file", "caption", "translations"}. PHOTOS is a
folder of photographs, of which `photos.json` names those that are tested on, and `--backgrounds` says which others
the things stand before. `examples/recipes/real_pictures.yaml` mixes in the rows without pictures of `own_answers.py`.

Written are `train.jsonl` for `train_base.py`, `validation.jsonl` and `test.jsonl` for `evaluate.py`, and what the
baselines learn from, `views.jsonl`.
"""

import argparse
import json
import multiprocessing
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from .compositions import WHOLE, Stamp, Studio, load_photos, load_stamps
from .questions import COUNT, IS_IT, KIND, NAME, SECOND, Dialogue, Questions


SHARES = {"one_thing": 0.36, "yes_or_no": 0.2, "sides": 0.24, "count": 0.2}  # of the pictures
WILD = 0.5  # of the pictures
studio: Studio  # each process has one


def record(dialogue: Dialogue, folder: Path, name: str) -> dict:
    """Save the pictures of a dialogue, and write it down as `train_sft.py` reads it."""
    messages, images = [], []
    for picture, question, answer in dialogue[0]:
        parts = [{"type": "text", "text": question}]
        if picture is not None:
            images.append(f"pictures/{name}-{len(images)}.jpg")
            picture.save(folder / images[-1], quality=92)
            parts = [{"type": "image"}, *parts]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": images}


def train_row(number: int, folder: Path, stamps: list[Stamp], seed: int) -> dict:
    """Make the training dialogue of a number: about a picture, and then about another one."""
    rng = random.Random(f"{seed}/train/{number}")
    ask = Questions(studio, stamps, rng, WILD)
    (first, things), (second, others) = (
        getattr(ask, draw)() for draw in rng.choices([*SHARES], [*SHARES.values()], k=2)
    )
    picture, question, answer = second[0]
    if question in NAME and rng.random() < 0.5:
        second[0] = picture, rng.choice(SECOND), answer
    return record((first + second, things + others), folder, f"train-{number}")


def view(number: int, folder: Path, stamps: list[Stamp], seed: int) -> dict:
    """Make one picture of one thing, for the baselines."""
    rng = random.Random(f"{seed}/view/{number}")
    stamp, path = rng.choice(stamps), f"pictures/view-{number}.jpg"
    studio.compose([(stamp, WHOLE)], rng, wild=rng.random() < WILD).save(folder / path, quality=92)
    return {"image": path, "name": stamp.name, "kind": stamp.kind}


def test_row(job: tuple, folder: Path, trained: list[Stamp], seed: int) -> dict:
    """Make a row of a test: the dialogue up to the question, the answers that are right, and what it is about."""
    split, test, number, stamp = job
    rng = random.Random(f"{seed}/{split}/{test}/{number}")
    ask = Questions(studio, trained, rng)
    stamp = rng.choice([one for one in trained if one.kind]) if stamp is None else stamp
    one = studio.compose([(stamp, WHOLE)], rng)
    if test in ("names", "kinds", "kinds of things never seen"):
        question, answer = (NAME[0], stamp.name) if test == "names" else (KIND[0], stamp.kind)
        turns = [(one, question, answer)]
    elif test == "yes or no":
        wrong = [other for other in trained if other.kind == stamp.kind and other.name != stamp.name] or trained
        right = number % 2 == 0
        name = stamp.name if right else rng.choice(wrong).name
        turns = [(one, IS_IT[0].format(name), "yes" if right else "no")]
    elif test == "count":
        turns, (stamp, *_) = ask.count()
        while turns[0][2] != str(1 + number % 4):
            turns, (stamp, *_) = ask.count()
        turns = [(turns[0][0], COUNT[0], turns[0][2])]
    elif test == "left or right":
        (*turns, _), (stamp, _) = ask.sides()
    else:
        turns, things = ask.two_pictures()
        stamp = things[1]
        turns = [turns[0], (turns[1][0], SECOND[0], stamp.name)]
    row = record((turns, []), folder, f"{split}-{test.replace(' ', '_')}-{number}")
    return {"test": test, **row, "messages": row["messages"][:-1], "answers": [turns[-1][2]], "about": stamp.file}


def tests(split: str, stamps: list[Stamp], count: int) -> list[tuple]:
    """Name the rows of all tests on compositions: `(split, test, number, stamp or None)`."""
    held_out = [stamp for stamp in stamps if stamp.held_out]
    rows = [(split, "names", number, None) for number in range(2 * count)]
    for test in ("kinds", "yes or no", "count", "left or right", "second picture"):
        rows += [(split, test, number, None) for number in range(count)]
    seen = range(count // max(1, len(held_out)) * len(held_out))
    return rows + [(split, "kinds of things never seen", n, held_out[n % len(held_out)]) for n in seen]


def photo_rows(split: str, folder: Path, output: Path) -> list[dict]:
    """Ask for the names of photographs where they were trained, else for their kinds; the pictures are copied."""
    rows = []
    for number, photo in enumerate(load_photos(folder, split)):
        path = f"pictures/{split}-photo-{number}.png"
        Image.open(folder / photo.file).convert("RGB").save(output / path)
        test, question = ("names of photographs", NAME[0]) if photo.names else ("kinds of photographs", KIND[0])
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        row = {"test": test, "messages": [{"role": "user", "content": parts}], "images": [path]}
        rows.append(row | {"answers": photo.names or [photo.kind], "about": photo.file})
    return rows


def open_studio(*given) -> None:
    """Give a process its studio."""
    global studio
    studio = Studio(*given)


def write(path: Path, rows: list[dict]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows", flush=True)


def make(args: argparse.Namespace) -> None:
    """Make all files."""
    stamps = load_stamps(args.stamps)
    trained = [stamp for stamp in stamps if not stamp.held_out]
    files = sorted(path for path in args.photos.rglob("*") if path.suffix in (".jpg", ".png", ".webp"))
    tested = {
        args.photos / photo.file for split in ("validation", "test") for photo in load_photos(args.photos, split)
    }
    backgrounds = [
        path for path in files if any(part in str(path) for part in args.backgrounds) and path not in tested
    ]
    print(f"{len(trained)} of {len(stamps)} things are trained, before {len(backgrounds)} photographs", flush=True)
    (args.output_dir / "pictures").mkdir(parents=True, exist_ok=True)
    given = {"folder": args.output_dir, "seed": args.seed}
    studio_of = (stamps, args.stamps, backgrounds, args.size)
    with multiprocessing.get_context("fork").Pool(args.processes, open_studio, studio_of) as pool:

        def all_of(function: Callable, jobs: list, **more) -> list[dict]:
            return pool.map(partial(function, **given, **more), jobs, chunksize=64)

        for split in ("validation", "test"):
            rows = all_of(test_row, tests(split, stamps, args.test_rows), trained=trained)
            write(args.output_dir / f"{split}.jsonl", rows + photo_rows(split, args.photos, args.output_dir))
        write(args.output_dir / "views.jsonl", all_of(view, range(args.views), stamps=trained))
        write(args.output_dir / "train.jsonl", all_of(train_row, range(args.rows), stamps=trained))


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stamps", type=Path, required=True, help="folder of cut-outs with stamps.jsonl")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--backgrounds", nargs="*", default=["monuments", "renewable"], help="parts of their paths")
    parser.add_argument("--rows", type=int, default=62_000, help="dialogues to train on, of two pictures each")
    parser.add_argument("--views", type=int, default=9_000, help="pictures that the baselines learn from")
    parser.add_argument("--test_rows", type=int, default=200, help="of most tests, in each split")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    make(parser.parse_args())


if __name__ == "__main__":
    main()
