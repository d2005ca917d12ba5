"""Executors: each runs the stages of a bundle on one kind of device."""
