"""Tests of the backend entry point, options, reports and the console."""
