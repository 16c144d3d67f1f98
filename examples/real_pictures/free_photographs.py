"""Ask about the photographs of scikit-learn and scikit-image, whose licences let them be shown anywhere.

    pip install scikit-learn scikit-image
    python -m examples.real_pictures.free_photographs --output_dir outputs/real_pictures
    python -m examples.real_pictures.evaluate outputs/real --data outputs/real_pictures --split free --output_dir free
    python -m examples.real_pictures.show_answers free/answers.jsonl --data outputs/real_pictures --output free.png

`free_photographs.json` says what is right, and whose they are. Those of a package that is not installed are left out.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from .compositions import TABLES
from .make_data import write
from .questions import KIND, NAME


def rows(output: Path, table: Path = TABLES / "free_photographs.json") -> list[dict]:
    """Copy the photographs, and write down two questions about each: its name and its kind."""
    asked = []
    for number, photo in enumerate(json.loads(table.read_text())):
        package = find_spec(photo["package"])
        if package is None:
            print(f"{photo['package']} is not installed: {photo['file']} is left out", flush=True)
            continue
        path = f"pictures/free-{number}.png"
        Image.open(Path(package.origin).parent / photo["file"]).convert("RGB").save(output / path)
        for test, question in (("names", NAME[0]), ("kinds", KIND[0])):
            parts = [{"type": "image"}, {"type": "text", "text": question}]
            row = {"test": f"{test} of free photographs", "messages": [{"role": "user", "content": parts}]}
            asked.append(row | {"images": [path], "answers": photo[test], "about": photo["credit"]})
    return asked


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that make_data.py has written")
    args = parser.parse_args()
    (args.output_dir / "pictures").mkdir(parents=True, exist_ok=True)
    write(args.output_dir / "free.jsonl", rows(args.output_dir))


if __name__ == "__main__":
    main()
