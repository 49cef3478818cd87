"""All benchmarks, one after the other: `make bench`. Each prints what it measured as a ratio where there is a peer."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
_LEFT_OUT = (Path(__file__).name, "campaign.py", "gpu.py")  # half an hour of faults; for another machine


def main() -> None:
    """Run every measurement of this folder; the exit code is that of the first one that fails."""
    for script in sorted(HERE.glob("[!_]*.py")):
        if script.name in _LEFT_OUT:
            continue
        print(f"\n== {script.stem}", flush=True)
        subprocess.run([sys.executable, str(script)], check=True)


if __name__ == "__main__":
    main()
