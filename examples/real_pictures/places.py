"""Measure how well the tokens of a frozen tower tell where in the picture they are, layer by layer.

    python -m examples.real_pictures.places openai/clip-vit-base-patch16 --data outputs/real_pictures

What no token of the last layer says, no resampler can read, and questions about left and right have no answer. A ridge
regression from a patch's token, normalised, to its column and its row learns on three quarters of the pictures of
`views.jsonl`, and is scored on the others: the share of the variance that it explains, and how often it is right about
the half (left or right, upper or lower).
"""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_mmgpt.vision_mmgpt import load_vision_tower
from processing_mmgpt import MMGPTImageProcessor
from processing_mmgpt.image_processing_mmgpt import image_format

from .evaluate import read


def place_scores(tokens: torch.Tensor, strength: float = 1.0) -> dict[str, tuple[float, float]]:
    """Fit and score one layer.

    Args:
        tokens: `(K, P, D)`, of `P` patches in a square.
        strength: Of L2.

    Returns:
        For `column` and `row`: the explained share of the variance, and the share of right halves.
    """
    side, known = round(tokens.shape[1] ** 0.5), len(tokens) * 3 // 4
    tokens = torch.nn.functional.layer_norm(tokens.float(), tokens.shape[-1:])
    mean = tokens[:known].mean(dim=(0, 1))
    x, asked = (part.flatten(0, 1) - mean for part in (tokens[:known], tokens[known:]))
    number = torch.arange(side * side, device=tokens.device)
    scores = {}
    for name, place in (("column", number % side), ("row", number // side)):
        place = place.float() - (side - 1) / 2
        ridge = x.T @ x + strength * torch.eye(x.shape[1], device=x.device)
        guess = asked @ torch.linalg.solve(ridge, x.T @ place.repeat(known))
        true = place.repeat(len(tokens) - known)
        explained = 1 - (guess - true).square().mean() / true.square().mean()
        scores[name] = explained.item(), ((guess > 0) == (true > 0)).float().mean().item()
    return scores


@torch.inference_mode()
def layers(tower: PreTrainedModel, pixels: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """Patch tokens `(K, P, D)` behind the embedding and behind each layer, without class token."""
    weight, patches = next(tower.parameters()), (pixels.shape[-1] // tower.config.patch_size) ** 2
    parts = [
        tower(pixel_values=some.to(weight.device, weight.dtype), output_hidden_states=True).hidden_states
        for some in pixels.split(batch_size)
    ]
    return [torch.cat(layer)[:, -patches:] for layer in zip(*parts, strict=True)]


def main() -> None:
    """Encode, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vision", help="folder or Hub id of a vision model of transformers")
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data.py has written")
    parser.add_argument("--count", type=int, default=64, help="pictures")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower = load_vision_tower(args.vision, None)[0].float().to(device).eval()
    image_processor = MMGPTImageProcessor(**image_format(args.vision, None))
    views = read(args.data / "views.jsonl")[: args.count]
    pixels = torch.stack([image_processor.pixels(str(args.data / view["image"])) for view in views])
    print("| layer | column | left or right | row | upper or lower |\n|---|---|---|---|---|")
    for number, tokens in enumerate(layers(tower, pixels, args.batch_size)):
        cells = [f"{value:.2f}" for pair in place_scores(tokens).values() for value in pair]
        print(f"| {number} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
