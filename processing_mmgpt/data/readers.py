"""Readers: one public annotation record to one conversation. Pure functions, grouped by the shape of the record.

Each takes a record and a source of randomness and returns `{"messages": [...], "images": [...]}`: messages as
transformers' chat messages, images as paths below the image root, one for each image part. Each refuses a record
without its fields by a `ValueError` that names the field and holds nothing else, so that equal errors can be counted.

They follow https://github.com/open-mmlab/Multimodal-GPT/tree/9c73e47/mmgpt/datasets; where they do not, it is said
beside the line.
"""

import random
import re
from collections import Counter
from collections.abc import Callable

from .dialogues import read_alpaca_gpt4, read_baize, read_dolly, read_llava, read_llava_dial
from .phrases import CONFIRM, DESCRIBE, OPINION, REASON
from .records import Record, exchange, field, file_name, path_field, strings


Reader = Callable[[Record, random.Random], Record]

OPTION_PROBABILITY = 0.5  # that the options of a question are shown in the input block
FLIP_PROBABILITY = 0.25  # that a pair of nlvrv2 changes sides: 0.5 x 0.5 in the reference
LABELS = ("entailment", "neutral", "contradiction")


# Captions


def read_minigpt4(record: Record, rng: random.Random) -> Record:
    """Read a caption of MiniGPT-4's aligned CC-SBU (`filter_cap.json`, below `annotations`).

    `{"image_id": "2", "caption": "The image shows ..."}`; the picture is `{image_id}.jpg`.

    Source: https://huggingface.co/datasets/Vision-CAIR/cc_sbu_align
    """
    image = f"{file_name(record, 'image_id')}.jpg"
    return exchange(rng.choice(DESCRIBE), field(record, "caption", str), [image])


def read_coco_caption(record: Record, rng: random.Random) -> Record:
    """Read the captions of a COCO picture and choose one.

    `{"image": "val2014/COCO_val2014_000000522418.jpg", "caption": "..." or ["...", "..."], "image_id": "coco_5"}`. The
    official `captions_train2014.json` and Karpathy's `dataset_coco.json` are brought into this form where files
    are opened.

    Source: https://cocodataset.org/#format-data, https://cs.stanford.edu/people/karpathy/deepimagesent/
    """
    image, captions = path_field(record, "image"), record.get("caption")
    captions = [captions] if isinstance(captions, str) else strings(record, "caption")
    return exchange(rng.choice(DESCRIBE), rng.choice(captions), [image])


# Questions with a short answer


def read_vqa(record: Record, rng: random.Random) -> Record:
    """Read a question of VQA v2 or OK-VQA; the answer most people gave is the true one, the first on ties.

    `{"question": "...", "image": "val2014/COCO_val2014_000000262148.jpg", "answer": ["red", "red"]}`; the
    options, if shown, are the different answers. The official pair of questions and annotations is joined into
    this form where files are opened.

    Source: https://visualqa.org/vqa_v1_download.html, https://okvqa.allenai.org/download.html
    """
    return _voted(record, strings(record, "answer"), path_field(record, "image"), rng)


def read_text_ocr(record: Record, rng: random.Random) -> Record:
    """Read a question of TextVQA (`TextVQA_0.5.1_train.json`, below `data`), else as `read_vqa`.

    `{"question": "...", "image_id": "ab0", "answers": ["stop", "stop"], "question_id": 1}`; the picture is
    `{image_id}.jpg`.

    Source: https://textvqa.org/dataset/
    """
    return _voted(record, strings(record, "answers"), f"{file_name(record, 'image_id')}.jpg", rng)


def read_gqa(record: Record, rng: random.Random) -> Record:
    """Read a question of GQA (`train_balanced_questions.json`, a dict by question id) with its full answer.

    `{"imageId": "2354786", "question": "...", "answer": "no", "fullAnswer": "No, ..."}`; the picture is
    `{imageId}.jpg`.

    Source: https://cs.stanford.edu/people/dorarad/gqa/download.html
    """
    image = f"{file_name(record, 'imageId')}.jpg"
    return exchange(field(record, "question", str), field(record, "fullAnswer", str), [image])


def read_clevr(record: Record, rng: random.Random) -> Record:
    """Read a question of CLEVR (`CLEVR_train_questions.json`, below `questions`).

    `{"split": "train", "image_filename": "CLEVR_train_000000.png", "question": "...", "answer": "yes"}`; the picture
    is `{split}/{image_filename}`.

    Source: https://cs.stanford.edu/people/jcjohns/clevr/
    """
    image = f"{file_name(record, 'split')}/{file_name(record, 'image_filename')}"
    return exchange(field(record, "question", str), field(record, "answer", str), [image])


def read_ocr_vqa(record: Record, rng: random.Random) -> Record:
    """Read a book of OCR-VQA and choose one of its questions.

    `{"filename": "0761183272.jpg", "questions": ["Who wrote this book?"], "answers": ["Sandra Boynton"]}`. The public
    `dataset.json`, a dict by book id, is brought into this form where files are opened.

    Source: https://ocr-vqa.github.io/
    """
    questions, answers = strings(record, "questions"), strings(record, "answers")
    if len(questions) != len(answers):
        raise ValueError("The fields 'questions' and 'answers' have to be of one length.")
    question, answer = rng.choice(list(zip(questions, answers, strict=True)))
    return exchange(question, answer, [path_field(record, "filename")])


def read_aokvqa(record: Record, rng: random.Random) -> Record:
    """Read a question of A-OKVQA, asked for its reason, with its choices as options in half of the draws.

    `{"split": "train", "image_id": 299207, "question": "...", "choices": ["skiing", "eating"],
    "correct_choice_idx": 0, "rationales": ["..."]}`. The picture is the field `image` where there is one (LAVIS), else
    as in the official loader `{split}2017/{image_id:012d}.jpg`.

    The reference builds the prompt with the options and then overwrites it by the one without.

    Source: https://github.com/allenai/aokvqa
    """
    question, choices = field(record, "question", str), strings(record, "choices")
    rationales, index = strings(record, "rationales"), field(record, "correct_choice_idx", int)
    if not 0 <= index < len(choices):
        raise ValueError("The field 'correct_choice_idx' has to point into 'choices'.")
    if "image" in record:
        image = path_field(record, "image")
    else:
        image = f"{file_name(record, 'split')}2017/{field(record, 'image_id', int):012d}.jpg"
    answer = f"The answer is {choices[index]}. Because {' '.join(rationales)}"
    return exchange(f"{question} {rng.choice(REASON)}", answer, [image], _options(choices, rng))


# Statements to be judged


def read_snlive(record: Record, rng: random.Random) -> Record:
    """Read a hypothesis of SNLI-VE (`snli_ve_train.jsonl`).

    `{"Flickr30K_ID": "4804607632", "sentence1": "...", "sentence2": "...", "gold_label": "neutral"}`; the picture is
    `{Flickr30K_ID}.jpg`.

    Source: https://github.com/necla-ml/SNLI-VE
    """
    statement, label = field(record, "sentence2", str), field(record, "gold_label", str)
    if label not in LABELS:
        raise ValueError(f"The field 'gold_label' has to be one of {list(LABELS)}.")
    image = f"{file_name(record, 'Flickr30K_ID')}.jpg"
    return exchange(f"{statement} {rng.choice(OPINION)}", label, [image], _options(LABELS, rng))


def read_nlvrv1(record: Record, rng: random.Random) -> Record:
    """Read a statement of NLVR (`train.json`, one record a line; `split` is added where files are opened).

    `{"sentence": "...", "label": "true", "identifier": "330-0", "directory": "30", "split": "train"}`.

    The picture is one of `{split}/images/{directory}/{split}-{identifier}-{0..5}.png`, drawn as in the reference: the
    six show the same three boxes in another order, and the label holds for each.

    Source: https://github.com/lil-lab/nlvr/tree/master/nlvr
    """
    split, identifier = file_name(record, "split"), file_name(record, "identifier")
    image = f"{split}/images/{file_name(record, 'directory')}/{split}-{identifier}-{rng.randint(0, 5)}.png"
    return _judged(record, field(record, "sentence", str), [image], rng)


def read_nlvrv2(record: Record, rng: random.Random) -> Record:
    """Read a statement of NLVR2 about two pictures, in the form of LAVIS; they may change sides, words included.

    `{"images": ["train/0-img0.png", "train/0-img1.png"], "sentence": "The left image ...", "label": "True"}`

    Source: https://github.com/salesforce/LAVIS/blob/main/dataset_card/nlvr2.md, https://github.com/lil-lab/nlvr
    """
    images, sentence = strings(record, "images"), field(record, "sentence", str)
    if len(images) != 2:
        raise ValueError("The field 'images' has to be a list of two paths.")
    if rng.random() < FLIP_PROBABILITY:
        images, sentence = images[::-1], swap_sides(sentence)
    # Two pictures, two `<image>`s: the reference puts them side by side and squeezes them into one.
    return _judged(record, sentence, images, rng)


def swap_sides(sentence: str) -> str:
    """Write left for right and right for left, as words and in words such as "leftmost".

    The reference replaces every lower-case occurrence, so "bright" becomes "bleft" and "Left" stays.
    """

    def other(match: re.Match) -> str:
        word = "right" if match[1].lower() == "left" else "left"
        return word.capitalize() if match[1][0].isupper() else word

    return re.sub(r"\b(left|right)(?=(?:most|hand|wards?|er)?\b)", other, sentence, flags=re.IGNORECASE)


READERS: dict[str, Reader] = {
    "llava": read_llava,
    "llava_dial": read_llava_dial,
    "minigpt4": read_minigpt4,
    "aokvqa": read_aokvqa,
    "coco_caption": read_coco_caption,
    "ocr_vqa": read_ocr_vqa,
    "vqa": read_vqa,
    "okvqa": read_vqa,
    "gqa": read_gqa,
    "clevr": read_clevr,
    "nlvrv1": read_nlvrv1,
    "nlvrv2": read_nlvrv2,
    "snlive": read_snlive,
    "text_ocr": read_text_ocr,
    "dolly": read_dolly,
    "alpaca_gpt4": read_alpaca_gpt4,
    "baize": read_baize,
}
TEXT_READERS = frozenset({"dolly", "alpaca_gpt4", "baize"})


# Parts of the readers


def _voted(record: Record, answers: list[str], image: str, rng: random.Random) -> Record:
    counts = Counter(answers)  # in order of appearance
    true_answer = max(counts, key=counts.__getitem__)
    return exchange(field(record, "question", str), true_answer, [image], _options(list(counts), rng))


def _judged(record: Record, statement: str, images: list[str], rng: random.Random) -> Record:
    label = field(record, "label", str)
    if label.lower() not in ("true", "false"):
        raise ValueError("The field 'label' has to be 'true' or 'false'.")
    return exchange(f"{statement} {rng.choice(CONFIRM)}", label, images, _options(("true", "false"), rng))


def _options(options: tuple[str, ...] | list[str], rng: random.Random) -> str:
    return ", ".join(options) if rng.random() < OPTION_PROBABILITY and len(options) > 1 else ""
