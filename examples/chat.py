"""Chat with a model about pictures, in a terminal.

python examples/chat.py outputs/quickstart/adapter

/image FILE   a picture for the next question; several may be given
/clear        begin a new conversation
/save FILE    write the conversation as a record that examples/train_sft.py reads
Ctrl-C        stop the reply and remove its question, but keep its pictures for the next; Ctrl-D ends the chat
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, TextStreamer
from transformers.processing_utils import ProcessorMixin

import processing_mmgpt  # noqa: F401 - for the Auto classes
from modeling_mmgpt.saving.whole import whole
from processing_mmgpt.image_files_mmgpt import open_image


with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401 - lets `input` edit its line and remember the ones before

COMMANDS = "/image FILE, /clear, /save FILE; Ctrl-C stops a reply, Ctrl-D ends the chat."


def reply(model: PreTrainedModel, processor: ProcessorMixin, messages: list[dict], max_new_tokens: int) -> str:
    """Write the reply to the screen, word by word, and return it."""
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def named(argument: str) -> Path:
    """The file that a command names; a terminal puts quotes around the name of a file that is dropped on it."""
    name = argument.strip().strip("'\"")
    if not name:
        raise ValueError(f"Which file? {COMMANDS}")
    return Path(name).expanduser()


def picture_part(path: Path) -> dict:
    """A content part with the picture, opened at once: a bad one is reported, and later changes do not matter."""
    return {"type": "image", "image": open_image(path), "path": str(path.resolve())}


def bare(part: dict) -> dict:
    """A content part without its picture."""
    return {key: value for key, value in part.items() if key in ("type", "text")}


def save(messages: list[dict], path: Path) -> None:
    """Write the conversation as one line of JSON, its pictures as absolute paths; all of it or nothing."""
    if not messages:
        raise ValueError("Nothing has been said yet.")
    images = [part["path"] for message in messages for part in message["content"] if part["type"] == "image"]
    record = {"messages": [{**said, "content": [bare(part) for part in said["content"]]} for said in messages]}
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps({**record, "images": images}, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Read and execute lines until the end of the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an adapter or a model")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()
    try:
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").eval()
        processor = AutoProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"{args.model} cannot be loaded, or its base cannot: {error}")
    messages, pictures = [], []
    print(COMMANDS)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            break
        except KeyboardInterrupt:  # often one that came too late for the reply: nothing is lost by it
            print("\nCtrl-D ends the chat.")
            continue
        command, _, argument = line.partition(" ")
        try:
            if command == "/image":
                pictures.append(picture_part(named(argument)))
                print(f"Pictures for the next question: {len(pictures)}.")
            elif command == "/clear":
                messages, pictures = [], []
            elif command == "/save":
                save(messages, named(argument))
            elif command.startswith("/"):
                print(f"{command} is none of {COMMANDS}")
            elif line:
                question = {"role": "user", "content": [*pictures, {"type": "text", "text": line}]}
                answer = reply(model, processor, [*messages, question], args.max_new_tokens)
                messages += [question, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
                pictures = []
        except (OSError, ValueError) as error:
            print(error)
        except KeyboardInterrupt:
            print("\nStopped; the question is taken back.")


if __name__ == "__main__":
    main()
