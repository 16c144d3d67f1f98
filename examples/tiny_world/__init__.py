"""A small synthetic world: pictures, questions and text, all drawn from seeds, every question with one right answer.

In reading order:

    scenes.py     what a picture holds, and its pixels: coloured shapes on a 3x3 grid, or a short text
    digits.py     real handwritten digits, framed like the scenes
    dialogue.py   Example: a dialogue in chat form with its pictures, and the name of the skill it asks for
    look_ups.py   what can be asked about a scene, before it is put into words
    questions.py  skills that need a picture, one function each
    language.py   skills that need none, and what of them is held out
    mixture.py    the instruction-tuning set: (seed, index) -> Example
    corpus.py     what the base model is trained on, free of instructions: (seed, index, phase) -> Document
    documents.py  these as batches, and how much of them a base knows
    tokenizer.py  one id a word, wherever in a line the word stands
"""
