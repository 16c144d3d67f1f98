"""Ask a model about pictures; the answer appears as it is written.

    python examples/generate.py outputs/quickstart/adapter "What colour is the circle?" --image scene.png

The model is a folder or a Hub id, of an adapter or of a whole model. Without `--image`, a question of text alone.
"""

import argparse
import sys

from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

import processing_mmgpt  # noqa: F401 - for the Auto classes


def main() -> None:
    """Load, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of an adapter or a model")
    parser.add_argument("question")
    parser.add_argument("--image", action="append", default=[], help="a picture file; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    try:
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").eval()
        processor = AutoProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"{args.model} cannot be loaded, or its base cannot: {error}")
    content = [*({"type": "image", "path": path} for path in args.image), {"type": "text", "text": args.question}]
    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
        )
    except (OSError, ValueError) as error:
        sys.exit(f"The question cannot be asked: {error}")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs.to(model.device), max_new_tokens=args.max_new_tokens, do_sample=False, streamer=streamer)


if __name__ == "__main__":
    main()
