"""Parts for ldmlab that live in a package of their own."""

__version__ = "0.1.0"
