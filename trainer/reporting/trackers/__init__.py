"""Trackers, each of which mirrors a run folder; a new file is a new tracker."""
