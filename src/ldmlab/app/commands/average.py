"""`ldmlab average`: the weights of a run as an average of any length, from its snapshots.

A length is the standard deviation of the average's profile relative to the training so far, 0.05 to 0.20 for most
runs (Karras et al. 2024). The run needs callbacks=power_averages; a checkpoint of it gives an earlier time.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, or one of its checkpoints")
    add("out", type=Path, nargs="?", metavar="OUT", help="new model folder (RUN/averages/length_L-step_N)")
    add("--length", type=float, required=True, metavar="L", help="such as 0.10")


def run(args: argparse.Namespace) -> None:
    from ldmlab.averaging import FOLDER, checked_length, snapshots
    from ldmlab.interop.model_folders import card, check_new, new_folder, write_ldmlab
    from ldmlab.model_files import read_model

    checked_length(args.length, "--length")
    files = read_model(args.run, args.length)
    out = args.out or files.folder / FOLDER / f"length_{args.length:g}-step_{files.step:08d}"
    check_new(out)
    used = [one for one in snapshots(files.folder) if files.step is None or one.step <= files.step]
    with new_folder(out) as folder:
        written = write_ldmlab(files, folder)
        origin = f"{files.weights} of step {files.step}, from {len(used)} snapshots; {written.what}."
        (folder / "README.md").write_text(card(files, origin, [], written.usage), encoding="utf-8")
    lengths = ", ".join(sorted({f"{one.length:g}" for one in used}))
    print(f"{out}: {files.weights} at step {files.step}, from {len(used)} snapshots of lengths {lengths}")
