"""`python -m ldmlab`, the same as the console script."""

from ldmlab.app.cli import main

main()
