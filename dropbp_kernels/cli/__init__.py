"""The command line.

dropbp-kernels finetune   fine-tune a causal language model with DropBP; compares several ways on the built-in one
dropbp-kernels info       versions, devices, and which backend serves each op here
dropbp-kernels plan       predict memory and step time of fine-tuning, without a GPU and without weights
dropbp-kernels profile    what each branch does in one step, and whether dropped ones do nothing
dropbp-kernels tune       measure launch parameters of the Triton kernels on this GPU

The files of the commands read options (`parser`, `settings`, `plan_setting`; mistakes: `errors`) and import no torch,
so that help and errors are there at once; what they import inside of `run` does the work. Order of a fine-tuning
(`finetuning`): `documents` (`corpus`: built-in ones) and `data` make batches, `builtin` and `models` make the model,
`compare` the runs, `training` runs the steps, `checkpoint` keeps them, `compare_report` says what they cost and
reached, `plots` draws. Of a plan: `model_config` finds the config, `planning` simulates steps of its model (`four_bit`:
where its base is held in 4 bits), `plan_report` compares them, `plan_tables` shows it. Of a profile: `tracing` reads a
profiler trace. Of a tuning: `launch_search`. Shared: `output`, `progress`, and `hardware`: with what it was measured.
"""

import logging
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from . import finetune, info, plan, profile, tune
from .errors import UserError
from .parser import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 130 when interrupted, or 2 with one line on stderr.

    2 is for a user's error, and for a GPU that has too little memory.
    """
    parser = Parser(prog="dropbp-kernels", description="Fine-tuning with parts of the backward pass left out.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in (finetune, info, plan, profile, tune):
        command.add_parser(commands)
    try:
        args = parser.parse_command(commands.choices, argv)
        with warnings.catch_warnings():
            # What PEFT asks transformers and bitsandbytes, and no user can change.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            return args.run(args)
    except UserError as error:
        print(f"dropbp-kernels: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not have been imported
            raise
        found = ". ".join(str(error).split(". ")[:3])  # what was asked for and what there is; advice follows
        hint = "Smaller batches or sequences take less; dropbp-kernels plan says what fits"
        print(f"dropbp-kernels: error: {found}. {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dropbp-kernels: interrupted", file=sys.stderr)
        return 130
