"""An argument parser whose errors are one line."""

import argparse
from typing import NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, with a UserError in place of usage text and an exit; sub-parsers inherit the class."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
