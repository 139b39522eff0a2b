"""An argument parser whose errors are one line."""

import argparse
import difflib
import re
from typing import NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, with a UserError in place of usage text and an exit; sub-parsers inherit the class."""

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
