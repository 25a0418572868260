"""Geometry of boxes that models, losses and tasks of detection share."""
