"""Write benchmarks about the tiny world in the public forms of annotation: VQA v2, COCO captions, and two more.

`examples/write_benchmarks.py` writes all of them, and `examples/evaluate_benchmark.py` scores a model on each.
"""

import json
import random
from pathlib import Path

from .corpus import PSEUDO_WORDS
from .dialogue import article
from .look_ups import OBJECT_KINDS, LookUp, look_up
from .questions import WORDINGS
from .scenes import COLOURS, SEEN_PAIRS, Scene, describe, render, sample_scene


SPLITS = {"train2014": "train", "val2014": "test"}


def write_vqav2(folder: Path, counts: dict[str, int]) -> None:
    """Look-ups as questions, answered by ten people who agree."""
    for split, count in counts.items():
        questions, annotations = [], []
        for number in range(count):
            rng = random.Random(f"vqav2 {split} {number}")
            found = None
            while not found:
                scene = sample_scene(rng)
                found = look_up(rng, rng.choice(OBJECT_KINDS), scene)
            _save(scene, folder / split / f"COCO_{split}_{number:012d}.jpg")
            asked = {"image_id": number, "question_id": 10 * number}
            questions.append({**asked, "question": _question(found)})
            given = [{"answer": found.answer, "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
            annotations.append({**asked, "answers": given, "question_type": found.kind, "answer_type": "other"})
        head = {"data_type": "mscoco", "data_subtype": split, "task_type": "Open-Ended"}
        _write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {**head, "questions": questions})
        _write(folder / f"v2_mscoco_{split}_annotations.json", {**head, "annotations": annotations})


def write_coco(folder: Path, counts: dict[str, int]) -> None:
    """Captions that name all objects, in five orders, in Karpathy's form."""
    images = []
    for split, count in counts.items():
        for number in range(count):
            rng = random.Random(f"coco {split} {number}")
            scene = sample_scene(rng)
            name = f"COCO_{split}_{number:012d}.jpg"
            _save(scene, folder / split / name)
            orders = [scene.objects, *(rng.sample(scene.objects, len(scene.objects)) for _ in range(4))]
            sentences = [{"raw": describe(order), "sentid": i} for i, order in enumerate(orders)]
            row = {"filepath": split, "filename": name, "cocoid": number, "split": SPLITS[split]}
            images.append({**row, "sentences": sentences})
    _write(folder / "dataset_coco.json", {"dataset": "coco", "images": images})


def write_hateful_memes(folder: Path, counts: dict[str, int]) -> None:
    """A picture and a line of text; the label is whether the picture shows what the text names."""
    for (_, count), name in zip(counts.items(), ("train", "dev"), strict=True):
        lines = []
        for number in range(count):
            rng = random.Random(f"hateful_memes {name} {number}")
            scene = sample_scene(rng)
            found = None
            while not found or found.kind != "yes_no":
                found = look_up(rng, "yes_no", scene)
            image = f"img/{name}{number:05d}.png"
            _save(scene, folder / image)
            text = f"{found.words['colour']} {found.words['shape']}"
            lines.append({"id": f"{name}{number}", "img": image, "label": int(found.answer == "yes"), "text": text})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_imagenet(folder: Path, counts: dict[str, int]) -> None:
    """One object a picture; its class has a made-up name for its colour, as in the base's in-context documents."""
    names = dict(zip(list(COLOURS)[:4], PSEUDO_WORDS, strict=False))
    for (_, count), split in zip(counts.items(), ("train", "val"), strict=True):
        for number in range(count):
            rng = random.Random(f"imagenet {split} {number}")
            colour = rng.choice(list(names))
            pair = rng.choice([pair for pair in SEEN_PAIRS if pair[0] == colour])
            _save(sample_scene(rng, count=1, pairs=[pair]), folder / split / names[colour] / f"{number}.png")


def _question(found: LookUp) -> str:
    return WORDINGS[found.kind][0].format(a=article(found.words.get("colour", "a")), **found.words)


def _save(scene: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def _write(path: Path, document: dict) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n")


WRITERS = {
    "vqav2": write_vqav2,
    "coco": write_coco,
    "hateful_memes": write_hateful_memes,
    "imagenet": write_imagenet,
}
