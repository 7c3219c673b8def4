"""Whole tables: plans of many cells, their results in one file, and the reports made of it."""
