"""`ldmlab config`: the final value of every option and the file that set it."""

import argparse

from ldmlab.errors import InputError

CONFIGURATIONS = ("train", "evaluate", "encode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration and its overrides."""
    parser.add_argument("configuration", help="train | evaluate | encode")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as on the command line of that program")
    parser.add_argument("--only", default="", metavar="KEY", help="options that begin so, such as trainer")


def run(args: argparse.Namespace) -> int:
    """One line an option: key, value, file."""
    from ldmlab.app.origins import origins

    if args.configuration not in CONFIGURATIONS:
        raise InputError(
            f"{args.configuration}: there is no such configuration; there are {', '.join(CONFIGURATIONS)}."
        )
    found = [o for o in origins(args.configuration, args.overrides) if o.key.startswith(args.only)]
    if not found:
        raise InputError(f"--only={args.only}: no option begins so; leave --only out to see all.")
    texts = [f"{o.key} = {o.value}" for o in found]
    width = min(max(map(len, texts)), 70)
    for text, origin in zip(texts, found, strict=True):
        print(f"{text:<{width}}  # {origin.file}")
    return 0
