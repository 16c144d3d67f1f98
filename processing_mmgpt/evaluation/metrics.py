"""Metrics of public benchmarks, from text to scores: VQA accuracy, CIDEr-D, BLEU.

Accuracy and ROC-AUC are scikit-learn's, BLEU is sacrebleu's. VQA accuracy and CIDEr-D have no maintained package:
they are written here, and equal to the official scripts (`tests/test_metrics.py`).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from statistics import mean


# VQA accuracy, as in https://github.com/GT-Vision-Lab/VQA/blob/a013f00/PythonEvaluationTools/vqaEvaluation/vqaEval.py

DIGITS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_->' + "<@`,?!"
# What an apostrophe is put back into: each word is known by its forms that lack one of its apostrophes.
CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll "
    "you're you've"
).split()
CONTRACTIONS = {
    word[: match.start()] + word[match.end() :]: word for word in CONTRACTED for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the official table has this one the other way round


def normalise_answer(answer: str) -> str:
    """Bring an answer into the form in which the official script of VQA compares answers.

    Punctuation beside a space, and a comma in a number, is removed; other punctuation becomes a space. Capitals and
    articles are removed, numbers up to ten become digits, and contractions get their apostrophe back.
    """
    text = answer
    has_thousands = re.search(r"\d,\d", answer) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or has_thousands else " ")
    # The official script hands re.UNICODE to `sub` where its count belongs: at most 32 full stops go.
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of one prediction against the answers of (usually ten) people: right if three of them say the same.

    The mean over all ways to leave one person out, as in the official script. Where all people agree to the letter,
    that script compares without normalising, and so does this.

    Args:
        prediction: What the model answered.
        answers: The answers of the people.

    Returns:
        A share, 0..1; the score of a benchmark is the mean over its questions.

    Source: https://visualqa.org/evaluation.html
    """
    if not answers:
        raise ValueError("A question without answers cannot be scored; the hidden test splits have none.")
    prediction, *answers = (re.sub(r"[\n\t]", " ", text).strip() for text in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = map(normalise_answer, (prediction, *answers))
    matches = [answer == prediction for answer in answers]
    return mean(min(1.0, (sum(matches) - match) / 3) for match in matches)


# Captions, as in https://github.com/tylin/coco-caption/tree/3a9afb2/pycocoevalcap

CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
TWO_IN_ONE = re.compile(r"\b(can(?=not\b)|gon(?=na\b)|got(?=ta\b)|wan(?=na\b)|gim(?=me\b)|lem(?=me\b))")
CAPTION_TOKEN = re.compile(
    r"https?://\S+|[\w.+-]+@[\w-]+\.[\w.]+"  # addresses
    r"|(?:[a-z]\.)+[a-z](?!\w)\.?|\b(?:mr|mrs|ms|dr|st|mt|jr|vs|etc|no(?=\. \d))\."  # u.s., p.m., mr.
    r"|o'clock|n't|'(?:s|m|d|re|ve|ll)\b|'\d0s\b"
    r"|#[a-z]\w*|\d+(?:[.,:]\d+)+|\w+(?:[-/+]\w+)*|[!?]{2,}|[^\w\s]"
)
DROPPED = frozenset("'`\".?!,:-;")
BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split(), strict=True))


def tokenize_caption(caption: str) -> list[str]:
    """Split a caption as the official evaluation does, in lower case and without punctuation.

    The official script runs Stanford CoreNLP 3.4.1's PTBTokenizer, in Java. This behaves like it on captions; it
    differs on what is rare in them: `y'all`, `rock'n'roll`, currencies other than the dollar, uncommon abbreviations.
    """
    text = TWO_IN_ONE.sub(r"\1 ", CLITICS.sub(r" \1", caption.lower()))
    return [BRACKETS.get(token, token) for token in CAPTION_TOKEN.findall(text) if token not in DROPPED]


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, which results on COCO call "CIDEr".

    Args:
        predictions: One caption a picture.
        references: The captions that people gave for each picture. An n-gram weighs less, the more of these
            pictures have it; so a score depends on the set of pictures, and is 0 for a set of one.

    Returns:
        A score of each picture, 0..10; the score of a benchmark is the mean, and papers print it times 100.

    Source: Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", https://arxiv.org/abs/1411.5726;
        sigma 6, n-grams of one to four words, clipped counts.
    """
    candidates = [_ngrams(caption) for caption in predictions]
    annotated = [[_ngrams(caption) for caption in captions] for captions in references]
    documents = Counter(ngram for captions in annotated for ngram in set().union(*captions))
    idf = {ngram: math.log(len(annotated) / count) for ngram, count in documents.items()}
    idf |= {ngram: math.log(len(annotated)) for candidate in candidates for ngram in candidate if ngram not in idf}
    return [
        10 * mean(_similarity(candidate, caption, idf) for caption in captions)
        for candidate, captions in zip(candidates, annotated, strict=True)
    ]


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a set of captions, as COCO's evaluation has them: 0..1, by the closest reference length.

    Where no n-gram of a length matches in the whole set, this is 0; the official script adds 1e-15 to every count.

    Source: Papineni et al., https://aclanthology.org/P02-1040; computed by sacrebleu on the tokens of
        [`tokenize_caption`].
    """
    from sacrebleu.metrics import BLEU

    hypotheses = [" ".join(tokenize_caption(caption)) for caption in predictions]
    tokenized = [[" ".join(tokenize_caption(caption)) for caption in captions] for captions in references]
    streams = list(zip_longest(*tokenized))  # sacrebleu's order: all first references, all second ones, ...
    scores = (
        BLEU(max_ngram_order=n, tokenize="none", smooth_method="none", force=True).corpus_score(hypotheses, streams)
        for n in range(1, 5)
    )
    return [score.score / 100 for score in scores]


def _ngrams(caption: str) -> Counter[tuple[str, ...]]:
    words = tokenize_caption(caption)
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def _similarity(candidate: Counter, reference: Counter, idf: dict, sigma: float = 6.0) -> float:
    """Clipped tf-idf cosine, the mean over the lengths of n-grams, less where the captions differ in length."""
    total = 0.0
    for n in range(1, 5):
        ours = {ngram: count * idf[ngram] for ngram, count in candidate.items() if len(ngram) == n}
        theirs = {ngram: count * idf[ngram] for ngram, count in reference.items() if len(ngram) == n}
        norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        if norms:
            shared = [ngram for ngram in ours if ngram in theirs]  # in order, so that the sum is the same every time
            total += sum(min(ours[ngram], theirs[ngram]) * theirs[ngram] for ngram in shared) / norms
    difference = _num_words(candidate) - _num_words(reference)
    return total / 4 * math.exp(-(difference**2) / (2 * sigma**2))


def _num_words(counts: Counter) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 1)
