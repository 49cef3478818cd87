"""`ldmlab verify FILE...`: whether images carry the watermark or signed Content Credentials of a generated image.

Ends with 1 where a signed file was changed, with 2 where one cannot be read; all are looked at. An image
without marks may still be generated.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="images; signatures are read from PNG")


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from ldmlab.errors import InputError
    from ldmlab.marking.watermark import LEAST_SIDE, THRESHOLD, watermark_score
    from ldmlab.open_image import open_image, read_image

    changed, unreadable = False, []
    for path in args.files:
        try:
            content = read_image(path)
            with open_image(content) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError) as error:
            unreadable.append(str(path))
            print(f"{path}\n  cannot be read: {error}")
            continue
        if min(pixels.shape[:2]) < LEAST_SIDE // 2:
            mark = f"too small to tell (below {LEAST_SIDE // 2} px)"
        else:
            score = watermark_score(pixels)
            mark = f"{'yes' if score > THRESHOLD else 'no'} (score {score:.1f}, yes above {THRESHOLD})"
        state, detail = _credentials(content)
        changed |= state == "changed"
        print(f"{path}\n  watermark    {mark}\n  credentials  {state}{f': {detail}' if detail else ''}")
    if unreadable:
        few = ", ".join(unreadable[:3]) + (", ..." if len(unreadable) > 3 else "")
        raise InputError(f"{len(unreadable)} of {len(args.files)} files cannot be read ({few}); give image files.")
    return 1 if changed else 0


def _credentials(content: bytes) -> tuple[str, str]:
    try:
        from ldmlab.marking.credentials import credentials
    except ModuleNotFoundError as error:
        return "not read", f"needs {error.name}: pip install 'ldmlab[credentials]'"
    return credentials(content)
