"""The kinds of assignments; each module registers one task."""
