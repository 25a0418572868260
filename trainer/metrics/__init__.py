"""Metrics from sufficient statistics: plain functions of summed tensors."""
