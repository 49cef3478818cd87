"""All benchmarks, one after the other: `make bench`. Each prints what it measured as a ratio where there is a peer."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
_NO_SPEED = (Path(__file__).name, "campaign.py")  # which plants faults for half an hour


def main() -> None:
    """Run every measurement of this folder; the exit code is that of the first one that fails."""
    for script in sorted(HERE.glob("[!_]*.py")):
        if script.name in _NO_SPEED:
            continue
        print(f"\n== {script.stem}", flush=True)
        subprocess.run([sys.executable, str(script)], check=True)


if __name__ == "__main__":
    main()
