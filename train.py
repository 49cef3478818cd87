"""Train one stage: python train.py experiment=..."""

from ldmlab.app.cli import main

if __name__ == "__main__":
    main("train")
