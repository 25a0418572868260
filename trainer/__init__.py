"""Recipe-driven, exact, interruptible training for computer vision."""

__version__ = "0.1.0"
