"""An argument parser whose errors are one line, and whose options show their values and defaults alike."""

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from .errors import UserError

METAVARS: dict[Any, str] = {int: "N", float: "X"}  # by what parses the value


class Parser(argparse.ArgumentParser):
    """argparse, with a UserError in place of usage text and an exit; sub-parsers inherit the class."""

    def add_option(self, name: str, text: str, default: Any = None, values: Sequence[str] = (), **options: Any) -> None:
        """An option with a value; its help ends with its default, unless that is None.

        values: the words it takes. In a parser whose `argument_default` is SUPPRESS, `default` is shown and not set.
        """
        options.setdefault("metavar", "|".join(values) or METAVARS.get(options.get("type"), "NAME"))
        if self.argument_default != argparse.SUPPRESS:
            options["default"] = default
        self.add_argument(name, help=text if default is None else f"{text} (default: {default})", **options)

    def parse_command(self, commands: Mapping[str, argparse.ArgumentParser], argv: Sequence[str] | None) -> Any:
        """parse_args, where what no option takes is an error of the command that was asked for."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            commands[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
        return args

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            message += _likely(unknown[1], self._option_string_actions)
        elif command := re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            names = command[2].replace("'", "").split(", ")
            message = f"no command {command[1]!r}; there are {', '.join(names)}{_likely(command[1], names)}"
        raise UserError(f"{message} (see {self.prog} --help)")


def _likely(word: str, known: Iterable[str]) -> str:
    likely = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {likely[0]}?" if likely else ""
