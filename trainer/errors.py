"""The two ways in which a run ends badly; commands turn them into the contract's exit codes."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: one message that says what, where and what to do. Exit code 2."""


class TrainingFailed(Exception):
    """Training can't go on: a non-finite loss, unreadable data beyond what the recipe tolerates. Exit code 3."""
