"""One command line for all stages: an optional first word, flags from a frozen dataclass, one-line errors.

python STAGE.py                      the real thing: the first preset
python STAGE.py demo --steps 50      another preset, single fields overridden
python STAGE.py status --lake DIR    another action on the same fields
python STAGE.py FOLDER ...           of a stage with a positional field: what is none of its words is the field
python STAGE.py ... --check          check everything, then exit; the streamer makes or joins the lake for that
python STAGE.py ... --write-config FILE    write what these arguments mean as JSON, then exit: for other programs
"""

import dataclasses
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, TypeVar, get_args, get_type_hints

import tyro
from dotenv import load_dotenv

from hear_distill.files import UserError, naming_full_disk, write_json
from hear_distill.runlog import end_when_alone

C = TypeVar("C")
POSITIONAL = get_args(tyro.conf.Positional[None])[1]  # what tyro marks such a field with
NO_FLAGS: Mapping[str, Sequence[str]] = MappingProxyType({})
Action = Callable[[C], int | None]  # a stage's main: takes its Config, returns an exit code or None for 0


def run(
    main: Action[C],
    presets: Mapping[str, C],
    description: str,
    actions: Mapping[str, Action[C]] | None = None,
    check: Action[C] | None = None,
    flags_of: Mapping[str, Sequence[str]] | None = None,
) -> NoReturn:
    """Parse `sys.argv`, run the stage, exit: 0 done, 1 failed, 2 the user can put it right, 73 the disk is full,
    75 try again later.

    Args:
        presets: configurations by first word; the first of them is the bare command's.
        actions: first words that do something other than `main` with the first preset, such as `status`.
        check: what --check does once the flags are accepted, for what only the disk can tell; raises UserError.
        flags_of: fields that mean something to some words alone, by name; with other words they are refused.
        description: the stage's docstring, shown by --help above the list of words and flags.
    """
    load_dotenv(".env")
    end_when_alone()
    sys.stdout.reconfigure(line_buffering=True)  # a supervisor or `tee` sees each line when it is written
    try:
        is_check = "--check" in sys.argv
        argv = [argument for argument in sys.argv[1:] if argument != "--check"]
        config_file = take_value(argv, "--write-config")
        action, config = parse(main, presets, argv, description, actions or {}, flags_of or {})
        if config_file is not None:
            sys.exit(write_json(Path(config_file), dataclasses.asdict(config)))
        if is_check:
            action = check if check and action is main else lambda _: None
        with naming_full_disk():
            sys.exit(action(config))
    except UserError as e:
        lines = (" ".join(line.split()) for line in str(e).splitlines())
        print("error: " + "; ".join(filter(None, lines)), file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:  # before the stage listens for it, so nothing was in hand
        sys.exit("interrupted")


def take_value(argv: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` from the arguments; None if it is not among them. Raises UserError without a value."""
    if flag not in argv:
        return None
    at = argv.index(flag)
    if at + 1 == len(argv):
        raise UserError(f"{flag} needs a file")
    value = argv[at + 1]
    del argv[at : at + 2]
    return value


def parse(
    main: Action[C],
    presets: Mapping[str, C],
    argv: Sequence[str],
    description: str,
    actions: Mapping[str, Action[C]],
    flags_of: Mapping[str, Sequence[str]] = NO_FLAGS,
) -> tuple[Action[C], C]:
    """What to call, and with which configuration. Raises UserError for anything wrong, SystemExit(0) after --help."""
    bare, argv = next(iter(presets)), list(argv)
    words = [*presets, *actions]
    is_word = bool(argv) and not argv[0].startswith("-") and (argv[0] in words or not has_positional(presets[bare]))
    word = argv.pop(0) if is_word else bare
    if word not in words:
        raise UserError(f"unknown word {word!r}; the first word is one of: {', '.join(words)} (none means {bare})")

    if "--help" in argv or "-h" in argv:
        print(f"{description}\nfirst word: {' | '.join(words)} (none means {bare}); the defaults below are of {word}\n")
    default = presets.get(word, presets[bare])
    config = _parse_flags(default, argv)
    for name, owners in flags_of.items():
        if word not in owners and getattr(config, name) != getattr(default, name):
            raise UserError(f"--{name.replace('_', '-')} means nothing to {word}; it belongs to: {', '.join(owners)}")
    return actions.get(word, main), config


def has_positional(config: object) -> bool:
    """Whether a field is given without its name. Its value must not be one of the words: ./demo is a folder."""
    return any(POSITIONAL in get_args(hint) for hint in get_type_hints(type(config), include_extras=True).values())


def _parse_flags(default: C, argv: Sequence[str]) -> C:
    """Override fields of `default`. tyro answers a mistake with a box of several lines; we keep its first sentence."""
    boxed = io.StringIO()
    try:
        with redirect_stderr(boxed):
            return tyro.cli(
                type(default),
                args=join_repeats(join_values(argv), default),
                default=default,
                description="",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as e:
        if not e.code:
            raise
        raise UserError(unbox(boxed.getvalue())) from None


def unbox(text: str) -> str:
    """The first sentence of one of tyro's boxes, with its suggestion, on one line."""
    parts: list[list[str]] = [[]]  # what stands above, between and below the rules; the message is the second
    for line in text.splitlines():
        content = line.strip("│|╭╮╰╯ ")
        if line.startswith("╭") or not content.strip("─-"):
            parts.append([])
        else:
            parts[-1].append(content)
    message = " ".join(parts[1]).removeprefix("Error parsing Config: ")
    suggestions = [line.split()[0] for part in parts[2:] for line in part if line.startswith("--")]
    hint = f"; did you mean {suggestions[0]}?" if "Perhaps you meant" in text and suggestions else ""
    return f"{message}{hint} (all flags: --help)"


def join_values(argv: Sequence[str]) -> list[str]:
    """`--train-args VALUE` as one word: a value that is itself a flag would be taken for the next one."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1].startswith("--") and joined[-1].endswith("-args"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def join_repeats(argv: Sequence[str], default: object) -> list[str]:
    """`--checkpoint A --checkpoint B` as `--checkpoint A B`, for the fields that hold several: tyro takes the last."""
    several = {"--" + name.replace("_", "-") for name, value in vars(default).items() if isinstance(value, tuple)}
    others: list[str] = []
    values: dict[str, list[str]] = {}
    flag = ""
    for argument in argv:
        if argument.startswith("--"):
            flag, separator, value = argument.partition("=")
            if flag in several:
                values.setdefault(flag, []).extend([value] if separator else [])
                continue
        (values[flag] if flag in several else others).append(argument)
    return others + [word for flag, found in values.items() for word in (flag, *found)]
