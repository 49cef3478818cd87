"""All benchmarks, one after the other: `make bench`. Each prints what it measured as a ratio where there is a peer."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run every other file of this folder; the exit code is that of the first one that fails."""
    for script in sorted(HERE.glob("[!_]*.py")):
        if script.name == Path(__file__).name:
            continue
        print(f"\n== {script.stem}", flush=True)
        subprocess.run([sys.executable, str(script)], check=True)


if __name__ == "__main__":
    main()
