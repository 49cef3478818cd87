"""Score a model: python evaluate.py model=RUN protocol=..."""

from ldmlab.app.cli import main

if __name__ == "__main__":
    main("evaluate")
