"""A reward that takes down what it was asked, for runs in processes of their
own: as JSON lines in the file that ASKED in the environment names."""

import json
import os
import pathlib


def vowels(prompt: str, response: str) -> float:
  """Vowels of an answer, less a hundredth of its characters."""
  with pathlib.Path(os.environ["ASKED"]).open("a", encoding="utf-8") as file:
    file.write(json.dumps([prompt, response]) + "\n")
  return sum(x in "aeiou" for x in response) - len(response) / 100
