"""Find secrets and local paths in a folder that is to be published."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open


# Keys and tokens by the forms their issuers give them.
SECRETS = {
    "a Hugging Face token": r"(hf|api_org)_[A-Za-z0-9]{30,}",
    "an Anthropic key": r"sk-ant-[\w-]{20,}",
    "an OpenAI key": r"sk-(proj|svcacct|admin|or)-[\w-]{20,}|sk-[A-Za-z0-9]{20,}",
    "a GitHub token": r"gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,}",
    "a GitLab token": r"glpat-[\w-]{20,}",
    "an AWS key": r"(AKIA|ASIA)[A-Z0-9]{16}",
    "a Google key": r"AIza[\w-]{35}|ya29\.[\w-]{20,}",
    "a Slack token": r"xox[abeoprs]-[\w-]{10,}|hooks\.slack\.com/services/\w",
    "a Stripe key": r"[rs]k_(live|test)_[A-Za-z0-9]{16,}",
    "an npm token": r"npm_[A-Za-z0-9]{36}",
    "a PyPI token": r"pypi-[\w-]{50,}",
    "a Weights & Biases key": r"wandb_v1_\w{20,}",
    "a web token": r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in an address": r"://[^\s/:@\"'<>]+:[^\s/:@\"'<>]+@",
    "a secret of the environment": r"[A-Z_](KEY|TOKEN|SECRET|PASSWORD)=[^\s\"']{8,}",
}


def check_folder(folder: Path, places: Iterable[Path]) -> None:
    """Check names and contents of all files in a folder for secrets and for paths of this machine.

    Of weights the header is checked: safetensors opens no file with bytes that belong to no tensor.

    Args:
        folder: Files, and no folders.
        places: Folders of this machine; a path through one of them is an error. `/` does not count.

    Raises:
        ValueError: If there is one. The message names the file and the kind, not the secret.
        SafetensorError: If weights are damaged, or followed by other bytes.
    """
    here = [re.escape(str(place)) + r"[/\\]\w" for place in places if len(place.parts) > 1]
    for number, file in enumerate(sorted(folder.iterdir())):
        check_text(f"The name of file {number}, in their order,", file.name)
        text = _text(file)
        check_text(file.name, text)
        if any(re.search(pattern, text) for pattern in here):
            raise ValueError(f"{file.name} holds a path of this machine: nothing is published. Take it out.")


def check_text(name: str, text: str) -> None:
    """Check a text for secrets.

    Args:
        name: What to call the text.
        text: The text to check.

    Raises:
        ValueError: If it holds one. The message names the kind, not the secret.
    """
    for kind, pattern in SECRETS.items():
        if re.search(pattern, text):
            raise ValueError(f"{name} holds {kind}: nothing is published. Take it out, and revoke it.")


def _text(file: Path) -> str:
    """The text of a file; of JSON also each string without its escapes."""
    if file.suffix == ".safetensors":
        with safe_open(file, "np"), file.open("rb") as opened:
            text = opened.read(int.from_bytes(opened.read(8), "little")).decode()
    else:
        text = file.read_bytes().decode(errors="replace")
    return "\n".join([text, *_strings(json.loads(text))]) if file.suffix in (".safetensors", ".json") else text


def _strings(value: object) -> Iterator[str]:
    """Yield the strings in what was read from JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        for part in parts:
            yield from _strings(part)
