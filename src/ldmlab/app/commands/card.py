"""`ldmlab card`: the model card of a run or a model folder.

README.md states how the model was trained, on which data, what it cost and how it scored; intended use, limits, risks,
licence and attribution come from card.yaml, which the command writes for you to fill in. FOLDER adds what lies
elsewhere: runs of the first stage and the CLIP, evaluations, an audit; card.json keeps it for the next time.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="run folder or model folder; gets README.md, card.yaml, card.json")
    add("more", type=Path, nargs="*", metavar="FOLDER", help="runs of its parts, evaluations, audits")


def run(args: argparse.Namespace) -> None:
    from ldmlab.app.card_facts import (
        PERSONS,
        README,
        collect,
        empty_fields,
        head_of,
        read_person,
        write_card,
        write_template,
    )
    from ldmlab.interop.model_folders import card, usage_of
    from ldmlab.model_files import ModelFiles, describe, model_folder

    spec, folder = describe(args.model), model_folder(args.model)
    person, facts = read_person(folder), collect(folder, args.more)
    files = ModelFiles(folder, spec, {}, "")
    write_template(folder)
    write_card(folder, head_of(folder) or card(files, "trained with ldmlab.", usage=usage_of(spec)), person, facts)
    count = f"{len(facts['runs'])} runs, {len(facts['evaluations'])} evaluations"
    print(f"{folder / README}: {count}{', an audit' if facts['audit'] else ''}")
    if empty := empty_fields(person):
        print(f"{folder / PERSONS}: fill in {', '.join(empty)}, and run the command again")
