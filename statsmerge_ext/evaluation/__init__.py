"""Evaluation: the task suites with their data, and the reports made from them."""
