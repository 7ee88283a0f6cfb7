"""The command line's argument parser: argparse, with its complaints as one line."""

import argparse
from typing import NoReturn

from opensora_fast.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` lists the options)")
