"""`ldmlab verify FILE...`: whether images carry the watermark or signed Content Credentials of a generated image.

Ends with 1 where a signed file was changed. An image without marks may still be generated.
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

    changed = False
    for path in args.files:
        try:
            content = read_image(path)
            with open_image(content) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); give image files.") from error
        if min(pixels.shape[:2]) < LEAST_SIDE // 2:
            mark = f"too small to tell (below {LEAST_SIDE // 2} px)"
        else:
            score = watermark_score(pixels)
            mark = f"{'yes' if score > THRESHOLD else 'no'} (score {score:.1f}, yes above {THRESHOLD})"
        state, detail = _credentials(content)
        changed |= state == "changed"
        print(f"{path}\n  watermark    {mark}\n  credentials  {state}{f': {detail}' if detail else ''}")
    return 1 if changed else 0


def _credentials(content: bytes) -> tuple[str, str]:
    try:
        from ldmlab.marking.credentials import credentials
    except ModuleNotFoundError as error:
        return "not read", f"needs {error.name}: pip install 'ldmlab[credentials]'"
    return credentials(content)
