"""Score a model: python evaluate.py model=RUN protocol=..."""

from ldmlab.app.evaluate import main

if __name__ == "__main__":
    main()
