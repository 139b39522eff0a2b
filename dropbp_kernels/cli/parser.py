"""An argument parser whose errors are one line, and whose options show their values and defaults alike."""

import argparse
import difflib
import re
from collections.abc import Sequence
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

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            likely = difflib.get_close_matches(unknown[1], self._options(), n=1)
            message += f"; did you mean {likely[0]}?" if likely else ""
        raise UserError(f"{message} (see {self.prog} --help)")

    def _options(self) -> set[str]:
        """Those of all commands: which one was asked for is not known here."""
        commands = (action.choices for action in self._actions if isinstance(action.choices, dict))
        return {
            option for parsers in commands for parser in parsers.values() for option in parser._option_string_actions
        }
