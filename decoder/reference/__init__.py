"""The embedded target, draft and tokenizer. README.md beside this file describes them.

`make reference-pair` trains them anew.
"""

from pathlib import Path

TARGET = Path(__file__).parent / "target"
DRAFT = Path(__file__).parent / "draft"
