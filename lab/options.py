"""Options of a command: a frozen dataclass whose fields carry their help text."""

import argparse
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def option(default: Any = MISSING, help: str = "") -> Any:
    """A field with its help text; one without a default is required."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A target and a draft, and where they run."""

    target: str = option("", "folder or hub id (default: the embedded target)")
    draft: str = option("", "folder or hub id (default: the embedded draft)")
    dtype: Dtype = option("auto", "of both models")
    device: str = option("auto", "cpu, cuda or cuda:N")
    threads: int = option(0, "torch threads; 0: torch's own choice")


@dataclass(frozen=True, kw_only=True)
class PairOptions(ModelOptions):
    """A target, a draft, and prompts for them."""

    prompts: Path | None = option(
        None, 'JSON lines with a "prompt" each (default: code of an installed package)'
    )
    prompt_count: int = option(200, "prompts taken from the file")


def parse(kind: type[T], command: str, about: str | None) -> T:
    """The command line as an instance of `kind`, whose ValueError becomes a usage error."""
    parser = argparse.ArgumentParser(
        prog=f"python -m lab {command}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add(parser, kind)
    try:
        given = vars(parser.parse_args()).items()
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given})
    except ValueError as error:
        parser.error(str(error))


def add(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    """Adds one option for each field of the dataclass; options not given stay absent."""
    hints = get_type_hints(kind)
    for each in fields(kind):
        parser.add_argument(
            "--" + each.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            required=each.default is MISSING,
            help=_help(each.metadata["help"], each.default),
            **_parsing(hints[each.name]),
        )


def _parsing(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    parts = get_args(hint)
    if hint is bool:
        return {"action": "store_true"}
    if NoneType in parts:
        return _parsing(next(part for part in parts if part is not NoneType))
    if get_origin(hint) is tuple:
        return {"nargs": "+", "action": "extend", **_parsing(parts[0])}
    if get_origin(hint) is Literal:
        return {"choices": parts}
    return {"type": hint}


def _help(text: str, default: Any) -> str:
    if default in (MISSING, None, "", False, ()) or "default" in text:
        return text
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default: {shown})"
