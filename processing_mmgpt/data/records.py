"""Records: take fields out of a public record, with an error for what is missing, and make a record of ours."""

from typing import Any

from ..messages_mmgpt import Video


Record = dict[str, Any]


def exchange(question: str, answer: str, images: list[str], block: str = "") -> Record:
    """Make a record of one question and one answer."""
    return dialogue([(question, answer)], *images, block=block)


def dialogue(exchanges: list[tuple[str, str]], *images: str, block: str = "") -> Record:
    """Make the messages; the images come before the first question, the input block after it."""
    messages = []
    for number, (question, answer) in enumerate(exchanges):
        content = [{"type": "text", "text": question}]
        if number == 0:
            content = [{"type": "image"} for _ in images] + content
            content += [{"type": "input", "text": block}] if block else []
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages, "images": list(images)}


def field(record: Record, name: str, kind: type) -> Any:
    """Take a field of a kind.

    Raises:
        ValueError: If it is missing or of another kind; the error names the field.
    """
    if record.get(name) is None:
        raise ValueError(f"The field {name!r} is missing.")
    if not isinstance(record[name], kind):
        raise ValueError(f"The field {name!r} has to be a {kind.__name__}, not {type(record[name]).__name__}.")
    return record[name]


def strings(record: Record, name: str) -> list[str]:
    """Take a field that is a list of one or more strings."""
    values = field(record, name, list)
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"The field {name!r} has to be a list of one or more strings.")
    return values


def file_name(record: Record, name: str) -> str:
    """Take a part of a file name, which some files spell as a number."""
    return str(field(record, name, int)) if isinstance(record.get(name), int) else path_field(record, name)


def path_field(record: Record, name: str) -> str:
    """Take a field that is a path, which may not be empty."""
    value = field(record, name, str)
    if not value:
        raise ValueError(f"The field {name!r} is empty.")
    return value


def check_no_video(images: list, where: str) -> None:
    """Raise if a record has a video: TRL's trainers for rewards and preferences lose how many frames each has.

    Raises:
        ValueError: With `where` it is.
    """
    if any(isinstance(image, Video | list) for image in images):
        raise ValueError(f"{where} has a video: rewards and preferences are learnt from pictures and text alone.")
