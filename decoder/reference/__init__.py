"""The embedded target, draft and tokenizer: see README.md beside this file. `make reference-pair` makes them anew."""

from pathlib import Path

TARGET = Path(__file__).parent / "target"
DRAFT = Path(__file__).parent / "draft"
