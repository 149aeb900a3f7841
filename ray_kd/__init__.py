"""Distil large language models into small ones on a Ray cluster."""
