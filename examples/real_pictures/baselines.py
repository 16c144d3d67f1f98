"""What a frozen tower knows by itself: the nearest neighbour, and logistic regression, on its features.

    python -m examples.real_pictures.baselines openai/clip-vit-base-patch16 --data outputs/real_pictures

They learn from the pictures of `views.jsonl`, and take the tests of `make_data.py` that classes can answer. What they
say is written to `baselines.json` beside the tests, where `evaluate.py` finds it.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader

from modeling_mmgpt.vision_mmgpt import load_vision_tower, patch_tokens, pooled_features
from processing_mmgpt import MMGPTImageProcessor
from processing_mmgpt.image_processing_mmgpt import image_format


ASKED = {  # the tests that a classifier can take, and what it then has to say
    "names": "name",
    "kinds": "kind",
    "kinds of things never seen": "kind",
    "names of photographs": "name",
    "kinds of photographs": "kind",
}
STRENGTHS = (1e-4, 1e-3, 1e-2)  # of L2, for a mean over the examples


@torch.inference_mode()
def features(
    tower: torch.nn.Module, image_processor: MMGPTImageProcessor, paths: list[Path], batch_size: int, num_workers: int
) -> dict[str, np.ndarray]:
    """Describe pictures as the tower sees them: by its class token, and by the mean of its patches, `(K, D)` each."""
    found, weight = {"class token": [], "mean of patches": []}, next(tower.parameters())
    collate = partial(_open, image_processor)
    for pixels in DataLoader([*map(str, paths)], batch_size, num_workers=num_workers, collate_fn=collate):
        pixels = pixels.to(weight.device, weight.dtype)
        found["class token"].append(pooled_features(tower, pixels).cpu())
        found["mean of patches"].append(patch_tokens(tower, pixels).mean(dim=1).cpu())
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def _open(image_processor: MMGPTImageProcessor, paths: list[str]) -> torch.Tensor:
    return torch.stack([image_processor.pixels(path) for path in paths])


def nearest(known: np.ndarray, labels: list[str], asked: np.ndarray) -> list[str]:
    """Say the label of the picture with the largest cosine."""
    known, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (known, asked))
    return [labels[number] for number in (asked @ known.T).argmax(axis=1)]


def regressions(known: np.ndarray, labels: list[str]) -> dict[float, Callable[[np.ndarray], list[str]]]:
    """Fit one logistic regression for each strength."""
    scaler = StandardScaler().fit(known)
    fitted = {
        strength: LogisticRegression(C=1 / (strength * len(known)), max_iter=300).fit(scaler.transform(known), labels)
        for strength in STRENGTHS
    }
    return {strength: lambda x, one=one: one.predict(scaler.transform(x)).tolist() for strength, one in fitted.items()}


def classify(
    views: list[dict], rows: list[dict], tune: list[dict], see: Callable[[list[dict]], dict[str, np.ndarray]]
) -> dict[str, dict[str, dict]]:
    """Let both classifiers take the tests.

    Args:
        views: Pictures to learn from: `image`, `name`, `kind`.
        rows: The rows of the tests.
        tune: Those of the validation split, on which the strength of L2 is chosen.
        see: Gives the features of the first picture of each row, `(K, D)`.

    Returns:
        For each test, for each classifier and feature: what it says to each row, and the strength of L2.
    """
    said = {}
    for what in ("name", "kind"):
        known_rows = [view for view in views if view[what]]
        known, labels = see(known_rows), [view[what] for view in known_rows]
        fitted = {feature: regressions(x, labels) for feature, x in known.items()}
        for test in (test for test, label in ASKED.items() if label == what):
            own, tuned = ([row for row in part if row["test"] == test] for part in (rows, tune))
            if not own or not tuned:
                continue
            asked, chosen, said[test] = see(own), see(tuned), {}
            for feature, by_strength in fitted.items():
                right = {
                    strength: sum(
                        guess in row["answers"] for guess, row in zip(fit(chosen[feature]), tuned, strict=True)
                    )
                    for strength, fit in by_strength.items()
                }
                best = max(right, key=right.get)
                said[test][f"1-NN, {feature}"] = {"said": nearest(known[feature], labels, asked[feature])}
                said[test][f"LR, {feature}"] = {"said": by_strength[best](asked[feature]), "L2": best}
                print(f"{test}, {feature}: L2 {best}, right on validation {right} of {len(tuned)}", flush=True)
    return said


def main() -> None:
    """Look at all pictures once, and classify."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vision", help="folder or Hub id of a vision model of transformers")
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data.py has written")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower = load_vision_tower(args.vision, None)[0].float().to(device).eval()
    image_processor = MMGPTImageProcessor(**image_format(args.vision, None))
    read = {
        name: [json.loads(line) for line in (args.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("views", "validation", "test")
    }
    views = [{**view, "images": [view["image"]]} for view in read["views"]]
    asked = [row for row in (*read["validation"], *read["test"]) if row["test"] in ASKED]
    paths = list(dict.fromkeys(row["images"][0] for row in (*views, *asked)))
    files = [args.data / path for path in paths]
    found = features(tower, image_processor, files, args.batch_size, args.num_workers)
    place = {path: number for number, path in enumerate(paths)}

    def see(rows: list[dict]) -> dict[str, np.ndarray]:
        return {name: x[[place[row["images"][0]] for row in rows]] for name, x in found.items()}

    said = {split: classify(views, read[split], read["validation"], see) for split in ("validation", "test")}
    (args.data / "baselines.json").write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
