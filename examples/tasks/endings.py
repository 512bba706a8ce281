"""A small multiple-choice task from the text that ships with streamprune: which sentence comes next?

Without arguments it writes endings.jsonl beside itself. lm-evaluation-harness calls `questions` (endings.yaml).

A question is the beginning of a paragraph; the choices are its next sentence and one of each of three paragraphs that
begin with other sentences of about that length. The text is also what `streamprune compress` calibrates on by default:
the task compares models with each other, and says little about either.
"""

import argparse
import gzip
import importlib.resources
import json
import random
import re
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".jsonl")
QUESTIONS, CHOICES = 100, 4
SENTENCE = (60, 160)  # characters
ENDS = re.compile(r"(?<=[a-z][.?!]) (?=[A-Z])")


def questions(**_: object) -> dict[str, Any]:
    """The data set as lm-evaluation-harness wants it: its one split."""
    import datasets

    return {"test": datasets.Dataset.from_list([json.loads(line) for line in FILE.read_text().splitlines()])}


def make(text: str) -> list[dict[str, Any]]:
    """QUESTIONS questions, always the same of one text."""
    pairs = [
        (sentences[0], sentences[1])
        for paragraph in text.split("\n")
        if len(sentences := ENDS.split(paragraph)) > 1
        and all(SENTENCE[0] <= len(sentence) <= SENTENCE[1] for sentence in sentences[:2])
    ]
    draw = random.Random(0)
    draw.shuffle(pairs)
    made = []
    for number, (context, ending) in enumerate(pairs[:QUESTIONS]):
        others = sorted(pairs[QUESTIONS:], key=lambda pair: abs(len(pair[1]) - len(ending)))
        wrong = draw.sample([other for _, other in others[:20]], CHOICES - 1)
        answer = number % CHOICES
        made.append({"context": context, "choices": [*wrong[:answer], ending, *wrong[answer:]], "answer": answer})
    return made


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    shipped = importlib.resources.files("streamprune.data") / "calibration.txt.gz"
    made = make(gzip.decompress(shipped.read_bytes()).decode())
    FILE.write_text("".join(json.dumps(question) + "\n" for question in made))
    print(f"wrote {len(made)} questions to {FILE}")


if __name__ == "__main__":
    main()
